"""A run and the loop that its stages share.

`Run` holds what every stage needs: config, work directory, mesh, model, tokenizer.
`run_stage` is the loop of SFT, reward-model and RL stages: it resumes, steps, records,
saves and stops. `load_run` opens the model of a run that is there already.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from grpo_jax.checkpoints.run_checkpoints import CheckpointDirectory
from grpo_jax.config import Config
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes, sharding
from grpo_jax.distributed.progress import progress_bar
from grpo_jax.errors import GrpoError, Preempted
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training import setup
from grpo_jax.training.batch import Batch
from grpo_jax.training.diagnosis import Diagnosis, find_small_rate
from grpo_jax.training.metrics_writer import Recorder, json_values
from grpo_jax.training.objectives import Objective
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.start_time import start_time
from grpo_jax.training.train_step import TrainState, make_step
from grpo_jax.training.work_directory import WorkDirectoryClaim, read_config

StepFunction = Callable[[int, TrainState], tuple[TrainState, Mapping[str, Any]]]
STAGES = {"sft": "sft_steps", "rl": "rl_steps"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    model: Decoder
    tokenizer: Tokenizer
    recorder: Recorder
    claim: WorkDirectoryClaim

    def key(self, stage: str, step: int) -> jax.Array:
        """Returns the random key of a stage's step; see `setup.make_step_key`."""
        return setup.make_step_key(self.config.seed, stage, step)

    @functools.cached_property
    def prompt_options(self) -> dict[str, str]:
        """The template and instruction with which prompts are encoded."""
        data = self.config.data
        return {"template": data.template, "instruction": data.instruction}

    def checkpoints(self, stage: str, *, clean: bool = True) -> CheckpointDirectory:
        """Returns a stage's checkpoints, as a context manager."""
        return CheckpointDirectory(
            self.workdir / "checkpoints" / stage,
            every=self.config.checkpoint_every,
            keep=self.config.checkpoints_kept,
            clean=clean,
            objection=functools.partial(self.claim.objection, stage),
        )

    def begin(self, stage: str, params: Params) -> Params:
        """Returns a stage's first parameters; with LoRA, they have fresh adapters.

        The buffers of the given parameters are donated.
        """
        if not self.model.lora.rank:
            return params
        key = self.key("init", 1 + list(STAGES).index(stage))
        make = functools.partial(lora.begin_stage, self.model.lora)
        return setup.make_on_mesh(self.mesh, make, params, key, donate_argnums=0)

    def abstract_state(
        self, stage: str, optimizer: optax.GradientTransformation
    ) -> TrainState:
        """Returns a stage's training state as shapes, dtypes and shardings."""
        return setup.abstract_state(
            self.config, self.model, self.mesh, stage, optimizer
        )

    def new_reward_model(self, key: jax.Array, params: Params) -> Params:
        """Returns a new reward model, or PPO's critic, with a policy's trunk."""

        def init(params):
            base = lora.merge_lora(self.model.lora, params)
            return RewardModel(self.model).init(key, base)

        return setup.make_on_mesh(self.mesh, init, params)

    def is_finished(self, stage: str) -> bool:
        """Returns whether a stage has a finished checkpoint."""
        if not (self.workdir / "checkpoints" / stage).is_dir():
            return False
        with self.checkpoints(stage, clean=False) as checkpoints:
            return bool(checkpoints.steps())

    # The π_ref of each iteration of an iterative method (section 4.1.4).

    def has_reference(self, iteration: int) -> bool:
        """Returns whether the π_ref of an iteration is saved."""
        return self.is_finished(f"reference-{iteration}")

    def load_reference(self, iteration: int) -> Params:
        """Returns the saved π_ref of an iteration."""
        params = setup.abstract_params(self.config, self.model, "rl")
        like = sharding.abstract_arrays(params, self.mesh)
        with self.checkpoints(f"reference-{iteration}") as checkpoints:
            return checkpoints.restore(like)[1]

    def save_reference(self, iteration: int, params: Params) -> None:
        """Saves an iteration's π_ref."""
        stage = f"reference-{iteration}"
        with self.checkpoints(stage) as checkpoints:
            checkpoints.save(iteration, params, self.claim.origin(stage), force=True)


def run_stage(
    run: Run,
    stage: str,
    optimizer: optax.GradientTransformation,
    start_params: Callable[[], Params],
    make_step_function: Callable[[Any], StepFunction],
    *,
    steps: int,
    until: int | None = None,
    keep: Callable[[], Mapping[str, Any]] = dict,
    resume: Callable[[Mapping[str, Any]], None] = lambda kept: None,
    evaluate: Callable[[int, TrainState], Mapping[str, Any]] = lambda step, state: {},
) -> Params:
    """Runs a stage from its newest checkpoint, and returns its final parameters.

    Args:
      run: the run.
      stage: the name under which checkpoints and metrics are kept.
      optimizer: the stage's optimiser.
      start_params: returns the first parameters, whose buffers are donated. Called
        only where the stage has no checkpoint yet.
      make_step_function: takes the shardings of the state and returns the step,
        (step, state) → (state, metrics).
      steps: the steps of the whole stage.
      until: stop before this step, to be called again later; None runs all steps.
      keep: returns JSON values that are saved with a checkpoint.
      resume: gets the values of `keep` from the checkpoint that the stage resumes at.
      evaluate: returns further metrics of the state after so many steps. Where it is
        stopped, the step is saved, and the resumed run evaluates it.

    Raises:
      GrpoError: the gradient was not finite `optimizer.max_skipped` times in a row.
      Preempted: the run was asked to stop, and its state is saved.
    """
    abstract = run.abstract_state(stage, optimizer)
    shardings = sharding.shardings(abstract, run.mesh)
    end = steps if until is None else until
    unwritten: dict[str, Any] = {}  # metrics of a step whose evaluation was stopped

    def write(step: int, begin: float, metrics: Mapping[str, Any]) -> bool:
        """Evaluates and writes a step; returns whether it was evaluated."""
        evaluated = evaluate(step, state)
        seconds = {"step_time": time.perf_counter() - begin}
        row = json_values({**metrics, **evaluated, **seconds})
        found = watch(row)
        if step == 1:
            small = find_small_rate(run.config, stage, state)
            found = "; ".join(filter(None, [small, found]))
        if found:
            processes.print_once(f"\n{stage} step {step}: {found}")
            row["diagnosis"] = found
        run.recorder.write(stage, step, row)
        return bool(evaluated)

    with run.checkpoints(stage) as checkpoints:
        if checkpoints.steps():
            done, state, kept = checkpoints.restore(abstract)
            resume(kept)
            unwritten = kept.get("unwritten", unwritten)
            if until is None or done < end:
                processes.print_once(f"{stage}: resumed at step {done} of {steps}")
        else:
            create = functools.partial(TrainState.create, optimizer=optimizer)
            create = jax.jit(create, out_shardings=shardings, donate_argnums=0)
            done, state = 0, create(start_params())
        run.recorder.forget_after(stage, done - bool(unwritten))
        watch = Diagnosis(run.config, stage)
        for row in run.recorder.rows(stage):
            watch(row)
        if unwritten:
            write(done, time.perf_counter() - unwritten.pop("step_time"), unwritten)
        if done >= end:
            return state.params
        take_step = make_step_function(shardings)
        with progress_bar(stage, done, steps) as bar:
            for step in range(done, end):
                begin = time.perf_counter()
                state, metrics = take_step(step, state)
                seconds = time.perf_counter() - begin
                _stop_if_broken(run, stage, step, state)
                metadata, evaluated = run.claim.origin(stage), False
                try:
                    evaluated = write(step + 1, begin, metrics)
                except Preempted:  # `checkpoints.is_preempted` says so too
                    kept = json_values({**metrics, "step_time": seconds})
                    metadata |= {"unwritten": kept}
                bar.set_postfix_str(_headline(metrics), refresh=False)
                bar.update()
                stop = checkpoints.is_preempted()
                force = stop or step + 1 == end
                saved = force or (step + 1) % run.config.checkpoint_every == 0
                if saved:
                    metadata |= keep()
                checkpoints.save(step + 1, state, metadata, force=force)
                if saved or evaluated:
                    run.recorder.write_report(last=force)
                if stop:
                    raise Preempted(f"{stage}: stopped after step {step + 1}")
        return state.params


def run_supervised_stage(
    run: Run,
    stage: str,
    optimizer: tuple[optax.GradientTransformation, Any],
    start_params: Callable[[], Params],
    objective: Objective,
    make_batch: Callable[[int], Batch],
    *,
    steps: int,
) -> Params:
    """Runs a stage that learns from given data; see `run_stage`.

    Args:
      run: the run.
      stage: the stage's name.
      optimizer: (optimiser, schedule: step → learning rate).
      start_params: returns the first parameters, whose buffers are donated.
      objective: the loss of a micro-batch.
      make_batch: returns a step's batch, on the host.
      steps: the steps of the whole stage.
    """
    transformation, rate = optimizer

    def make_step_function(shardings: Any) -> StepFunction:
        update = make_step(objective, transformation, state_shardings=shardings)
        place = sharding.batch_placer(run.mesh)

        def take_step(step, state):
            state, metrics = update(state, None, place(make_batch(step)))
            return state, jax.device_get(metrics) | {"learning_rate": float(rate(step))}

        return take_step

    return run_stage(
        run, stage, transformation, start_params, make_step_function, steps=steps
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    names = ("loss", "reward", "kl", "entropy")
    return " ".join(f"{n} {float(metrics[n]):.3f}" for n in names if n in metrics)


def _stop_if_broken(run: Run, stage: str, step: int, state: TrainState) -> None:
    limit = run.config.optimizer.max_skipped
    if int(state.skipped) >= limit:
        raise GrpoError(
            f"{stage}: step {step + 1}: the gradient was not finite {limit} times in a "
            "row (optimizer.max_skipped); the last checkpoint stands. Lower the "
            "learning rate, or compute in float32"
        )


def load_run(workdir: str | Path) -> tuple[Decoder, Params, Tokenizer]:
    """Returns a work directory's newest model: RL's if there is one, else SFT's.

    Args:
      workdir: the work directory of a run.

    Returns:
      (decoder, parameters, tokenizer), the parameters sharded over all devices.

    Raises:
      GrpoError: no work directory, or no finished checkpoint in it.
    """
    run = open_run(Path(workdir))
    return run.model, stage_params(run, newest_stage(run)), run.tokenizer


def open_run(workdir: Path) -> Run:
    """Returns the run of a work directory, for reading, on a mesh of all devices."""
    config = read_config(workdir)
    model, tokenizer = setup.make_model(config)
    tokenizer.now = start_time(workdir)
    mesh = sharding.make_mesh(fsdp=-1)
    claim = WorkDirectoryClaim(config, workdir, accept_changes=True)  # it is only read
    return Run(config, workdir, mesh, model, tokenizer, Recorder(workdir), claim)


def load_adapters(workdir: str | Path) -> tuple[lora.Lora, list[Params], str]:
    """Returns a run's LoRA adapters.

    Returns:
      (LoRA's settings, the adapters of each stage up to the newest, `model.path`).

    Raises:
      GrpoError: the run has no adapters, or no finished checkpoint.
    """
    run = open_run(Path(workdir))
    if not run.model.lora.rank:
        raise GrpoError(f"{workdir}: the run has no adapters (model.lora_rank is 0)")
    names = list(STAGES)[: 1 + list(STAGES).index(newest_stage(run))]
    trained = [name for name in names if getattr(run.config, STAGES[name])]
    adapters = [lora.split_adapters(stage_params(run, name))[0] for name in trained]
    return run.model.lora, adapters, run.config.model.path


def policy_params(params: Params) -> Params:
    """Returns the policy's part of a stage's parameters, without PPO's critic."""
    return {name: x for name, x in params.items() if name != "value"}


def newest_stage(run: Run) -> str:
    """Returns the last stage that has a finished checkpoint.

    Raises:
      GrpoError: no stage has one.
    """
    for stage in reversed(STAGES):
        if run.is_finished(stage):
            return stage
    raise GrpoError(f"{run.workdir}: it holds no finished checkpoint")


def stage_params(run: Run, stage: str) -> Params:
    """Returns the parameters of a stage's newest checkpoint."""
    optimizer, _ = stage_optimizer(stage, run.config)
    with run.checkpoints(stage, clean=False) as checkpoints:
        _, state, _ = checkpoints.restore(run.abstract_state(stage, optimizer))
    return policy_params(state.params)
