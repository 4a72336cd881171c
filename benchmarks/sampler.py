"""The sampler's speed: completion tokens a second and slot occupancy.

    python benchmarks/sampler.py --model HF_FOLDER --prompts JSONL [--transformers PY]

In: a Hugging Face folder and a file of JSON lines with "question". Out: JSON lines
{"case", "tokens_per_second", "occupancy", "seconds", "tokens", …}: "fixed" decodes
`--slots` rows of `--new` tokens, EOS suppressed; "ragged" decodes `--rows` rows of up
to `--ragged-new` tokens, `--ragged-slots` at a time (fewer than rows: from a queue),
with natural EOS.
With --transformers, the same prompts go in turn through `transformers.generate` of that
interpreter, in batches of `--slots` rows, and each case ends with the ratio of the
medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from lines import (
    add_model_flags,
    make_parser,
    read_questions,
    show,
    start_interpreter,
)

# What the other interpreter runs: a line of options in, a line of figures out.
_OTHER = """
import json, sys, time, torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(int(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float().eval()
for line in sys.stdin:
    ask = json.loads(line)
    rows, seconds, tokens = ask["rows"], 0.0, 0
    torch.manual_seed(ask["seed"])
    for at in range(0, len(rows), ask["slots"]):
        batch = rows[at : at + ask["slots"]]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in batch])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch])
        least = ask["new"] if ask["fixed"] else 0
        begin = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=ask["new"], min_new_tokens=least,
                eos_token_id=ask["eos"], pad_token_id=ask["eos"][0])
        seconds += time.perf_counter() - begin
        for row in out[:, width:].tolist():
            ends = [i for i, t in enumerate(row) if t in ask["eos"]]
            tokens += ends[0] + 1 if ends else len(row)
    print("LINE" + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
"""


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--slots", type=int, default=32, help="and rows of transformers' batches")
    add("--ragged-slots", type=int, help="of the ragged case (the package's choice)")
    add("--group", type=int, default=8, help="outputs of a question")
    add("--new", type=int, default=128, help="tokens of a fixed output")
    add("--rows", type=int, default=128, help="outputs of the ragged case")
    add("--ragged-new", type=int, default=128, help="tokens of a ragged output at most")
    add("--cases", nargs="+", choices=["fixed", "ragged"], default=["fixed", "ragged"])
    add("--repeats", type=int, default=3)
    add("--cache-dtype", help="of keys and values (the model's)")
    add("--transformers", metavar="PYTHON", help="an interpreter that has transformers")
    add("--threads", type=int, default=2, help="of transformers")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    import jax

    from grpo_jax.checkpoints.huggingface import weights
    from grpo_jax.data.example import Example
    from grpo_jax.data.prompts import encode_prompt
    from grpo_jax.data.tokenizer import Tokenizer
    from grpo_jax.generation.sampler import generate

    model, params = weights.load_pretrained(flags.model, dtype=flags.dtype)
    tokenizer = Tokenizer.from_folder(flags.model)
    questions = read_questions(flags.prompts)
    other = None
    if flags.transformers:
        arguments = flags.model, str(flags.threads)
        other = start_interpreter(flags.transformers, _OTHER, *arguments)
    for case in flags.cases:
        fixed = case == "fixed"
        rows = flags.slots if fixed else flags.rows
        new = flags.new if fixed else flags.ragged_new
        asked = questions[: rows // flags.group]
        prompts = [encode_prompt(tokenizer, Example(q)) for q in asked]
        # No token has a negative id: nothing ends before the last turn.
        options: dict[str, Any] = dict(
            samples=flags.group,
            max_new_tokens=new,
            eos_id=(-1,) if fixed else tokenizer.eos_ids,
            slots=flags.slots if fixed else flags.ragged_slots,
            cache_dtype=flags.cache_dtype,
        )

        def ours(seed: int, prompts=prompts, options=options) -> dict[str, Any]:
            begin, key = time.perf_counter(), jax.random.key(seed)
            out = generate(model, params, prompts, key=key, **options)
            tokens = int(out.lengths.sum())
            seconds = time.perf_counter() - begin
            occupancy = float(out.occupancy)
            return {"seconds": seconds, "tokens": tokens, "occupancy": occupancy}

        ask = {
            "rows": [p for p in prompts for _ in range(flags.group)],
            "slots": flags.slots,
            "new": new,
            "eos": tokenizer.eos_ids,
            "fixed": fixed,
        }
        sides: dict[str, Callable[[int], dict[str, Any]]] = {"grpo_jax": ours}
        if other:
            sides["transformers"] = lambda seed, ask=ask: other(ask | {"seed": seed})
        ours(10**6)  # compiles
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for seed in range(flags.repeats):
            for name, side in sides.items():
                found = side(seed)
                speed = found["tokens"] / found["seconds"]
                speeds[name].append(speed)
                show(case=case, who=name, tokens_per_second=speed, **found)
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        if len(sides) > 1:
            pairs = zip(*speeds.values(), strict=True)
            show(
                case=case,
                ratio=medians["grpo_jax"] / medians["transformers"],
                ratios=[round(a / b, 3) for a, b in pairs],
            )


if __name__ == "__main__":
    main()
