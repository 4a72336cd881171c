"""The reward stage: trains a reward model r_φ on step labels (section 4.1).

One step of the loop:
1. Take the labelled sequences that belong to the step's number.
2. Put their labels at the last token (outcome) or at each step's last token (process).
3. Pack them into rows, several to a row.
4. Update the parameters with one compiled program, on the cross-entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optax

from grpo_jax.config import OptimizerSettings
from grpo_jax.data import datasets
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.decoder import Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.optimizers import make_stage_optimizer
from grpo_jax.training.packing import pack
from grpo_jax.training.reward_model.labels import LabelledSequence
from grpo_jax.training.reward_model.scoring import reward_objective, reward_sample
from grpo_jax.training.run import Run, open_run, run_supervised_stage

KINDS = ("process", "outcome")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelTraining:
    """How a reward model is trained."""

    kind: str = "process"  # process: one label a step; outcome: the last one only
    steps: int = 500
    batch_size: int = 64  # sequences a step
    learning_rate: float = 2e-5  # the paper's
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine
    row_length: int = 0  # tokens of a packed row; 0 is the longest sequence
    micro_rows: int = 1  # rows in memory at a time
    shared: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)

    def optimizer(self) -> tuple[optax.GradientTransformation, Any]:
        """Returns (optimiser, learning-rate schedule)."""
        return make_stage_optimizer(
            self.shared,
            self.learning_rate,
            steps=self.steps,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
        )


def train_reward_model(
    run: Run,
    stage: str,
    start: Callable[[], Params],
    labelled: Sequence[LabelledSequence],
    settings: RewardModelTraining,
    *,
    seed: int | None = None,
) -> Params:
    """Runs the steps of a reward stage that the work directory does not have yet.

    Args:
      run: the run.
      stage: the name of its checkpoints and metrics, one for each time that a reward
        model is trained ("reward", "reward-2", …).
      start: returns the parameters to start from, whose buffers are donated: those of
        `RewardModel.init`, or of the iteration before.
      labelled: the training data.
      settings: how the model is trained.
      seed: of the batches' order; the run's by default.

    Returns:
      The reward model's parameters after the last step.

    Raises:
      GrpoError: there are fewer sequences than a batch, or one is longer than a row.
      Preempted: the run was asked to stop, and its state is saved.
    """
    samples = [sample_of(item, settings.kind) for item in labelled]
    seed = run.config.seed if seed is None else seed
    batches = datasets.Batches(samples, settings.batch_size, seed=seed)
    length = settings.row_length or max(len(item.tokens) for item in labelled)
    rows = settings.micro_rows * sharding.rows_multiple(run.mesh)
    capacity = -(-settings.batch_size // rows)

    def make_batch(step: int) -> Batch:
        batch = pack(batches[step], length=length, rows=rows)
        return batch.with_capacity(capacity)

    return run_supervised_stage(
        run,
        stage,
        settings.optimizer(),
        start,
        reward_objective(RewardModel(run.model)),
        make_batch,
        steps=settings.steps,
    )


def sample_of(item: LabelledSequence, kind: str) -> Sample:
    """Returns a labelled sequence as a sample for `pack`.

    Args:
      item: the sequence.
      kind: "process" for all its labels, "outcome" for the last one only.

    Raises:
      GrpoError: the kind is another one.
    """
    if kind not in KINDS:
        raise GrpoError(f"reward model: kind {kind!r} is not one of {', '.join(KINDS)}")
    item = item if kind == "process" else item.outcome()
    return reward_sample(item.tokens, item.ends, item.labels)


def load_reward_model(
    workdir: str | Path, stage: str = "reward"
) -> tuple[RewardModel, Params, Tokenizer]:
    """Returns the newest reward model of a work directory.

    Args:
      workdir: the work directory.
      stage: the reward stage, such as "reward-2".

    Returns:
      (reward model, parameters, tokenizer).

    Raises:
      GrpoError: no work directory, or no finished checkpoint of that stage in it.
    """
    run = open_run(Path(workdir))
    folder = run.workdir / "checkpoints" / stage
    if not run.is_finished(stage):
        raise GrpoError(
            f"{folder}: no such folder, or no finished checkpoint in it; train a "
            "reward model there first"
        )
    # All settings give a state of this shape.
    optimizer, _ = RewardModelTraining().optimizer()
    with run.checkpoints(stage, clean=False) as checkpoints:
        _, state, _ = checkpoints.restore(run.abstract_state(stage, optimizer))
    return RewardModel(run.model), state.params, run.tokenizer
