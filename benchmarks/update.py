"""The update's speed: trained tokens a second, against the machine's own peak.

    python benchmarks/update.py [--model HF_FOLDER] [--cases update group …]

In: a Hugging Face folder; without one, random weights of SmolLM2-135M's sizes. Out:
JSON lines:
  peak        FLOP/s of one float32 matrix product, N × N by N × N, XLA's (on AMX
              `products.py` is faster);
  update      a GRPO update without KL on outputs of log-normal lengths: useful tokens
              and FLOP/s (6 × parameters a token, recomputation not counted), its share
              of the peak, and the padding's share of the rows;
  group       the same per useful token, by G;
  vocabulary  what the step holds beside weights, gradients and optimiser state, by V.
Useful tokens are those that go through the model once: a question's, and its outputs'.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from lines import add_row_flags, make_parser, show

SMOLLM2: Any = dict(width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536)
SMOLLM2 |= dict(vocab_size=49152, tied=True)  # SmolLM2-135M's sizes
CASES = ("peak", "update", "group", "vocabulary")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_row_flags(parser)
    add = parser.add_argument
    add("--model", help="a Hugging Face folder")
    add("--cases", nargs="+", choices=CASES, default=CASES)
    add("--questions", type=int, default=4)
    add("--group", type=int, default=8)
    add("--groups", type=int, nargs="+", default=[4, 8, 16, 32])
    add("--vocabularies", type=int, nargs="+", default=[8192, 32768, 131072])
    add("--prompt", type=int, default=100, help="tokens of a question")
    add("--new", type=int, default=128, help="tokens of an output at most")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--repeats", type=int, default=3)
    add("--size", type=int, default=2048, help="N of the matrix product")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    import jax
    import optax

    from grpo_jax import TrainState, load_pretrained, make_grpo_step
    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder

    remat = "ffn" if flags.remat else "none"
    if flags.model:
        model, params = load_pretrained(flags.model, dtype=flags.dtype)
        model = dataclasses.replace(model, remat=remat)
    else:
        config = ModelConfig(**SMOLLM2)
        model = Decoder(config, dtype=flags.dtype, remat=remat)
        params = jax.jit(model.init)(jax.random.key(0))
    optimizer = optax.adamw(1e-6)

    if "vocabulary" in flags.cases:
        for size in flags.vocabularies:
            show(case="vocabulary", V=size, **held(model, optimizer, flags, size))
    if set(flags.cases) == {"vocabulary"}:
        return
    update = make_grpo_step(model, optimizer, kl_coef=0.0)
    weights = sum(x.size for x in jax.tree.leaves(params))
    state = TrainState.create(params, optimizer)

    def seconds(batch) -> float:
        nonlocal state
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, None, batch))
        return time.perf_counter() - begin

    groups = flags.groups if "group" in flags.cases else []
    batches = {g: make_batch(flags, g, max([*groups, flags.group])) for g in groups}
    if "update" in flags.cases:
        batches[flags.group] = make_batch(flags, flags.group, flags.group)
    for batch, _ in batches.values():  # compiles
        seconds(batch)
    times: dict[int, list[float]] = {g: [] for g in batches}
    peaks = []
    for _ in range(flags.repeats):  # in turn: the machine's speed drifts
        peaks.append(peak(flags.size))
        for g, (batch, _) in batches.items():
            times[g].append(seconds(batch))
    best = max(peaks)
    show(case="peak", size=flags.size, gflops=best / 1e9)
    for g, (batch, tokens) in batches.items():
        spent = statistics.median(times[g])
        speed = tokens / spent
        show(
            case="update" if g == flags.group else "group",
            G=g,
            seconds=spent,
            tokens=tokens,
            tokens_per_second=speed,
            gflops=6 * weights * speed / 1e9,
            share_of_peak=6 * weights * speed / best,
            padding=float(batch.padding),
        )


def make_batch(flags: argparse.Namespace, group: int, most: int):
    """Packed outputs of log-normal lengths, as trained models write them."""
    from grpo_jax import Sample, pack
    from grpo_jax.training.packing import fitting_length

    rng = np.random.default_rng(0)
    samples, tokens = [], 0
    for _ in range(flags.questions):
        prompt = rng.integers(10, 1000, flags.prompt).tolist()
        tokens += flags.prompt
        for _ in range(group):
            length = int(
                np.clip(rng.lognormal(np.log(flags.new / 2), 0.5), 4, flags.new)
            )
            tokens += length
            output = rng.integers(10, 1000, length).tolist()
            samples.append(
                Sample(
                    tokens=[*prompt, *output],
                    mask=[0] * flags.prompt + [1] * length,
                    prompt=flags.prompt,
                    advantages=float(rng.normal()),
                )
            )
    layout: dict = dict(rows=flags.rows, share_prompts=True)
    length = fitting_length(samples, longest=flags.length, **layout)
    batch = pack(samples, length=length, **layout)
    return batch.with_capacity(flags.questions * most // flags.rows + 1), tokens


def peak(size: int, product: Callable | None = None) -> float:
    """FLOP/s of a float32 matrix product, XLA's or another, the best of three."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(product or jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (size, size))
    times = []
    jax.block_until_ready(product(x, x))
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def held(model, optimizer, flags: argparse.Namespace, vocab_size: int) -> dict:
    """Bytes that the compiled step holds beside what grows with the weights."""
    import jax

    from grpo_jax import TrainState, make_grpo_step

    config = dataclasses.replace(model.config, vocab_size=vocab_size)
    model = dataclasses.replace(model, config=config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    batch, _ = make_batch(flags, flags.group, flags.group)
    step: Any = make_grpo_step(model, optimizer, kl_coef=0.0)
    analysis = step.lower(state, None, batch).compile().memory_analysis()
    weights = sum(x.size * 4 for x in jax.tree.leaves(params))
    # The gradients' sum and those of one micro-batch are as large as the weights.
    return {
        "weights_gb": weights / 2**30,
        "temporaries_gb": analysis.temp_size_in_bytes / 2**30,
        "beside_gradients_gb": (analysis.temp_size_in_bytes - 2 * weights) / 2**30,
    }


if __name__ == "__main__":
    main()
