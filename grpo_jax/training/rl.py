"""The RL stage: one loop for every method (DeepSeekMath, Algorithm 1 and section 5.2).

An iterative method sets π_ref ← π_θ at the start of each iteration and continues to
train the reward model r_φ. One step of the loop:
1. Take the questions q that belong to the step's number.
2. Take their prompts as token ids.
3. Sample G outputs o_i of each question, from π_θ (which is π_old from here on) or from
   π_sft. With tools, `environments/tool_rollouts.py` runs the outputs' programs.
4. Dispatch log π_ref, log π_old where μ > 1, PPO's values, and with max_staleness 1
   the next step's outputs (`rollout_pipeline.py`).
5. Meanwhile, compute the rewards r_i on the host with the reward functions, or with the
   reward model.
6. Assign credit: Â of each token, as `algorithms/methods.py` defines it for the method.
7. Pack prompts and outputs into rows, several to a row.
8. Update π_θ μ times with one compiled program.
9. Record the metrics, and one group of outputs for the reader.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import generations, set_names
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError, Preempted
from grpo_jax.models import lora
from grpo_jax.models.decoder import Params
from grpo_jax.rewards.reward_functions import Scores
from grpo_jax.training import credit
from grpo_jax.training.compiled_steps import Layout, make_programs, teaches_all
from grpo_jax.training.credit import Output
from grpo_jax.training.optimizers import rl_optimizer
from grpo_jax.training.packing import Sample, unpack
from grpo_jax.training.reward_model.judge import Judge, Judges
from grpo_jax.training.rollout_pipeline import Pipeline
from grpo_jax.training.rollouts import Experience, outcome_metrics, read, show
from grpo_jax.training.run import Body, Run, policy, run_stage


def prepare(run: Run) -> tuple[Experience, Judges]:
    """Returns the run's questions and rewards, and its judges, all checked.

    Call it before any training, so that bad data or settings fail at the start.

    Raises:
      GrpoError: the questions, reward functions or labels cannot be used.
    """
    experience = Experience(run)
    return experience, Judges(run, experience.questions)


def train(
    run: Run,
    instruct: Callable[[], Params],
    experience: Experience,
    judges: Judges,
) -> tuple[Params, Params]:
    """Runs the RL steps that the work directory does not have yet.

    Args:
      run: the run.
      instruct: returns π_sft; the RL stage may donate its buffers. If π_ref is the
        base of LoRA's adapters, it is called only where RL has no checkpoint yet.
      experience: the questions and rewards of `prepare`.
      judges: the judges of `prepare`.

    Returns:
      (π_sft, π_θ) after the last step. π_sft is in the dtype of the computation.

    Raises:
      GrpoError: the gradient or the sampling gap is out of bounds.
      Preempted: the run was asked to stop, and its state is saved.
    """
    config, own = run.config, run.config.own()
    method = METHODS[config.method]
    transformation, rate = rl_optimizer(config)
    only_base = run.model.lora.rank and method.source == "policy" and not judges.needed
    given = [] if only_base else [instruct()]  # kept until RL has its own parameters
    sft = frozen(run, given[0]) if given else None

    def start() -> Params:
        params = run.begin("rl", given.pop() if given else instruct())
        if method.coefficient == "critic":
            value = run.new_reward_model(run.key("critic", 0), params)
            params = {**params, "value": value}
        return params

    iterations = own.get("iterations", 1)
    reference, params = sft, None
    for i in range(iterations):
        if i + 1 < iterations and run.has_reference(i + 1):
            continue  # done before the run was resumed
        begins = given[0] if given else None
        if i:
            begins = params or run.load_reference(i)
            if params is not None:
                run.save_reference(i, params)
            reference = frozen(run, begins)
        until = config.rl_steps * (i + 1) // iterations
        judge = judges(i, begins)
        begins = None
        stale = own.get("max_staleness", 0)
        pipeline = Pipeline(experience, staleness=stale, until=until)
        make = functools.partial(
            make_body, run, pipeline, judge, sft, reference, transformation, rate
        )

        def body(shardings, make=make):
            given.clear()
            return make(shardings)

        params = run_stage(
            run,
            "rl",
            transformation,
            start,
            body,
            steps=config.rl_steps,
            until=until,
            keep=pipeline.keep,
            resume=pipeline.resume,
        )
    assert params is not None
    params = policy(params)
    return lora.base(params) if sft is None else on_device(run, sft), params


def frozen(run: Run, params: Params) -> Params:
    """Returns a copy of parameters that are only read.

    The copy has the dtype of the computation, which would cast it anyway. It is in
    host memory if `model.reference_memory` says so.
    """
    kept = jax.tree.map(lambda x: jnp.array(x, run.model.dtype), params)
    return sharding.move(kept, run.config.model.reference_memory)


def on_device(run: Run, params: Params) -> Params:
    """Returns the parameters in device memory, where programs can read them."""
    if run.config.model.reference_memory == "device":
        return params
    return sharding.move(params, "device")


def make_body(
    run: Run,
    pipeline: Pipeline,
    judge: Judge | None,
    sft: Params | None,
    reference: Params | None,
    transformation: optax.GradientTransformation,
    rate: Any,
    shardings: Any,
) -> Body:
    """Returns the step of the method's loop, with its compiled programs.

    Args:
      run: the run.
      pipeline: gives the rollouts.
      judge: the reward model; None if the run needs none.
      sft: π_sft, frozen; None if nothing needs it.
      reference: π_ref, frozen; None takes the base of LoRA's adapters.
      transformation: the optimiser.
      rate: the learning-rate schedule, update → rate.
      shardings: the shardings of the training state.

    Returns:
      (step, state) → (state, metrics).
    """
    config, own, experience = run.config, run.config.own(), pipeline.experience
    method = METHODS[config.method]
    critic = method.coefficient == "critic"
    updates, kl_coef = own.get("updates_per_rollout", 1), own.get("kl_coef", 0.0)
    in_loss = kl_coef if method.kl == "loss" else 0.0
    every = teaches_all(config)
    programs = make_programs(config, run.model, transformation, shardings)
    lay_out = Layout(config, run.mesh)

    def fixed(state):  # π_ref
        if reference is None:
            return lora.base(state.params)
        return on_device(run, reference)

    def passes(state, batch) -> Passes:
        once = functools.partial(sharding.one_at_a_time, run.mesh)
        return Passes(
            old=once(programs.score(state.params, batch)) if updates > 1 else None,
            ref=once(programs.score(fixed(state), batch)) if kl_coef else None,
            values=once(programs.value(state.params["value"], batch))
            if critic
            else None,
        )

    # A batch of all outputs has the same rows whatever their rewards will be, so its
    # forward passes can run while the host grades.
    early = (kl_coef or updates > 1 or critic) and every and not experience.replaces

    def credited(step, outputs, scores: Scores, scored: Passes) -> list[Sample]:
        rewards, g = scores.rewards, config.group_size
        if method.coefficient == "indicator":
            return credit.indicator(outputs, rewards)
        if method.coefficient == "pairs":
            rng = np.random.default_rng([config.seed, step])
            return credit.pairs(outputs, rewards, g, rng)
        if method.coefficient == "process":
            assert judge is not None
            ends, worth = judge.steps(outputs)
            return credit.process(outputs, ends, worth, g)
        if critic:
            return credit.critic(
                outputs,
                rewards,
                by_output(scored.values, outputs),
                by_output(scored.ref, outputs) if kl_coef else None,
                kl_coef=kl_coef,
                gamma=own["gae_gamma"],
                lam=own["gae_lambda"],
            )
        ref = by_output(scored.ref, outputs) if kl_coef and not in_loss else None
        if method.coefficient == "returns":
            return credit.returns(outputs, rewards, ref, kl_coef=kl_coef)
        if ref is not None:
            penalty = kl_coef * credit.divergence(outputs, ref)
            scores = dataclasses.replace(scores, rewards=rewards - penalty)
        return credit.outcome(
            outputs,
            scores,
            experience.rewards.all_weights,
            g,
            scale=own["advantage_scale"],
            baseline=own["advantage_baseline"],
            each=own.get("reward_normalization") == "each",
        )

    def body(step, state):
        started = time.perf_counter()
        sampler = state.params
        if method.source == "instruct":
            assert sft is not None
            sampler = on_device(run, sft)
        outcome = judge.outcome if judge else None
        drawn, staleness = pipeline.take(step, sampler)  # 1, 2, 3
        outputs = read(drawn)
        sampled = time.perf_counter()
        scored = Passes()
        if early:  # 4
            scored = passes(state, lay_out([o.sample for o in outputs]))
        pipeline.start(step + 1, sampler)
        outputs, scores, spent = experience.grade(step, outputs, sampler, outcome)  # 5
        graded = time.perf_counter()
        samples = credited(step, outputs, scores, scored)  # 6
        if own.get("mask_truncated"):
            samples = [
                s if o.finished else credit.masked(s)
                for s, o in zip(samples, outputs, strict=True)
            ]
        # Samples without a gradient cost no pass, but count in the loss's divisor.
        kept = samples if every else [s for s in samples if credit.teaches(s)]
        batch = lay_out(kept, of=samples or [credit.masked(outputs[0].sample)])  # 7
        if not early:
            scored = passes(state, batch)
        ref = scored.ref if in_loss else None
        batch = dataclasses.replace(batch, old_logps=scored.old, ref_logps=ref)
        credited_at = time.perf_counter()
        metrics = {}
        for _ in range(updates):  # 8
            state, metrics = programs.update(state, None, batch)
        metrics = jax.device_get(metrics)
        done = time.perf_counter()
        # After several updates, or with staleness, the policy has moved on purpose.
        if updates == 1 and not staleness:
            check_gap(metrics, config.optimizer.max_sampling_gap)
        metrics |= outcome_metrics(outputs, scores, config.group_size) | spent  # 9
        metrics |= {
            "learning_rate": float(rate(step * updates)),
            "samples/taught": float(len(kept)),
            "sampling/staleness": float(staleness),
            "sampling/occupancy": float(drawn.arrays["occupancy"]),
            "time/sample": sampled - started,  # how long the host waited
            "time/rewards": graded - sampled,
            "time/credit": credited_at - graded,
            "time/update": done - credited_at,
        }
        if kl_coef and not in_loss:  # the loss has no KL term to report
            moved = credit.divergence(outputs, by_output(scored.ref, outputs)).sum()
            metrics["kl"] = float(moved) / max(sum(sum(o.sampled) for o in outputs), 1)
        known = {"ref_logps": scored.ref, "old_logps": scored.old} if early else {}
        known = {k: x if x is None else by_output(x, outputs) for k, x in known.items()}
        show(run, step, outputs, scores.rewards, samples, **known)
        if config.eval.every and (step + 1) % config.eval.every == 0:
            metrics |= evaluate_now(run, state.params)
        return state, metrics

    return body


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


@dataclasses.dataclass(frozen=True)
class Passes:
    """Forward passes over a step's batch, [A, B, T]; they may still be running."""

    old: Any = None  # log π_old
    ref: Any = None  # log π_ref
    values: Any = None  # V(s_t)


def by_output(values: Any, outputs: Sequence[Output]) -> list[np.ndarray]:
    """Returns each output's part of a forward pass over all outputs.

    Args:
      values: [A, B, T] of the batch in which all `outputs` are packed.
      outputs: the step's outputs.

    Returns:
      An array [C] for each output, C being the number of its tokens.
    """
    samples = [o.sample for o in outputs]
    found = unpack(sharding.to_hosts(values), samples, share_prompts=True)
    return [x[-len(o.tokens) :] for o, x in zip(outputs, found, strict=True)]


def evaluate_now(run: Run, params: Params) -> dict[str, float]:
    """Returns greedy accuracy on the comparison's first set, and the seconds taken."""
    from grpo_jax.evaluation import comparison
    from grpo_jax.training import run_comparison

    started = time.perf_counter()
    name = set_names(run.config)[0]
    try:
        result = run_comparison.evaluate_set(run, params, name, sampled=False)
    except Preempted:  # the step is complete; the loop will save it and stop
        return {}
    mode = "tool" if generations(run.config) else "cot"
    greedy = result[comparison.measure_name(mode, "greedy")]
    found = {f"eval/{name}/greedy_accuracy": greedy["accuracy"]}
    if mode == "tool":
        found[f"eval/{name}/program_accuracy"] = greedy["program"]["accuracy"]
    return found | {"time/eval": time.perf_counter() - started}
