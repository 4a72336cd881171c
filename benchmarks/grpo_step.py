"""A whole GRPO step: sampling, rewards, the update with its KL term.

    python benchmarks/grpo_step.py --model HF_FOLDER --prompts JSONL [--trl PYTHON]

In: a Hugging Face folder and a file of JSON lines with "question", of which each step
takes the next --questions. Out: a JSON line a step, {"step", "seconds",
"generate_seconds", "update_seconds", "completion_tokens", "peak_rss_gb"}, after one
step is taken and without the time that compiling takes. Questions stand in the model's
own chat template, temperature 1, natural EOS, AdamW, β 0.04, μ 1; an output's reward is
its share of digits, so that groups differ whatever the model knows. With --trl, TRL's
GRPOTrainer of that interpreter does the same on the same machine, a step of each in
turn, since machines drift, and a last line gives the ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Generator
from typing import Any

from lines import (
    add_model_flags,
    add_row_flags,
    make_parser,
    read_questions,
    show,
    start_interpreter,
)

# What the other interpreter runs, a step for each line that it reads. TRL generates all
# outputs at once and trains on micro-batches of `micro`: 4 outputs are its fastest.
_TRL = """
import json, sys, time, torch, transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
ask = json.loads(sys.argv[1])
torch.set_num_threads(ask["threads"])
model = transformers.AutoModelForCausalLM.from_pretrained(ask["model"]).float()
prompts = [[{"role": "user", "content": q}] for q in ask["questions"]]
counted, spent = {}, {"generate": 0.0, "begin": 0.0}
def reward(prompts, completions, completion_ids, **_):
    counted["tokens"] = sum(len(ids) for ids in completion_ids)
    texts = [c[0]["content"] for c in completions]
    return [sum(x.isdigit() for x in t) / max(len(t), 1) for t in texts]
config = GRPOConfig(
    output_dir="/tmp/trl-benchmark", use_cpu=True, bf16=False, fp16=False, beta=0.04,
    num_generations=ask["group"], temperature=1.0, top_k=0, top_p=1.0,
    max_completion_length=ask["new"], per_device_train_batch_size=ask["micro"],
    gradient_accumulation_steps=ask["outputs"] // ask["micro"],
    generation_batch_size=ask["outputs"], num_iterations=1, max_steps=ask["steps"],
    learning_rate=ask["rate"], adam_beta2=0.95, save_strategy="no", report_to=[],
    logging_strategy="no", shuffle_dataset=False, gradient_checkpointing=False)
generate = model.generate
def timed(*args, **kwargs):
    begin = time.perf_counter()
    out = generate(*args, **kwargs)
    spent["generate"] += time.perf_counter() - begin
    return out
model.generate = timed
class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        sys.stdin.readline()
        spent["begin"], spent["generate"] = time.perf_counter(), 0.0
    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.perf_counter() - spent["begin"]
        # Not ru_maxrss, which starts at the peak of the process that started this one.
        status = open("/proc/self/status").read().split("VmHWM:")[1]
        peak = int(status.split()[0]) / 2**20
        print("LINE" + json.dumps({"step": state.global_step - 1, "seconds": seconds,
            "generate_seconds": spent["generate"],
            "update_seconds": seconds - spent["generate"],
            "completion_tokens": counted["tokens"], "peak_rss_gb": peak}), flush=True)
trainer = GRPOTrainer(
    model=model, reward_funcs=reward, args=config,
    train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[Clock()])
trainer.train()
"""


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add_row_flags(parser)
    add = parser.add_argument
    add("--questions", type=int, default=4, help="of a step")
    add("--group", type=int, default=8, help="outputs of a question, G")
    add("--max-new", dest="new", type=int, default=128, help="tokens of an output")
    add("--steps", type=int, default=3)
    add("--learning-rate", dest="rate", type=float, default=1e-6)
    add("--seed", type=int, default=0)
    add("--trl", metavar="PYTHON", help="an interpreter that has TRL")
    add("--micro", type=int, default=4, help="outputs of a micro-batch of TRL's")
    add("--threads", type=int, default=2, help="of TRL")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    questions = read_questions(flags.prompts)
    wanted = flags.questions * (flags.steps + 1)
    if len(questions) < wanted:
        sys.exit(f"error: {flags.prompts}: {len(questions)} questions, {wanted} wanted")
    sides = [measure(flags, questions[:wanted])]
    if flags.trl:
        sides.append(measure_trl(flags, questions[:wanted]))
    # A step of each in turn.
    found = list(zip(*zip(*sides, strict=True), strict=True))
    if flags.trl:
        speeds = [[x["completion_tokens"] / x["seconds"] for x in y] for y in found]
        medians = [statistics.median(x) for x in speeds]
        memory = [max(x["peak_rss_gb"] for x in side) for side in found]
        show(
            tokens_per_second=medians[0],
            trl_tokens_per_second=medians[1],
            ratio=medians[0] / medians[1],
            ratios=[round(a / b, 3) for a, b in zip(*speeds, strict=True)],
            memory_share=memory[0] / memory[1],
        )


def measure(flags: argparse.Namespace, questions: list[str]) -> Generator[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from grpo_jax import (
        Sample,
        TrainState,
        generate,
        group_advantages,
        load_pretrained,
        make_grpo_step,
        pack,
    )
    from grpo_jax.data.example import Example
    from grpo_jax.data.prompts import encode_prompt
    from grpo_jax.data.tokenizer import Tokenizer
    from grpo_jax.generation.rollout_shapes import bucket_length
    from grpo_jax.training.packing import fitting_length

    model, params = load_pretrained(flags.model, dtype=flags.dtype)
    model = dataclasses.replace(model, remat="ffn" if flags.remat else "none")
    tokenizer = Tokenizer.from_folder(flags.model)
    optimizer = optax.adamw(flags.rate, b2=0.95)
    update: Any = make_grpo_step(model, optimizer, kl_coef=0.04)
    reference = params
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    prompts = [encode_prompt(tokenizer, Example(q)) for q in questions]
    capacity = flags.questions * flags.group
    layout: dict = dict(rows=flags.rows, share_prompts=True)

    def sample(asked, key):
        out = generate(
            model,
            state.params,
            asked,
            key=key,
            samples=flags.group,
            max_new_tokens=flags.new,
            eos_id=tokenizer.eos_ids,
        )
        return jax.device_get(out)

    # A run compiles a program for each width of prompts and each row length, once.
    by_step = [
        prompts[start : start + flags.questions]
        for start in range(0, len(prompts), flags.questions)
    ]
    for asked in {
        bucket_length(max(map(len, asked))): asked for asked in by_step
    }.values():
        sample(asked, jax.random.key(flags.seed))
    steps: dict[int, Any] = {}
    for step, asked in enumerate(by_step):
        begin = time.perf_counter()
        out = sample(asked, jax.random.fold_in(jax.random.key(flags.seed), step))
        sampled = time.perf_counter()
        tokens = [t[:n].tolist() for t, n in zip(out.tokens, out.lengths, strict=True)]
        texts = [tokenizer.decode(t) for t in tokens]
        digits = [sum(x.isdigit() for x in t) / max(len(t), 1) for t in texts]
        advantages = np.asarray(group_advantages(jnp.array(digits), flags.group))
        samples = [
            Sample.from_output(
                asked[i // flags.group],
                t,
                advantages=float(advantages[i]),
                logps=out.logps[i, : len(t)].tolist(),
            )
            for i, t in enumerate(tokens)
        ]
        length = fitting_length(samples, longest=flags.length, **layout)
        batch = pack(samples, length=length, **layout).with_capacity(capacity)
        packed = time.perf_counter()
        if length not in steps:
            steps[length] = update.lower(state, reference, batch).compile()
        compiling = time.perf_counter() - packed
        state, metrics = steps[length](state, reference, batch)
        metrics = jax.device_get(metrics)
        end = time.perf_counter()
        if not step:
            continue
        yield show(
            step=step,
            seconds=end - begin - compiling,
            generate_seconds=sampled - begin,
            update_seconds=end - sampled - compiling,
            completion_tokens=int(out.lengths.sum()),
            peak_rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            loss=float(metrics["loss"]),
            kl=float(metrics["kl"]),
            rows=int(batch.used),
            padding=float(batch.padding),
        )


def measure_trl(flags: argparse.Namespace, questions: list[str]) -> Generator[dict]:
    options = ("model", "group", "new", "micro", "rate", "threads")
    settings = {name: getattr(flags, name) for name in options}
    settings |= {"questions": questions, "outputs": flags.questions * flags.group}
    settings["steps"] = flags.steps + 1
    ask = start_interpreter(flags.trl, _TRL, json.dumps(settings))
    for step in range(flags.steps + 1):
        found = ask(step)
        if step:
            yield show(who="trl", **found)


if __name__ == "__main__":
    main()
