"""What this machine allows: the least time of a turn of the sampler and of a step.

    python benchmarks/roofline.py [--slots 32 128] [--outputs 32] [--new 128]

In: sizes; SmolLM2-135M's by default. Out: JSON lines, all float32, measured here:
  product   FLOP/s of a large matrix product
  reading   bytes/s of two cores, and of the products of one turn that read a cache:
            XLA's CPU computes a batch of small products on one core
  turn      by slots: the matrices' products, as they are computed for so few rows, and
            the reading of what the rows have written and of their prompts; and the
            completion tokens/s if nothing else took any time
  step      completion tokens/s if the update's products (8 × parameters a token, with
            the reference) ran at full speed, and turns took no longer than above
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lines import show
from update import peak

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 576, 1536, 9, 3, 64, 49152
BLOCK = 64  # positions that one small product reads


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--slots", type=int, nargs="+", default=[32, 128])
    add("--new", type=int, default=128, help="tokens of an output")
    add("--prompt", type=int, default=110, help="tokens of a question")
    add("--group", type=int, default=8, help="outputs of a question")
    add("--outputs", type=int, default=32, help="of a step, a slot each")
    add("--repeats", type=int, default=5)
    return parser.parse_args()


def seconds(function: Callable, *inputs: Any, repeats: int) -> float:
    """The median time of a compiled function."""
    import jax

    jitted, times = jax.jit(function), []
    jax.block_until_ready(jitted(*inputs))
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(jitted(*inputs))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matrices() -> tuple[list[dict[str, Any]], Any]:
    """A model's matrices, [out, in], and the embedding."""
    import jax

    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = dict(q=(query, WIDTH), k=(key, WIDTH), v=(key, WIDTH), o=(WIDTH, query))
    shapes |= dict(gate=(FFN, WIDTH), up=(FFN, WIDTH), down=(WIDTH, FFN))
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    layers = [
        {name: jax.random.normal(key, shape) / 50 for name, shape in shapes.items()}
        for key in keys[1:]
    ]
    return layers, jax.random.normal(keys[0], (VOCAB, WIDTH))


def products(layers, embedding, x):
    """A turn's products with the matrices, each waiting for the one before."""
    from grpo_jax.model import few_rows

    for w in layers:
        aside = few_rows(w["k"], x) + few_rows(w["v"], x)
        x = few_rows(w["o"], few_rows(w["q"], x)) + aside.mean(1, keepdims=True)
        x = few_rows(w["down"], few_rows(w["gate"], x) * few_rows(w["up"], x))
    return few_rows(embedding, x)


def scores(queries, keys):
    """What a turn's queries make of a block of keys in every layer, one by one."""
    import jax.numpy as jnp

    for block in keys:
        found = jnp.einsum("WKGH,WKHB->WKGB", queries, block)
        queries = queries + found * 1e-3  # as wide as a head: BLOCK = HEAD_DIM
    return queries


def main() -> None:
    flags = parse()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax

    layers, embedding = matrices()
    weights = sum(x.size for x in jax.tree.leaves((layers, embedding)))
    full = peak(2048)
    show(case="product", gflops=full / 1e9, parameters=weights)

    shape = (64, KV_HEADS, HEAD_DIM, BLOCK)
    keys = [jax.random.normal(jax.random.key(i), shape) for i in range(LAYERS)]
    size = sum(x.nbytes for x in keys)
    largest = seconds(lambda x: [y.max() for y in x], keys, repeats=flags.repeats)
    queries = jax.random.normal(
        jax.random.key(0), (64, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    )
    read = size / seconds(scores, queries, keys, repeats=flags.repeats)
    show(case="reading", gbytes=size / largest / 1e9, gbytes_by_products=read / 1e9)

    position = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4  # bytes of its keys and values
    turns = {}
    for slots in sorted({*flags.slots, flags.outputs}):
        x = jax.random.normal(jax.random.key(1), (slots, WIDTH))
        spent = seconds(products, layers, embedding, x, repeats=flags.repeats)
        held = slots * flags.new / 2 + slots / flags.group * flags.prompt
        reading = held * position / (size / largest)
        turns[slots] = spent + reading
        show(
            case="turn",
            slots=slots,
            products_ms=spent * 1e3,
            reading_ms=reading * 1e3,
            reading_by_products_ms=held * position / read * 1e3,
            tokens_per_second=slots / turns[slots],
        )
    completion = flags.outputs * flags.new
    trained = completion + flags.outputs / flags.group * flags.prompt
    update = 8 * weights * trained / full
    sampler = flags.new * turns[flags.outputs]
    show(
        case="step",
        update_seconds=update,
        sampler_seconds=sampler,
        tokens_per_second=completion / (update + sampler),
    )


if __name__ == "__main__":
    main()
