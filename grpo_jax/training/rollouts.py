"""Experience: the outputs of a step and their rewards.

Samples G outputs o_i of each question and scores them (DeepSeekMath, Algorithm 1,
lines 6 to 8), with DAPO's dynamic sampling (Yu et al. 2025) on request. There are three
parts, so that the device has work while the host decodes and grades: `draw` dispatches
the sampler, `read` waits for the outputs, and `Experience.grade` does the rest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import Config, generations
from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.distributed import processes, sharding
from grpo_jax.environments.interpreter import Interpreter
from grpo_jax.environments.tool_rollouts import most_tokens, solve, text_of
from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate
from grpo_jax.models.decoder import Params
from grpo_jax.rewards import answers
from grpo_jax.rewards.reward_functions import (
    Scores,
)
from grpo_jax.training.batch import Sample
from grpo_jax.training.credit import Output
from grpo_jax.training.run import Run
from grpo_jax.training.run_rewards import Rewards

Prompts = list[tuple[Example, list[int]]]
# outputs → the reward model's score of each, [N]
Judge = Callable[[Sequence[Output]], np.ndarray]


def load_questions(run: Run) -> Prompts:
    """Returns the RL questions with their prompts' token ids.

    Questions longer than `data.max_prompt_tokens` are left out, and their number is
    printed.
    """
    config = run.config
    examples = datasets.load(
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
        processes.say(
            f"rl: {dropped} of {dropped + len(kept)} questions are longer than "
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} and left out"
        )
    asked = [ids for _, ids in kept]
    processes.agree("data.train", {"rows": examples.digest, "prompts": asked})
    return kept


def check_rows(config: Config, prompt: int) -> None:
    """Checks that a packed row holds the longest prompt with the longest output.

    Args:
      config: the run's config; with tools, an output includes what programs print.
      prompt: tokens of the longest prompt.

    Raises:
      GrpoError: `optimizer.row_length` is too small.
    """
    row, most = config.optimizer.row_length, config.max_new_tokens
    longest = prompt + most_tokens(generations(config), most) - 1
    if row and row < longest:
        output = f"an output of {most}"
        if turns := generations(config):
            output = f"{turns} generations with their outputs"
        raise GrpoError(
            f"config.optimizer.row_length: {row}; a prompt of {prompt} tokens and "
            f"{output} may take {longest}; raise it, or set 0"
        )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A step's G outputs of each question, side by side; they may still be sampled.

    Attributes:
      step: the step's number.
      prompts: the step's questions with their prompts.
      arrays: tokens and logps [N, C], lengths and finished [N], occupancy [], as in
        `Rollouts`; with tools also mask [N, C], calls and failures [N].
    """

    step: int
    prompts: Prompts
    arrays: dict[str, Any]


def draw(run: Run, params: Params, step: int, prompts: Prompts, key: jax.Array):
    """Dispatches the sampler at the run's temperature, and returns without waiting.

    Args:
      run: the run.
      params: the policy that samples.
      step: the step's number.
      prompts: the step's questions with their prompts.
      key: the random key of the rollout.

    Returns:
      The step's `Drawn`.
    """
    rollouts = generate(
        run.model,
        params,
        [ids for _, ids in prompts],
        key=key,
        samples=run.config.group_size,
        max_new_tokens=run.config.max_new_tokens,
        temperature=run.config.temperature,
        eos_id=run.tokenizer.eos_ids,
        slots=run.config.mesh.slots or None,
        cache_dtype=run.config.model.cache_dtype or None,
    )
    names = ("tokens", "logps", "lengths", "finished", "occupancy")
    arrays = {name: getattr(rollouts, name) for name in names}
    return Drawn(step, prompts, sharding.one_at_a_time(run.mesh, arrays))


def draw_with_tools(
    run: Run,
    interpreter: Interpreter,
    params: Params,
    step: int,
    prompts: Prompts,
    key: jax.Array,
) -> Drawn:
    """Samples outputs with tools; returns when they are done.

    It has to wait, since the outputs' programs run between the generations. Arguments
    as in `draw`; `interpreter` runs the programs.
    """
    found = solve(
        run.model,
        params,
        run.tokenizer,
        [ids for _, ids in prompts],
        interpreter=interpreter,
        key=key,
        samples=run.config.group_size,
        generations=generations(run.config),
        max_new_tokens=run.config.max_new_tokens,
        temperature=run.config.temperature,
        cache_dtype=run.config.model.cache_dtype or None,
        rows=run.config.tools.rows,
    )
    names = ("tokens", "logps", "mask", "lengths", "finished", "occupancy")
    arrays = {name: np.asarray(getattr(found, name)) for name in names}
    arrays["calls"] = np.array([len(calls) for calls in found.calls])
    failures = [sum(call.failed for call in calls) for calls in found.calls]
    return Drawn(step, prompts, arrays | {"failures": np.array(failures)})


def read(drawn: Drawn) -> list[Output]:
    """Waits for the outputs and returns them, not decoded to text yet."""
    arrays = sharding.to_hosts(drawn.arrays)
    samples = len(arrays["lengths"]) // len(drawn.prompts)
    outputs = []
    for i, n in enumerate(arrays["lengths"]):
        example, prompt = drawn.prompts[i // samples]
        outputs.append(
            Output(
                example=example,
                prompt=prompt,
                tokens=arrays["tokens"][i, :n].tolist(),
                logps=arrays["logps"][i, :n].tolist(),
                finished=bool(arrays["finished"][i]),
                **_of_tools(arrays, i, n),
            )
        )
    return outputs


def _of_tools(arrays: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    if "mask" not in arrays:
        return {}
    names = ("calls", "failures")
    counts = {name: int(arrays[name][i]) for name in names}
    return {"mask": arrays["mask"][i, :n].astype(int).tolist(), **counts}


class Experience:
    """Samples and scores the outputs of a step.

    The same step, parameters and seed give the same outputs.

    Raises:
      GrpoError: the questions or reward functions cannot be used, no sandbox works
        here and the run has tools, or the longest output fits no row.
    """

    def __init__(self, run: Run):
        self.run = run
        self.interpreter: Interpreter | None = None
        if generations(run.config):  # fails here if no sandbox works
            self.interpreter = Interpreter(run.config.tools.timeout)
        self.questions = load_questions(run)
        self.rewards = Rewards(run.config, [example for example, _ in self.questions])
        check_rows(run.config, max(len(ids) for _, ids in self.questions))
        size, seed = run.config.questions_per_step, run.config.seed
        own = run.config.own()
        # DAPO's dynamic sampling: each further rollout of a step asks other questions.
        attempts = 1 + own.get("dynamic_sampling", 0)
        self.replaces = attempts > 1
        self.batches = [
            datasets.Batches(self.questions, size, seed=seed + 7919 * i)
            for i in range(attempts)
        ]

    def draw(self, step: int, params: Params, round: int = 1) -> Drawn:
        """Samples a step's rollout from `params`: the first, or a further one."""
        key = self.run.key("rl", step)
        key = key if round == 1 else jax.random.fold_in(key, round)
        asked = params, step, self.batches[round - 1][step], key
        if self.interpreter is not None:
            return draw_with_tools(self.run, self.interpreter, *asked)
        return draw(self.run, *asked)

    def text(self, output: Output) -> str:
        """Returns an output's text, as the reward functions get it."""
        tokenizer = self.run.tokenizer
        if output.mask is None:
            return tokenizer.decode(output.tokens)
        return text_of(tokenizer, output.tokens, output.mask)

    def grade(
        self,
        step: int,
        outputs: Sequence[Output],
        params: Params,
        judge: Judge | None = None,
    ) -> tuple[list[Output], Scores, dict[str, float]]:
        """Scores a step's outputs; with dynamic sampling, replaces tied groups.

        A group is tied if all its outputs are right, or none is
        (`Rewards.correctness`). Tied groups are replaced by groups of at most
        `dynamic_sampling` further rollouts. If these do not suffice, tied groups fill
        the batch.

        Args:
          step: the step's number.
          outputs: the outputs of the step's first rollout, [N].
          params: the policy that samples further rollouts.
          judge: the reward model's outcome score; None for a run without one.

        Returns:
          (N outputs, their scores, metrics of the dynamic sampling).
        """
        config = self.run.config
        g, wanted = config.group_size, config.questions_per_step
        found: list[list[Output]] = []
        parts: list[Scores] = []
        spare: tuple[list[list[Output]], list[Scores]] = ([], [])
        rounds = 0
        for rounds in range(1, len(self.batches) + 1):
            if rounds > 1:
                outputs = read(self.draw(step, params, rounds))
            outputs, scores = self.score(outputs, judge)
            if not self.replaces:
                return outputs, scores, {}
            correct = self.rewards.correctness(scores)
            for start in range(0, len(outputs), g):
                group = range(start, start + g)
                tied = len(_values(correct[start : start + g])) < 2
                groups, kept = spare if tied else (found, parts)
                groups.append(outputs[start : start + g])
                kept.append(scores.take(group))
            if len(found) >= wanted:
                break
        tied_share = len(spare[0]) / max(len(spare[0]) + len(found), 1)
        found, parts = [*found, *spare[0]][:wanted], [*parts, *spare[1]][:wanted]
        metrics = {"dynamic/rollouts": float(rounds), "dynamic/tied": tied_share}
        return [o for group in found for o in group], Scores.join(parts), metrics

    def score(
        self, outputs: Sequence[Output], judge: Judge | None
    ) -> tuple[list[Output], Scores]:
        """Returns the outputs with their texts, and the scores of all of them.

        Each process decodes and grades its own share, so `text` is set only there. The
        reward model runs before that on all outputs, since it needs all devices.
        """
        outputs = list(outputs)
        mine = processes.share(len(outputs), self.run.config.group_size)
        judged = None
        if self.rewards.asks_model:
            assert judge is not None  # a run with "model" among its rewards has one
            judged = judge(outputs)[mine]
        own = [dataclasses.replace(o, text=self.text(o)) for o in outputs[mine]]
        outputs[mine] = own
        return outputs, self.rewards(own, judged).gather()


def _values(rewards: np.ndarray) -> set[float]:
    return set(rewards[~np.isnan(rewards)].tolist())


def outcome_metrics(
    outputs: Sequence[Output], scores: Scores, group_size: int
) -> dict[str, float]:
    """Returns a step's metrics of rewards and lengths, under TRL's names."""
    groups = scores.rewards.reshape(-1, group_size)
    scored = ~np.isnan(groups)
    lengths = np.array([sum(o.sampled) for o in outputs])
    several = groups[scored.sum(1) > 1]
    metrics = {
        "reward": _mean(scores.rewards),
        "reward_std": _mean([np.nanstd(g, ddof=1) for g in several]),
        "frac_reward_zero_std": float(np.mean([len(_values(g)) < 2 for g in groups])),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([not o.finished for o in outputs])),
        "completions/no_answer": share_without_answer(outputs),
        "rewards/timeouts": float(scores.timeouts),
    }
    calls = [o.calls for o in outputs if o.calls is not None]
    if calls:
        failures = sum(o.failures for o in outputs)
        metrics["tools/call_frequency"] = sum(calls) / len(calls)  # of an output
        metrics["tools/failure_frequency"] = failures / max(sum(calls), 1)
    for name, values in scores.by_function.items():
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = (
            float(np.nanstd(values)) if len(values) else 0.0
        )
        metrics[f"rewards/{name}/failures"] = float(scores.failures[name])
    return metrics


def share_without_answer(outputs: Sequence[Output]) -> float:
    """The share of outputs with digits in which the rule finds no answer.

    Only the first 64 texts that this process has decoded are read.
    """
    texts = [(o.text, o.example.language) for o in outputs if o.text][:64]
    written = [pair for pair in texts if re.search(r"\d", pair[0])]
    found = [answers.extract(*pair) for pair in written]
    return found.count(None) / max(len(texts), 1)


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


SHOWN = 8  # how many outputs of a group are written token by token


def show(run: Run, step: int, outputs, rewards: np.ndarray, samples, **logps) -> None:
    """Writes the first question's group to samples.jsonl, with its advantages.

    Only the first `SHOWN` outputs are written token by token, to keep the file small.

    Args:
      run: the run.
      step: the step's number.
      outputs: the step's outputs.
      rewards: [N].
      samples: the outputs' samples, with their advantages.
      **logps: further log-probabilities of each output's tokens (ref_logps, old_logps);
        None if they are not known.
    """
    g = run.config.group_size
    taught: list[Any] = [None] * g  # DPO's pairs have no advantage for each output
    if len(samples) == len(outputs):
        taught = [_advantage(s) for s in samples[:g]]
    completions = [
        {
            "completion": o.text or run.tokenizer.decode(o.tokens),
            "reward": _number(r),
            "advantage": a,
            "finished": o.finished,
        }
        for o, r, a in zip(outputs[:g], rewards[:g], taught, strict=True)
    ]
    for o, completion in zip(outputs, completions, strict=False):
        if o.calls is not None:
            completion |= {"calls": o.calls, "failures": o.failures}
    known = {"logps": [o.logps for o in outputs[:SHOWN]], **logps}
    for i, completion in enumerate(completions[:SHOWN]):
        completion["tokens"] = run.tokenizer.pieces(outputs[i].tokens)
        if outputs[i].mask is not None:
            completion["mask"] = outputs[i].mask
        for name, values in known.items():
            if values is not None:
                completion[name] = [_number(x, 3) for x in values[i]]
    example = outputs[0].example
    shown = {"question": example.question, "answer": example.answer}
    run.recorder.write_samples("rl", step + 1, {**shown, "completions": completions})


def _advantage(sample: Sample) -> Any:
    """One number for the output, or one for each of its tokens; None if masked."""
    if not any(sample.mask):
        return None
    if isinstance(sample.advantages, float):
        return _number(sample.advantages)
    return [_number(a) for a in (sample.advantages or ())[sample.prompt :]]


def _number(x: Any, digits: int = 4) -> float | None:
    return round(float(x), digits) if np.isfinite(x) else None
