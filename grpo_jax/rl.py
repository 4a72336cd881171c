"""The RL stage: every method of the paradigm by one loop (DeepSeekMath, Algorithm 1).

Where the method iterates, for each iteration: π_ref ← π_θ, and the reward model r_φ is
trained on. One step:
1. the questions q of this step, by its number;
2. their prompts as token ids;
3. G outputs o_i of each, sampled from π_θ (which is π_old from here on) or from π_sft;
4. dispatched: log π_ref, for μ > 1 log π_old, PPO's values, and with max_staleness 1
   the next step's outputs (`pipeline.py`);
5. meanwhile on the host: rewards r_i, by the reward functions on the outputs' texts or
   by the reward model;
6. credit: Â of each token, as the method's row has it;
7. prompts and outputs packed into rows, several to a row;
8. μ compiled updates of π_θ;
9. metrics, and one group written down for the reader.
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

from grpo_jax import credit, lora, sharding
from grpo_jax.config import Config
from grpo_jax.credit import Output
from grpo_jax.errors import GrpoError
from grpo_jax.experience import Experience, outcome_metrics, read, show
from grpo_jax.methods import METHODS
from grpo_jax.model import Params
from grpo_jax.objectives import (
    Objective,
    dpo_objective,
    grpo_objective,
    ppo_objective,
    sft_objective,
)
from grpo_jax.packing import Batch, Sample, pack, unpack
from grpo_jax.pipeline import Pipeline
from grpo_jax.reward_model.judge import Judge, Judges, critic_of
from grpo_jax.reward_model.model import make_reward_scorer
from grpo_jax.rewards import Scores
from grpo_jax.run import Body, Preempted, Run, policy, run_stage
from grpo_jax.setup import adamw
from grpo_jax.update import make_scorer, make_step


def optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    """The policy's; PPO's critic has one of its own, with its own rate and clip."""
    o, own = config.optimizer, config.own()
    make = functools.partial(
        adamw,
        o,
        steps=config.rl_steps * own.get("updates_per_rollout", 1),
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
    )
    policy, rate = make(config.learning_rate)
    if METHODS[config.method].coefficient != "critic":
        return policy, rate
    critic, _ = make(own["value_learning_rate"] or 10 * config.learning_rate)

    def owner(params):
        labels = {
            name: jax.tree.map(lambda _: "policy", x) for name, x in params.items()
        }
        return labels | {"value": jax.tree.map(lambda _: "critic", params["value"])}

    return optax.partition({"policy": policy, "critic": critic}, owner), rate


def prepare(run: Run) -> tuple[Experience, Judges]:
    """Questions, rewards and labels: refused here, before any training."""
    experience = Experience(run)
    return experience, Judges(run, experience.questions)


def train(
    run: Run,
    instruct: Callable[[], Params],
    experience: Experience,
    judges: Judges,
) -> Params:
    """All RL steps, from wherever the work directory stands.

    `instruct` gives π_sft, where RL starts. With LoRA it is called only where RL has no
    checkpoint yet, and its parameters are donated: π_ref is the base of the state's.
    """
    config, own = run.config, run.config.own()
    method = METHODS[config.method]
    transformation, rate = optimizer(config)
    only_base = run.model.lora.rank and method.source == "policy" and not judges.needed
    sft = None if only_base else instruct()

    def start() -> Params:
        params = jax.tree.map(jnp.copy, sft) if sft else instruct()
        params = run.begin("rl", params)
        if method.coefficient == "critic":
            value = run.new_reward_model(run.key("critic", 0), params)
            params = {**params, "value": value}
        return params

    iterations = own.get("iterations", 1)
    reference, params = sft, None
    for i in range(iterations):
        if i + 1 < iterations and run.has_reference(i + 1):
            continue  # done before the run was resumed
        if i and params is not None:
            reference = run.save_reference(i, params)
        elif i:
            reference = run.load_reference(i)
        until = config.rl_steps * (i + 1) // iterations
        judge = judges(i, reference)
        stale = own.get("max_staleness", 0)
        pipeline = Pipeline(experience, staleness=stale, until=until)
        body = functools.partial(
            make_body, run, pipeline, judge, sft, reference, transformation, rate
        )
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
    return policy(params)


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
    """One step of the method, compiled: (step, state) → (state, metrics)."""
    config, own, experience = run.config, run.config.own(), pipeline.experience
    method = METHODS[config.method]
    critic = method.coefficient == "critic"
    updates, kl_coef = own.get("updates_per_rollout", 1), own.get("kl_coef", 0.0)
    in_loss = kl_coef if method.loss == "grpo" else 0.0
    every = in_loss or own.get("entropy_coef") or method.loss in ("ppo", "dpo")
    update = make_step(
        make_objective(run),
        transformation,
        has_signal=has_tokens if every else has_advantages,
        state_shardings=shardings,
    )
    log_probabilities = make_scorer(run.model, temperature=config.temperature)
    all_values = make_reward_scorer(critic_of(run))
    lay_out = Layout(run, together=2 if method.coefficient == "pairs" else 1)

    def frozen(state):  # π_ref
        return lora.base(state.params) if reference is None else reference

    def passes(state, batch) -> Passes:
        once = functools.partial(sharding.one_at_a_time, run.mesh)
        return Passes(
            old=once(log_probabilities(state.params, batch)) if updates > 1 else None,
            ref=once(log_probabilities(frozen(state), batch)) if kl_coef else None,
            values=once(all_values(state.params["value"], batch)) if critic else None,
        )

    # A batch of all outputs has the same rows whatever they will be worth.
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
        return credit.outcome(
            outputs,
            scores,
            experience.rewards.all_weights,
            g,
            scale=own["advantage_scale"],
            baseline=own["advantage_baseline"],
            each=own["reward_normalization"] == "each",
        )

    def body(step, state):
        started = time.perf_counter()
        sampler = sft if method.source == "instruct" else state.params
        assert sampler is not None
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
        # What has no gradient costs no pass; the loss is divided as if it were there.
        kept = samples if every else [s for s in samples if credit.teaches(s)]
        batch = lay_out(kept, of=samples or [credit.masked(outputs[0].sample)])  # 7
        if not early:
            scored = passes(state, batch)
        ref = scored.ref if in_loss else None
        batch = dataclasses.replace(batch, old_logps=scored.old, ref_logps=ref)
        credited_at = time.perf_counter()
        metrics = {}
        for _ in range(updates):  # 8
            state, metrics = update(state, None, batch)
        metrics = jax.device_get(metrics)
        done = time.perf_counter()
        # A later policy is meant to have moved away from the sampler.
        if updates == 1 and not staleness:
            check_gap(metrics, config.optimizer.max_sampling_gap)
        metrics |= outcome_metrics(outputs, scores, config.group_size) | spent  # 9
        metrics |= {
            "learning_rate": float(rate(step * updates)),
            "samples/taught": float(len(kept)),
            "sampling/staleness": float(staleness),
            "sampling/occupancy": float(drawn.arrays["occupancy"]),
            "time/sample": sampled - started,  # what the host waited for
            "time/rewards": graded - sampled,
            "time/credit": credited_at - graded,
            "time/update": done - credited_at,
        }
        known = {"ref_logps": scored.ref, "old_logps": scored.old} if early else {}
        known = {k: x if x is None else by_output(x, outputs) for k, x in known.items()}
        show(run, step, outputs, scores.rewards, samples, **known)
        if config.eval.every and (step + 1) % config.eval.every == 0:
            metrics |= evaluate_now(run, state.params)
        return state, metrics

    return body


def make_objective(run: Run) -> Objective:
    """The loss of the method's row, on the run's model."""
    config, own = run.config, run.config.own()
    model, temperature = run.model, config.temperature
    loss = METHODS[config.method].loss
    if loss == "sft":
        return sft_objective(model, temperature=temperature, aggregate=own["aggregate"])
    if loss == "dpo":
        return dpo_objective(
            model,
            temperature=temperature,
            beta=own["dpo_beta"],
            length_normalized=own["length_normalized"],
        )
    names = ("clip_low", "clip_high", "aggregate", "entropy_coef", "importance_cap")
    names += ("delta", "kl_estimator", "importance", "surrogate", "kl_coef")
    options = {name: own[name] for name in names if name in own}
    if own["max_staleness"] and own["importance_cap"] is None:
        options["importance_cap"] = 2.0
    if own["aggregate"] == "constant":
        options["max_length"] = config.max_new_tokens
    if loss == "ppo":
        del options["kl_coef"]  # it is in the reward
        return ppo_objective(
            model,
            critic_of(run),
            value_clip=own["value_clip"],
            temperature=temperature,
            **options,
        )
    return grpo_objective(model, temperature=temperature, **options)


def has_tokens(batch: Batch) -> jax.Array:
    return batch.mask.any()


def has_advantages(batch: Batch) -> jax.Array:
    return (batch.mask & (batch.advantages != 0)).any()


def check_gap(metrics: dict[str, Any], limit: float) -> None:
    """Refuse to train on log-probabilities that are not the sampler's (fault 54)."""
    gap = float(metrics.get("sampling/sampling_logp_difference/mean", 0.0))
    if gap > limit:
        raise GrpoError(
            f"rl: sampler and trainer differ by {gap:.3f} nats a token on average, "
            f"over optimizer.max_sampling_gap {limit:g}; the last checkpoint stands. "
            "Compute in float32, or raise the limit"
        )


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a step needs to know beside the rewards, [A, B, T]; maybe on its way."""

    old: Any = None  # log π_old
    ref: Any = None  # log π_ref
    values: Any = None  # V(s_t)


def by_output(values: Any, outputs: Sequence[Output]) -> list[np.ndarray]:
    """What a pass over all outputs says of each output's own tokens."""
    samples = [o.sample for o in outputs]
    found = unpack(sharding.to_hosts(values), samples, share_prompts=True)
    return [x[-len(o.tokens) :] for o, x in zip(outputs, found, strict=True)]


class Layout:
    """Samples → one packed batch of the run's one shape, on the mesh.

    together: 2 for pairs, which then have a row of twice the length.
    """

    def __init__(self, run: Run, together: int = 1):
        config, self.together = run.config, together
        longest = config.data.max_prompt_tokens + config.max_new_tokens
        self.length = together * (config.optimizer.row_length or longest)
        rows = max(1, config.optimizer.micro_rows // together)
        self.rows = rows * sharding.rows_multiple(run.mesh)
        outputs = config.questions_per_step * config.group_size
        self.capacity = -(-outputs // (together * self.rows))
        self.place = sharding.batch_placer(run.mesh)

    def __call__(
        self, samples: Sequence[Sample], of: Sequence[Sample] | None = None
    ) -> Batch:
        batch = pack(
            samples,
            length=self.length,
            rows=self.rows,
            share_prompts=True,
            together=self.together,
            of=of,
        )
        return self.place(batch.with_capacity(self.capacity))


def evaluate_now(run: Run, params: Params) -> dict[str, float]:
    """Greedy accuracy on the first set of the comparison, and what it took."""
    from grpo_jax import evaluate

    started = time.perf_counter()
    name = evaluate.set_names(run.config)[0]
    try:
        result = evaluate.evaluate_set(run, params, name, sampled=False)
    except Preempted:  # the step is done: its loop saves it and stops
        return {}
    return {
        f"eval/{name}/greedy_accuracy": result["greedy"]["accuracy"],
        "time/eval": time.perf_counter() - started,
    }
