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
import numpy as np
import optax

from grpo_jax.config import Config
from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_sft
from grpo_jax.distributed import processes, sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.training.objectives import sft_objective
from grpo_jax.training.optimizers import sft_optimizer
from grpo_jax.training.packing import Batch, Sample, pack
from grpo_jax.training.run import Body, Run, run_stage
from grpo_jax.training.train_step import make_step


def train(run: Run, start_params: Callable[[], Params]) -> Params:
    """All SFT steps, from wherever the work directory stands.

    `start_params` makes the weights to start from, which are donated.
    """
    config = run.config
    examples = datasets.load(
        config.data.sft,
        "train",
        data_dir=config.data.dir or None,
        require=("solution",),
    )
    processes.agree("data.sft", {"rows": examples.digest})
    batches = Samples(run, examples)
    transformation, rate = sft_optimizer(config)

    def make_body(shardings) -> Body:
        update = make_update(config, run.model, transformation, shardings)
        place = sharding.batch_placer(run.mesh)

        def body(step, state):
            batch = lay_out(config, run.mesh, batches[step])
            state, metrics = update(state, None, place(batch))
            metrics = jax.device_get(metrics)
            return state, metrics | {"learning_rate": float(rate(step))}

        return body

    start = lambda: run.begin("sft", start_params())  # noqa: E731
    steps = config.sft_steps
    return run_stage(run, "sft", transformation, start, make_body, steps=steps)


def make_update(
    config: Config,
    model: Decoder,
    transformation: optax.GradientTransformation,
    shardings: Any,
) -> Any:
    """The compiled step: (state, None, batch) → (state, metrics)."""
    objective = sft_objective(model, aggregate=config.sft.aggregate)
    return make_step(objective, transformation, state_shardings=shardings)


def lay_out(config: Config, mesh: jax.sharding.Mesh, samples: list[Sample]) -> Batch:
    """Samples as a batch of the run's one shape, on the host."""
    settings = config.sft
    rows = settings.micro_rows * sharding.rows_multiple(mesh)
    capacity = -(-(settings.batch_rows or settings.batch_size) // rows)
    batch = pack(samples, length=settings.row_length, rows=rows)
    return batch.with_capacity(capacity)


class Samples:
    """The samples of every step: of batch_size examples, or of batch_rows rows."""

    def __init__(self, run: Run, examples: datasets.Dataset):
        settings, seed = run.config.sft, run.config.seed
        self.run, self.examples = run, examples
        self.rows: datasets.Batches[list[int]] | None = None
        if settings.batch_rows:
            lengths = [len(encode(run, [e])[0].tokens) - 1 for e in examples]
            rows = concatenate(lengths, settings.row_length, seed)
            self.rows = datasets.Batches(rows, settings.batch_rows, seed=seed)
        else:
            self.batches = datasets.Batches(examples, settings.batch_size, seed=seed)
            # All that the steps will take is refused now, not when its step comes.
            epoch = -(-len(examples) // settings.batch_size)
            for step in range(min(run.config.sft_steps, epoch)):
                encode(run, [e for e in self.batches[step] if may_be_long(run, e)])

    def __getitem__(self, step: int) -> list[Sample]:
        if self.rows is None:
            return encode(self.run, self.batches[step])
        numbers = [i for row in self.rows[step] for i in row]
        return encode(self.run, [self.examples[i] for i in numbers])


def concatenate(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """Items in a random order, put one after the other until a row is full (the paper).

    >>> rows = concatenate([3, 3, 3, 3], size=6, seed=0)
    >>> [len(row) for row in rows], sorted(i for row in rows for i in row)
    ([2, 2], [0, 1, 2, 3])
    """
    rows: list[list[int]] = []
    room = 0
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        if lengths[i] > room:
            rows.append([])
            room = size
        rows[-1].append(i)
        room -= lengths[i]
    return rows


def may_be_long(run: Run, example: Example) -> bool:
    """False where an example surely fits a row: a token has a byte of text, or more."""
    plain = (
        run.config.data.template == "plain" and run.config.data.instruction == "none"
    )
    around = 8 if plain else 1024  # what a template and an instruction may add
    system = str(example.columns.get("system", ""))
    text = example.question + (example.solution or example.answer) + system
    return around + len(text.encode()) > run.config.sft.row_length


def encode(run: Run, examples: list[Example]) -> list[Sample]:
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
