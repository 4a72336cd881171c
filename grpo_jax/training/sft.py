"""The Instruct stage: supervised fine-tuning on worked examples (section 3).

One step of the loop:
1. Take the examples that belong to the step's number.
2. Encode prompt and solution as token ids; only the solution counts in the loss.
3. Pack them into rows, several to a row.
4. Update the parameters with one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import Config
from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_sft
from grpo_jax.distributed import processes, sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.decoder import Params
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.objectives import sft_objective
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.packing import pack
from grpo_jax.training.run import Run, run_supervised_stage


def train_sft(run: Run, start_params: Callable[[], Params]) -> Params:
    """Runs the SFT steps that the work directory does not have yet.

    Args:
      run: the run.
      start_params: returns the weights to start from, whose buffers are donated.
        Called only where the stage has no checkpoint yet.

    Returns:
      The parameters after the last step, π_sft.

    Raises:
      GrpoError: the data cannot be used, or the gradient was not finite too often.
      Preempted: the run was asked to stop, and its state is saved.
    """
    config = run.config
    examples = datasets.load_dataset(
        config.data.sft,
        "train",
        data_dir=config.data.dir or None,
        require=("solution",),
    )
    processes.check_equal("data.sft", {"rows": examples.digest})
    batches = SftBatches(run, leave_out_long(run, examples))
    return run_supervised_stage(
        run,
        "sft",
        stage_optimizer("sft", config),
        lambda: run.begin("sft", start_params()),
        sft_objective(run.model, aggregate=config.sft.aggregate),
        lambda step: pack_sft_batch(config, run.mesh, batches[step]),
        steps=config.sft_steps,
    )


def pack_sft_batch(
    config: Config, mesh: jax.sharding.Mesh, samples: list[Sample]
) -> Batch:
    """Packs samples into a batch on the host; every batch of a run has one shape."""
    settings = config.sft
    rows = settings.micro_rows * sharding.rows_multiple(mesh)
    capacity = -(-(settings.batch_rows or settings.batch_size) // rows)
    batch = pack(samples, length=settings.row_length, rows=rows)
    return batch.with_capacity(capacity)


class SftBatches:
    """The samples of every step, indexed by the step's number.

    A step has `sft.batch_size` examples, or, if `sft.batch_rows` is set, that many rows
    of examples concatenated at random (DeepSeekMath, section 3).
    """

    def __init__(self, run: Run, examples: Sequence[Example]):
        settings, seed = run.config.sft, run.config.seed
        self.run, self.examples = run, examples
        self.batches: datasets.Batches[Any]
        if settings.batch_rows:
            lengths = [len(encode_examples(run, [e])[0].tokens) - 1 for e in examples]
            rows = concatenate_into_rows(lengths, settings.row_length, seed)
            self.batches = datasets.Batches(rows, settings.batch_rows, seed=seed)
        else:
            self.batches = datasets.Batches(examples, settings.batch_size, seed=seed)
            # An example that is too long is refused now, not when its step comes.
            epoch = -(-len(examples) // settings.batch_size)
            for step in range(min(run.config.sft_steps, epoch)):
                encode_examples(
                    run, [e for e in self.batches[step] if may_be_long(run, e)]
                )

    def __getitem__(self, step: int) -> list[Sample]:
        chosen = self.batches[step]
        if self.run.config.sft.batch_rows:
            chosen = [self.examples[i] for row in chosen for i in row]
        return encode_examples(self.run, chosen)


def concatenate_into_rows(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """Concatenates items in random order into rows (DeepSeekMath, section 3).

    Args:
      lengths: tokens of each item.
      size: tokens that a row holds.
      seed: of the random order.

    Returns:
      The indices of the items in each row.

    >>> rows = concatenate_into_rows([3, 3, 3, 3], size=6, seed=0)
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


def leave_out_long(run: Run, examples: Sequence[Example]) -> Sequence[Example]:
    """Returns the examples of at most `sft.max_tokens` tokens.

    Raises:
      GrpoError: there is none.
    """
    limit = run.config.sft.max_tokens
    if not limit:
        return examples
    options = run.prompt_options
    kept = [
        e for e in examples if len(encode_sft(run.tokenizer, e, **options)[0]) <= limit
    ]
    if not kept:
        raise GrpoError(
            f"config.sft.max_tokens: {limit}; all {len(examples)} examples have more"
        )
    processes.print_once(
        f"sft: {len(examples) - len(kept)} of {len(examples)} examples have more than "
        f"sft.max_tokens {limit} tokens and are left out"
    )
    return kept


def may_be_long(run: Run, example: Example) -> bool:
    """Returns False if an example surely fits a row, without encoding it.

    Every token stands for at least one byte of text.
    """
    plain = run.prompt_options == {"template": "plain", "instruction": "none"}
    around = 8 if plain else 1024  # what a template and an instruction may add
    system = str(example.columns.get("system", ""))
    text = example.question + (example.solution or example.answer) + system
    return around + len(text.encode()) > run.config.sft.row_length


def encode_examples(run: Run, examples: list[Example]) -> list[Sample]:
    """Returns the examples' token ids with their loss masks.

    Raises:
      GrpoError: an example, which the message names, is longer than a row.
    """
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
