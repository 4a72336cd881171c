"""The RL stage: GRPO with outcome supervision (DeepSeekMath, section 4.1, Algorithm 1).

One step:
1. the questions q of this step, by its number;
2. their prompts as token ids;
3. G outputs o_i of each, sampled from π_θ (which is π_old from here on);
4. rewards r_i, by the reward functions, on the outputs' texts;
5. advantages Â_i within each group;
6. prompts and outputs packed into rows, several to a row;
7. for μ > 1: log π_old, and log π_ref once;
8. μ compiled updates of π_θ;
9. metrics, and one group written down for the reader.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import data, sharding
from grpo_jax.advantages import group_advantages
from grpo_jax.config import Config, reward_names, reward_weights
from grpo_jax.data import Example
from grpo_jax.errors import GrpoError
from grpo_jax.model import Params
from grpo_jax.packing import Batch, Sample, pack
from grpo_jax.prompts import encode_prompts
from grpo_jax.rewards import Calls, Scores, resolve, score
from grpo_jax.rollout import Rollouts, generate
from grpo_jax.run import Body, Run, run_stage
from grpo_jax.update import make_grpo_step, make_optimizer, make_scorer

Prompts = list[tuple[Example, list[int]]]


def optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    o = config.optimizer
    return make_optimizer(
        config.learning_rate,
        steps=config.rl_steps * config.of_method("updates_per_rollout"),
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
        b1=o.b1,
        b2=o.b2,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
    )


def prepare(run: Run) -> tuple[data.Batches, Rewards]:
    """The batches of questions and the rewards: refused here, before any training."""
    questions, config = load_questions(run), run.config
    batches = data.Batches(questions, config.questions_per_step, seed=config.seed)
    return batches, Rewards(config)


def train(
    run: Run, reference: Params, batches: data.Batches, rewards: Rewards
) -> Params:
    """All RL steps, from wherever the work directory stands; `reference` is π_ref."""
    config = run.config
    transformation, rate = optimizer(config)
    updates = config.of_method("updates_per_rollout")
    kl_coef = config.of_method("kl_coef")
    lay_out = Layout(run)

    def make_body(shardings) -> Body:
        update = make_grpo_step(
            run.model,
            transformation,
            state_shardings=shardings,
            temperature=config.temperature,
            **loss_options(config),
        )
        log_probabilities = make_scorer(run.model, temperature=config.temperature)

        def body(step, state):
            prompts = batches[step]  # 1, 2
            started = time.perf_counter()
            rollouts, texts = sample(run, state.params, prompts, step)  # 3
            sampled = time.perf_counter()
            scores = rewards(prompts, texts)  # 4
            advantages = np.asarray(  # 5
                group_advantages(
                    jnp.asarray(scores.rewards),
                    config.group_size,
                    scale=config.of_method("advantage_scale"),
                    baseline=config.of_method("advantage_baseline"),
                )
            )
            batch = lay_out(prompts, rollouts, advantages)  # 6
            scored = time.perf_counter()
            if updates > 1:  # 7
                # One program at a time: two that both wait for all devices of a CPU
                # mesh can starve each other.
                old = jax.block_until_ready(log_probabilities(state.params, batch))
                ref = log_probabilities(reference, batch) if kl_coef else None
                batch = dataclasses.replace(batch, old_logps=old, ref_logps=ref)
            metrics = {}
            for _ in range(updates):  # 8
                state, metrics = update(state, reference, batch)
            metrics = jax.device_get(metrics)
            done = time.perf_counter()
            if updates == 1:  # later updates are meant to move away from the sampler
                check_gap(metrics, config.optimizer.max_sampling_gap)
            metrics |= outcome_metrics(scores, rollouts, config.group_size)  # 9
            metrics |= {
                "learning_rate": float(rate(step * updates)),
                "time/sample": sampled - started,
                "time/reward": scored - sampled,
                "time/update": done - scored,
            }
            show(run, step, prompts, texts, scores.rewards, advantages)
            if config.eval.every and (step + 1) % config.eval.every == 0:
                metrics |= evaluate_now(run, state.params)
            return state, metrics

        return body

    return run_stage(run, "rl", transformation, lambda: reference, make_body)


def load_questions(run: Run) -> Prompts:
    """The RL questions with their prompts; those that are too long are counted."""
    config = run.config
    examples = data.load(
        config.data.train,
        "train",
        data_dir=config.data.dir or None,
        require=("answer",),
    )
    kept, dropped = encode_prompts(
        run.tokenizer,
        examples,
        limit=config.data.max_prompt_tokens,
        **run.prompt_options,
    )
    if dropped:
        print(
            f"rl: {dropped} of {dropped + len(kept)} questions are longer than "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} and left out"
        )
    return kept


def check_gap(metrics: dict[str, Any], limit: float) -> None:
    """Refuse to train on log-probabilities that are not the sampler's (fault 54)."""
    gap = float(metrics["sampling/sampling_logp_difference/mean"])
    if gap > limit:
        raise GrpoError(
            f"rl: sampler and trainer differ by {gap:.3f} nats a token on average, "
            f"over optimizer.max_sampling_gap {limit:g}; the last checkpoint stands. "
            "Compute in float32, or raise the limit"
        )


def loss_options(config: Config) -> dict[str, Any]:
    """The options of `grpo_loss` that the config or its method sets."""
    names = ("kl_coef", "clip_low", "clip_high", "delta")
    names += ("kl_estimator", "aggregate", "importance", "surrogate")
    options = {name: config.of_method(name) for name in names}
    if options["aggregate"] == "constant":
        options["max_length"] = config.max_new_tokens
    return options


def sample(
    run: Run, params: Params, prompts: Prompts, step: int
) -> tuple[Rollouts, list[str]]:
    """G outputs of each question, as arrays on the host and as texts."""
    rollouts = generate(
        run.model,
        params,
        [ids for _, ids in prompts],
        key=run.key("rl", step),
        samples=run.config.group_size,
        max_new_tokens=run.config.max_new_tokens,
        temperature=run.config.temperature,
        eos_id=run.tokenizer.eos_ids,
    )
    rollouts = jax.device_get(rollouts)
    outputs = zip(rollouts.tokens, rollouts.lengths, strict=True)
    return rollouts, [run.tokenizer.decode(o[:n].tolist()) for o, n in outputs]


class Rewards:
    """The reward functions that a config names, applied to groups of outputs."""

    def __init__(self, config: Config):
        self.functions = [resolve(name) for name in reward_names(config)]
        self.weights = reward_weights(config)
        self.group_size, self.timeout = config.group_size, config.rewards.timeout
        self.calls = Calls()

    def __call__(self, prompts: Prompts, texts: Sequence[str]) -> Scores:
        examples = [e for e, _ in prompts for _ in range(self.group_size)]
        names = {name for e in examples for name in e.columns}
        columns = {name: [e.columns.get(name) for e in examples] for name in names}
        columns["answer"] = [e.answer for e in examples]
        return score(
            self.functions,
            self.weights,
            [e.question for e in examples],
            texts,
            columns,
            timeout=self.timeout,
            calls=self.calls,
        )


class Layout:
    """Prompts and outputs → one packed batch of the run's one shape, on the mesh."""

    def __init__(self, run: Run):
        config = run.config
        longest = config.data.max_prompt_tokens + config.max_new_tokens
        self.length = config.optimizer.row_length or longest
        self.rows = config.optimizer.micro_rows * sharding.rows_multiple(run.mesh)
        self.group_size = config.group_size
        outputs = config.questions_per_step * config.group_size
        self.capacity = -(-outputs // self.rows)
        self.place = sharding.batch_placer(run.mesh)

    def __call__(self, prompts: Prompts, rollouts: Rollouts, advantages) -> Batch:
        samples = []
        for i, n in enumerate(rollouts.lengths):
            prompt = prompts[i // self.group_size][1]
            samples.append(
                Sample(
                    tokens=[*prompt, *rollouts.tokens[i, :n].tolist()],
                    mask=[0] * len(prompt) + [1] * int(n),
                    advantages=float(advantages[i]),
                    logps=[0.0] * len(prompt) + rollouts.logps[i, :n].tolist(),
                )
            )
        batch = pack(samples, length=self.length, rows=self.rows)
        return self.place(batch.with_capacity(self.capacity))


def outcome_metrics(
    scores: Scores, rollouts: Rollouts, group_size: int
) -> dict[str, float]:
    """Rewards and lengths of a step, under the names that TRL gave them."""
    groups = scores.rewards.reshape(-1, group_size)
    scored = ~np.isnan(groups)
    tied = [len(set(g[ok].tolist())) <= 1 for g, ok in zip(groups, scored, strict=True)]
    metrics = {
        "reward": _mean(scores.rewards),
        "reward_std": _mean([np.nanstd(g, ddof=1) for g in groups[scored.sum(1) > 1]]),
        "frac_reward_zero_std": float(np.mean(tied)),
        "completions/mean_length": float(rollouts.lengths.mean()),
        "completions/min_length": float(rollouts.lengths.min()),
        "completions/max_length": float(rollouts.lengths.max()),
        "completions/clipped_ratio": float(1 - rollouts.finished.mean()),
        "rewards/timeouts": float(scores.timeouts),
    }
    for name, values in scores.by_function.items():
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = (
            float(np.nanstd(values)) if len(values) else 0.0
        )
        metrics[f"rewards/{name}/failures"] = float(scores.failures[name])
    return metrics


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def show(run: Run, step: int, prompts, texts, rewards, advantages) -> None:
    """The first question's group into samples.jsonl."""
    example, g = prompts[0][0], run.config.group_size
    outputs = zip(texts[:g], rewards[:g], advantages[:g], strict=True)
    names = ("completion", "reward", "advantage")
    completions = [
        dict(zip(names, (text, *map(_number, numbers)), strict=True))
        for text, *numbers in outputs
    ]
    sample = {"question": example.question, "answer": example.answer}
    run.recorder.write_samples("rl", step + 1, {**sample, "completions": completions})


def _number(x: Any) -> float | None:
    return round(float(x), 4) if np.isfinite(x) else None


def evaluate_now(run: Run, params: Params) -> dict[str, float]:
    """Greedy accuracy on the first set of the comparison, and what it took."""
    from grpo_jax import evaluate

    started = time.perf_counter()
    name = evaluate.set_names(run.config)[0]
    result = evaluate.evaluate_set(run, params, name, sampled=False)
    return {
        f"eval/{name}/greedy_accuracy": result["greedy"]["accuracy"],
        "time/eval": time.perf_counter() - started,
    }
