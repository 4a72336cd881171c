"""What this machine allows: the least time of a turn of the sampler and of a step.

    python benchmarks/roofline.py [--slots 32 128] [--outputs 32] [--new 128]

In: numbers of slots and tokens; the model's sizes are SmolLM2-135M's. Out: JSON lines,
all float32, measured here:
  product   FLOP/s of a large matrix product, by XLA or, on AMX, `products.py`
  reading   bytes/s of all cores
  turn      by slots: the matrices' products, as the sampler computes them; the reading
            of what the rows have written and of their prompts; and the completion
            tokens/s if nothing else took any time. Beside it the least that products
            can take: their FLOP at full speed, or the reading of the matrices
  step      completion tokens/s if the update's products (8 × parameters a token, with
            the reference) ran at full speed, and turns took no longer than above
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from lines import make_parser, show
from update import SMOLLM2, peak


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
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


TURNS = 5  # in one call, as in the sampler's loop


def products(layers, embedding, x):
    """Some turns' products with the matrices, each waiting for the one before."""
    import jax

    def turn(_, x):
        logits = a_turn(layers, embedding, x)
        return logits[:, : x.shape[1]] / abs(logits).max()

    return jax.lax.fori_loop(0, TURNS, turn, x)


def a_turn(layers, embedding, x):
    from grpo_jax.models.kernels import cpu
    from grpo_jax.models.kernels.decode import few_rows_product

    few_rows = cpu.few_rows if cpu.library_is_ready() else few_rows_product
    for w in layers:
        aside = few_rows(x, w["k_proj"]) + few_rows(x, w["v_proj"])
        x = few_rows(few_rows(x, w["q_proj"]), w["o_proj"])
        x = x + aside.mean(1, keepdims=True)
        h = few_rows(x, w["gate_proj"]) * few_rows(x, w["up_proj"])
        x = few_rows(h, w["down_proj"])
    return few_rows(x, embedding)


def main() -> None:
    flags = parse()
    import jax

    from grpo_jax.models.config import ModelConfig
    from grpo_jax.models.decoder import Decoder
    from grpo_jax.models.kernels.products import product

    config = ModelConfig(**SMOLLM2)
    params = jax.jit(Decoder(config).init)(jax.random.key(0))
    weights = sum(x.size for x in jax.tree.leaves(params))
    embedding, stacked = params["embed"], params["layers"]
    layers = [{k: x[i] for k, x in stacked.items()} for i in range(config.layers)]
    full = peak(2048, product)
    show(case="product", gflops=full / 1e9, parameters=weights)

    arrays = list(jax.random.normal(jax.random.key(1), (30, 1 << 20)))
    largest = seconds(lambda x: [y.max() for y in x], arrays, repeats=flags.repeats)
    read = sum(x.nbytes for x in arrays) / largest
    show(case="reading", gbytes=read / 1e9)

    # Bytes of its keys and values.
    position = config.layers * 2 * config.kv_heads * config.head_dim * 4
    turns = {}
    for slots in sorted({*flags.slots, flags.outputs}):
        x = jax.random.normal(jax.random.key(3), (slots, config.width))
        spent = seconds(products, layers, embedding, x, repeats=flags.repeats) / TURNS
        held = slots * flags.new / 2 + slots / flags.group * flags.prompt
        reading = held * position / read
        turns[slots] = spent + reading
        show(
            case="turn",
            slots=slots,
            products_ms=spent * 1e3,
            least_products_ms=max(2 * weights * slots / full, 4 * weights / read) * 1e3,
            reading_ms=reading * 1e3,
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
