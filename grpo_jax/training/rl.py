"""The RL stage: one loop for every method (DeepSeekMath, Algorithm 1 and section 5.2).

An iterative method sets π_ref ← π_θ at the start of each iteration and continues to
train the reward model r_φ. With `config.census` the stage begins with the census of its
questions. `rl_step.py` tells one step of the loop in numbered steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.distributed import sharding
from grpo_jax.models import lora
from grpo_jax.models.decoder import Params
from grpo_jax.training.optimizers import rl_optimizer
from grpo_jax.training.reward_model.iterations import RewardModelIterations
from grpo_jax.training.rl_programs import make_programs
from grpo_jax.training.rl_step import RlStep, on_device
from grpo_jax.training.rollout_pipeline import RolloutPipeline
from grpo_jax.training.rollouts import RolloutSource
from grpo_jax.training.run import Run, policy_params, run_stage
from grpo_jax.training.run_census import FOLDER, check_census, run_census
from grpo_jax.training.run_comparison import evaluate_policy
from grpo_jax.training.train_step import TrainState


def prepare_rl(run: Run) -> tuple[RolloutSource, RewardModelIterations]:
    """Returns the run's source of rollouts and its reward models, both checked.

    Call it before any training, so that bad data or settings fail at the start.

    Raises:
      GrpoError: the questions, reward functions or labels cannot be used.
    """
    if run.config.census:
        check_census(run.config)
    source = RolloutSource(run)
    return source, RewardModelIterations(run, source.questions)


def train_rl(
    run: Run,
    instruct: Callable[[], Params],
    source: RolloutSource,
    reward_models: RewardModelIterations,
) -> tuple[Params, Params]:
    """Runs the RL steps that the work directory does not have yet.

    Args:
      run: the run.
      instruct: returns π_sft; the RL stage may donate its buffers. If π_ref is the
        base of LoRA's adapters, it is called only where RL has no checkpoint yet.
      source: samples and scores the rollouts; from `prepare_rl`.
      reward_models: from `prepare_rl`.

    Returns:
      (π_sft, π_θ) after the last step. π_sft is in the dtype of the computation.

    Raises:
      GrpoError: the gradient or the sampling gap is out of bounds.
      Preempted: the run was asked to stop, and its state is saved.
    """
    config, values = run.config, run.config.method_values()
    method = METHODS[config.method]
    optimizer, learning_rate = rl_optimizer(config)
    needs_sft = method.source != "policy" or reward_models.needed
    only_base = run.model.lora.rank and not needs_sft
    initial = None if only_base else instruct()  # until RL has its own parameters
    sft = None if initial is None else freeze_params(run, initial)
    if config.census:
        initial = instruct() if initial is None else initial
        run.recorder.begin()
        source.keep_questions(run_census(run, initial, run.workdir / FOLDER))

    def start() -> Params:
        nonlocal initial
        params, initial = initial, None
        params = run.begin("rl", instruct() if params is None else params)
        if method.coefficient == "critic":
            value = run.new_reward_model(run.key("critic", 0), params)
            params = {**params, "value": value}
        return params

    def evaluate(step: int, state: TrainState) -> Mapping[str, float]:
        every = config.eval.every
        return {} if not every or step % every else evaluate_policy(run, state.params)

    iterations = values.get("iterations", 1)
    reference, params = sft, None
    for i in range(iterations):
        if i + 1 < iterations and run.has_reference(i + 1):
            continue  # done before the run was resumed
        policy = initial
        if i:
            policy = params or run.load_reference(i)
            if params is not None:
                run.save_reference(i, params)
            reference = freeze_params(run, policy)
        scorer = reward_models(i, policy)
        policy = None
        until = config.rl_steps * (i + 1) // iterations
        pipeline = RolloutPipeline(
            source, staleness=values.get("max_staleness", 0), until=until
        )

        def make_step(
            shardings, pipeline=pipeline, scorer=scorer, reference=reference
        ) -> RlStep:
            nonlocal initial
            initial = None  # a resumed stage has not taken it
            programs = make_programs(config, run.model, optimizer, shardings)
            return RlStep(
                run, pipeline, scorer, sft, reference, programs, learning_rate
            )

        params = run_stage(
            run,
            "rl",
            optimizer,
            start,
            make_step,
            steps=config.rl_steps,
            until=until,
            keep=pipeline.pending_state,
            resume=pipeline.restore_pending,
            evaluate=evaluate,
        )
    assert params is not None
    params = policy_params(params)
    return lora.base_params(params) if sft is None else on_device(run, sft), params


def freeze_params(run: Run, params: Params) -> Params:
    """Returns a copy of parameters that are only read.

    The copy has the dtype of the computation, which would cast it anyway. It is in
    host memory if `model.reference_memory` says so.
    """
    kept = jax.tree.map(lambda x: jnp.array(x, run.model.dtype), params)
    return sharding.move_to_memory(kept, run.config.model.reference_memory)
