"""The Instruct stage: supervised fine-tuning on worked examples (section 3).

One step:
1. the examples of this step, by its number;
2. prompt and solution as token ids, the loss on the solution alone;
3. packed into rows, several to a row;
4. one compiled update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from grpo_jax import data, sharding
from grpo_jax.config import Config
from grpo_jax.errors import GrpoError
from grpo_jax.model import Params
from grpo_jax.packing import Sample, pack
from grpo_jax.prompts import encode_sft
from grpo_jax.run import Body, Run, run_stage
from grpo_jax.update import make_optimizer, make_step, sft_objective


def optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    o = config.optimizer
    return make_optimizer(
        config.sft.learning_rate,
        steps=config.sft_steps,
        schedule=config.sft.schedule,
        warmup_steps=config.sft.warmup_steps,
        b1=o.b1,
        b2=o.b2,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
    )


def train(run: Run, start_params: Callable[[], Params]) -> Params:
    """All SFT steps, from wherever the work directory stands."""
    config, settings = run.config, run.config.sft
    examples = data.load(
        config.data.sft,
        "train",
        data_dir=config.data.dir or None,
        require=("solution",),
    )
    batches = data.Batches(examples, settings.batch_size, seed=config.seed)
    rows = settings.micro_rows * sharding.rows_multiple(run.mesh)
    transformation, rate = optimizer(config)

    def make_body(shardings) -> Body:
        objective = sft_objective(run.model, aggregate=settings.aggregate)
        update = make_step(objective, transformation, state_shardings=shardings)
        place = sharding.batch_placer(run.mesh)

        def body(step, state):
            samples = encode(run, batches[step])
            batch = pack(samples, length=settings.row_length, rows=rows)
            batch = batch.with_capacity(-(-settings.batch_size // rows))
            state, metrics = update(state, None, place(batch))
            metrics = jax.device_get(metrics)
            return state, metrics | {"learning_rate": float(rate(step))}

        return body

    return run_stage(run, "sft", transformation, start_params, make_body)


def encode(run: Run, examples: list[data.Example]) -> list[Sample]:
    """Token ids with the loss mask; an example that fits no row is refused by name."""
    samples = []
    for example in examples:
        tokens, mask = encode_sft(run.tokenizer, example, **run.prompt_options)
        if len(tokens) - 1 > run.config.sft.row_length:
            raise GrpoError(
                f"data {example.id!r}: {len(tokens)} tokens are more than "
                f"sft.row_length {run.config.sft.row_length} holds; raise it or "
                "remove the row"
            )
        samples.append(Sample(tokens=tokens, mask=mask))
    return samples
