"""The reward stage: a reward model r_φ learns from step labels (section 4.1).

In: `Labelled` sequences, and parameters to start from. Out: parameters, after steps
that are checkpointed, resumed and written down as any stage's are.

One step:
1. the sequences of this step, by its number;
2. their labels at the last token (outcome) or at each step's last token (process);
3. packed into rows, several to a row;
4. one compiled update on the cross-entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from grpo_jax.config import OptimizerSettings
from grpo_jax.data import datasets
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models.decoder import Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.optimizers import adamw
from grpo_jax.training.packing import Sample, pack
from grpo_jax.training.reward_model.labelled import Labelled
from grpo_jax.training.reward_model.scoring import reward_objective, reward_sample
from grpo_jax.training.run import Body, Run, open_run, run_stage
from grpo_jax.training.train_step import make_step

KINDS = ("process", "outcome")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a reward model is trained."""

    kind: str = "process"  # process: a label a step; outcome: the last one alone
    steps: int = 500
    batch_size: int = 64  # sequences a step
    learning_rate: float = 2e-5  # the paper's
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine
    row_length: int = 0  # tokens of a packed row; 0 is the longest sequence
    micro_rows: int = 1  # rows in memory at a time
    shared: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)

    def optimizer(self) -> tuple[optax.GradientTransformation, Any]:
        return adamw(
            self.shared,
            self.learning_rate,
            steps=self.steps,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
        )


def train(
    run: Run,
    stage: str,
    start: Callable[[], Params],
    labelled: Sequence[Labelled],
    settings: Settings,
    *,
    seed: int | None = None,
) -> Params:
    """All steps of a reward stage, from wherever the work directory stands.

    Args:
      stage: the name of its checkpoints and metrics, one for each time that a reward
        model is trained ("reward", "reward-2", …).
      start: makes the parameters to start from, which are donated: `RewardModel.init`'s
        or those of the iteration before.
      seed: of the batches' order; the run's by default.

    Raises:
      GrpoError: fewer sequences than one batch; one that is longer than a row.
    """
    model = RewardModel(run.model)
    samples = [sample_of(item, settings.kind) for item in labelled]
    seed = run.config.seed if seed is None else seed
    batches = datasets.Batches(samples, settings.batch_size, seed=seed)
    length = settings.row_length or max(len(item.tokens) for item in labelled)
    rows = settings.micro_rows * sharding.rows_multiple(run.mesh)
    capacity = -(-settings.batch_size // rows)
    transformation, rate = settings.optimizer()

    def make_body(shardings: Any) -> Body:
        objective = reward_objective(model)
        update = make_step(objective, transformation, state_shardings=shardings)
        place = sharding.batch_placer(run.mesh)

        def body(step, state):
            batch = pack(batches[step], length=length, rows=rows)
            state, metrics = update(state, None, place(batch.with_capacity(capacity)))
            metrics = jax.device_get(metrics)
            return state, metrics | {"learning_rate": float(rate(step))}

        return body

    return run_stage(
        run,
        stage,
        transformation,
        start,
        make_body,
        steps=settings.steps,
    )


def sample_of(item: Labelled, kind: str) -> Sample:
    """A labelled sequence as `pack` takes it."""
    if kind not in KINDS:
        raise GrpoError(f"reward model: kind {kind!r} is not one of {', '.join(KINDS)}")
    item = item if kind == "process" else item.outcome()
    return reward_sample(item.tokens, item.ends, item.labels)


def load_reward_model(
    workdir: str | Path, stage: str = "reward"
) -> tuple[RewardModel, Params, Tokenizer]:
    """The newest reward model of a work directory.

    Raises:
      GrpoError: no work directory, or no finished checkpoint of that stage in it.
    """
    run = open_run(Path(workdir))
    folder = run.workdir / "checkpoints" / stage
    if not folder.is_dir():
        raise GrpoError(f"{folder}: no such folder; train a reward model there first")
    optimizer, _ = Settings().optimizer()  # its state has the same shape whatever it is
    with run.checkpoints(stage, clean=False) as checkpoints:
        if not checkpoints.steps():
            raise GrpoError(f"{folder}: no finished checkpoint in it")
        _, state, _ = checkpoints.restore(run.abstract_state(stage, optimizer))
    return RewardModel(run.model), state.params, run.tokenizer
