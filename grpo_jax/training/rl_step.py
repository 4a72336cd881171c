"""One step of the RL stage, for every method (DeepSeekMath, Algorithm 1).

1. Take the questions q that belong to the step's number.
2. Take their prompts as token ids.
3. Sample G outputs o_i of each question, from π_θ (which is π_old from here on) or from
   π_sft. With tools, `environments/tool_rollouts.py` runs the outputs' programs.
4. Dispatch log π_ref, log π_old where μ > 1, PPO's values, and with max_staleness 1
   the next step's outputs (`rollout_pipeline.py`).
5. Meanwhile, compute the rewards r_i on the host with the reward functions, or with the
   reward model.
6. Assign credit: Â of each token, as `algorithms/methods.py` defines it for the method
   and `credit.py` computes it. Truncated outputs may be masked (mask_truncated).
7. Pack prompts and outputs into rows, several to a row.
8. Update π_θ μ times with one compiled program.
9. Record the metrics, and one group of outputs for the reader.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.models import lora
from grpo_jax.models.decoder import Params
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.training import credit
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.credit import Output
from grpo_jax.training.packing import unpack
from grpo_jax.training.reward_model.iterations import OutputScorer
from grpo_jax.training.rl_programs import BatchLayout, Programs, needs_all_outputs
from grpo_jax.training.rollout_pipeline import RolloutPipeline
from grpo_jax.training.rollouts import outcome_metrics, read_outputs, write_sample_group
from grpo_jax.training.run import Run
from grpo_jax.training.train_step import TrainState

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ForwardPasses:
    """Forward passes over a step's batch, [A, B, T]; they may still be running."""

    old_logps: Any = None  # log π_old
    ref_logps: Any = None  # log π_ref
    values: Any = None  # V(s_t)
    outputs: Sequence[Output] = ()  # all outputs of the step, if the batch has them

    @functools.cached_property
    def by_output(self) -> dict[str, Any]:
        """Each output's part of the passes, on the host; {} for a part of the outputs.

        It waits for the passes.
        """
        known = {n: getattr(self, n) for n in ("old_logps", "ref_logps", "values")}
        return {
            name: None if x is None else by_output(x, self.outputs)
            for name, x in known.items()
            if self.outputs
        }


@dataclasses.dataclass
class RlStep:
    """The step as a function: (step number, state) → (state, metrics).

    Args:
      run: the run.
      pipeline: samples the rollouts.
      scorer: the reward model; None if the run needs none.
      sft: π_sft, frozen; None if nothing needs it.
      reference: π_ref, frozen; None takes the base of LoRA's adapters.
      programs: the compiled update and forward passes.
      learning_rate: the schedule, update → rate.
    """

    run: Run
    pipeline: RolloutPipeline
    scorer: OutputScorer | None
    sft: Params | None
    reference: Params | None
    programs: Programs
    learning_rate: Any

    def __post_init__(self):
        config = self.run.config
        self.method = METHODS[config.method]
        self.options = config.method_values()
        self.layout = BatchLayout(config, self.run.mesh)
        self.updates = self.options.get("updates_per_rollout", 1)  # μ
        self.kl_coef = self.options.get("kl_coef", 0.0)  # β
        self.kl_in_reward = bool(self.kl_coef) and self.method.kl == "reward"
        self.has_critic = self.method.coefficient == "critic"
        self.needs_all_outputs = needs_all_outputs(config)
        # A batch of all outputs has the same rows whatever their rewards will be. Its
        # forward passes run while the host grades.
        needed = self.kl_coef or self.updates > 1 or self.has_critic
        first = needed and self.needs_all_outputs and not self.pipeline.source.replaces
        self.passes_come_first = first

    def __call__(self, step: int, state: TrainState) -> tuple[TrainState, Metrics]:
        """Takes step number `step`; the state's buffers are donated."""
        clock, source = _Clock(), self.pipeline.source
        config = self.run.config
        sampler = state.params
        if self.method.source == "instruct":
            assert self.sft is not None
            sampler = on_device(self.run, self.sft)
        rollout, staleness = self.pipeline.take_rollout(step, sampler)  # 1, 2, 3
        outputs = read_outputs(rollout)
        clock.stop("time/sample")  # how long the host waited
        passes = ForwardPasses()
        if self.passes_come_first:  # 4
            batch = self.layout([o.sample for o in outputs])
            passes = self.run_passes(state, batch, outputs)
        self.pipeline.start_rollout(step + 1, sampler)
        outcome_scorer = self.scorer.outcome if self.scorer else None  # 5
        outputs, scores, sampling_metrics = source.score_rollout(
            step, outputs, sampler, outcome_scorer
        )
        clock.stop("time/rewards")
        samples = self.assign_credit(step, outputs, scores, passes)  # 6
        if self.options.get("mask_truncated"):
            pairs = zip(samples, outputs, strict=True)
            samples = [s if o.finished else credit.mask_sample(s) for s, o in pairs]
        batch, taught = self.pack(samples, outputs)  # 7
        if not self.passes_come_first:
            passes = self.run_passes(state, batch)
        clock.stop("time/credit")
        state, metrics = self.update(state, batch, passes)  # 8
        clock.stop("time/update")
        # After several updates, or with staleness, the policy has moved on purpose.
        if self.updates == 1 and not staleness:
            check_gap(metrics, config.optimizer.max_sampling_gap)
        metrics |= outcome_metrics(outputs, scores, config.group_size)  # 9
        metrics |= sampling_metrics | {
            "learning_rate": float(self.learning_rate(step * self.updates)),
            "samples/taught": float(taught),
            "sampling/staleness": float(staleness),
            "sampling/occupancy": float(rollout.arrays["occupancy"]),
            **clock.seconds,
        }
        known = passes.by_output
        if self.kl_in_reward:  # the loss has no KL term to report
            metrics["kl"] = mean_divergence(outputs, known["ref_logps"])
        logps = {name: known.get(name) for name in ("ref_logps", "old_logps")}
        write_sample_group(self.run, step, outputs, scores.rewards, samples, **logps)
        return state, metrics

    def run_passes(
        self, state: TrainState, batch: Batch, outputs: Sequence[Output] = ()
    ) -> ForwardPasses:
        """Dispatches the forward passes that the method needs.

        Args:
          state: the training state.
          batch: the packed batch.
          outputs: all outputs of the step, if they are what the batch holds.
        """
        programs = self.programs
        dispatch = functools.partial(sharding.wait_on_cpu_mesh, self.run.mesh)
        old = ref = values = None
        if self.updates > 1:
            old = dispatch(programs.score(state.params, batch))
        if self.kl_coef:
            if self.reference is None:
                params = lora.base_params(state.params)
            else:
                params = on_device(self.run, self.reference)
            ref = dispatch(programs.score(params, batch))
        if self.has_critic:
            values = dispatch(programs.value(state.params["value"], batch))
        return ForwardPasses(old, ref, values, outputs)

    def assign_credit(
        self,
        step: int,
        outputs: Sequence[Output],
        scores: RewardScores,
        passes: ForwardPasses,
    ) -> list[Sample]:
        """Returns the samples of a step, with Â as the method's row says it."""
        kind, options = self.method.coefficient, self.options
        rewards, group_size = scores.rewards, self.run.config.group_size
        if kind == "indicator":
            return credit.assign_indicator_credit(outputs, rewards)
        if kind == "pairs":
            rng = np.random.default_rng([self.run.config.seed, step])
            return credit.make_preference_pairs(outputs, rewards, group_size, rng)
        if kind == "process":
            assert self.scorer is not None
            return credit.assign_process_credit(
                outputs, *self.scorer.steps(outputs), group_size
            )
        ref = passes.by_output["ref_logps"] if self.kl_in_reward else None
        if kind == "critic":
            return credit.assign_critic_credit(
                outputs,
                rewards,
                passes.by_output["values"],
                ref,
                kl_coef=self.kl_coef,
                gamma=options["gae_gamma"],
                lam=options["gae_lambda"],
            )
        if kind == "returns":
            return credit.assign_return_credit(
                outputs, rewards, ref, kl_coef=self.kl_coef
            )
        if ref is not None:
            penalty = self.kl_coef * credit.log_ratio_sums(outputs, ref)
            scores = dataclasses.replace(scores, rewards=rewards - penalty)
        return credit.assign_outcome_credit(
            outputs,
            scores,
            self.pipeline.source.rewards.all_weights,
            group_size,
            scale=options["advantage_scale"],
            baseline=options["advantage_baseline"],
            each=options.get("reward_normalization") == "each",
        )

    def pack(
        self, samples: Sequence[Sample], outputs: Sequence[Output]
    ) -> tuple[Batch, int]:
        """Returns the packed batch on the mesh, and how many samples are in it.

        Samples without a gradient cost no pass, but count in the loss's divisor.
        """
        kept = samples
        if not self.needs_all_outputs:
            kept = [sample for sample in samples if credit.has_gradient(sample)]
        of = samples or [credit.mask_sample(outputs[0].sample)]
        return self.layout(kept, of=of), len(kept)

    def update(
        self, state: TrainState, batch: Batch, passes: ForwardPasses
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after μ updates, and the last one's metrics."""
        ref = None if self.kl_in_reward else passes.ref_logps
        batch = dataclasses.replace(batch, old_logps=passes.old_logps, ref_logps=ref)
        metrics: Metrics = {}
        for _ in range(self.updates):
            state, metrics = self.programs.update(state, None, batch)
        return state, jax.device_get(metrics)


class _Clock:
    """The seconds of each part of a step, one after the other."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def on_device(run: Run, params: Params) -> Params:
    """Returns frozen parameters in device memory, where programs can read them."""
    if run.config.model.reference_memory == "device":
        return params
    return sharding.move_to_memory(params, "device")


def mean_divergence(outputs: Sequence[Output], ref: Sequence[np.ndarray]) -> float:
    """Returns Σ log(π_θ/π_ref) over the sampled tokens, per token, in nats."""
    tokens = sum(sum(output.sampled) for output in outputs)
    return float(credit.log_ratio_sums(outputs, ref).sum()) / max(tokens, 1)


def check_gap(metrics: dict[str, Any], limit: float) -> None:
    """Checks that sampler and trainer agree on the sampled tokens' log-probabilities.

    Both have the same parameters here, so a large gap means that the trained policy is
    not the one that wrote the outputs.

    Args:
      metrics: a step's metrics.
      limit: the largest mean gap, in nats a token.

    Raises:
      GrpoError: the mean gap is above `limit`.
    """
    gap = float(metrics.get("sampling/sampling_logp_difference/mean", 0.0))
    if gap > limit:
        raise GrpoError(
            f"rl: sampler and trainer differ by {gap:.3f} nats a token on average, "
            f"over optimizer.max_sampling_gap {limit:g}; the last checkpoint stands. "
            "Compute in float32, or raise the limit"
        )


def by_output(values: Any, outputs: Sequence[Output]) -> list[np.ndarray]:
    """Returns each output's part of a forward pass over all outputs.

    Args:
      values: [A, B, T] of the batch in which all `outputs` are packed.
      outputs: the step's outputs.

    Returns:
      An array [C] for each output, C being the number of its tokens.
    """
    samples = [o.sample for o in outputs]
    found = unpack(sharding.fetch_to_hosts(values), samples, share_prompts=True)
    return [x[-len(o.tokens) :] for o, x in zip(outputs, found, strict=True)]
