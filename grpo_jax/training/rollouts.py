"""Rollouts: the outputs of a step and their rewards.

Samples G outputs o_i of each question and scores them (DeepSeekMath, Algorithm 1,
lines 6 to 8), with DAPO's dynamic sampling (Yu et al. 2025) on request. There are three
parts, so that the device has work while the host decodes and grades:
`RolloutSource.sample_rollout` dispatches the sampler, `read_outputs` waits for the
outputs, and `RolloutSource.score_rollout` does the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import tool_generations
from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.distributed import processes, sharding
from grpo_jax.environments.interpreter import Interpreter
from grpo_jax.environments.tool_rollouts import (
    decode_output,
    generate_with_tools,
    max_output_tokens,
)
from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate
from grpo_jax.models.decoder import Params
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.training.batch import Sample
from grpo_jax.training.credit import Output
from grpo_jax.training.run import Run
from grpo_jax.training.run_rewards import Rewards, share_without_answer

Prompts = list[tuple[Example, list[int]]]
# outputs → the reward model's score of each, [N]
OutcomeScorer = Callable[[Sequence[Output]], np.ndarray]


def load_questions(run: Run) -> Prompts:
    """Returns the RL questions with their prompts' token ids.

    Questions longer than `data.max_prompt_tokens` are left out, and counted.

    Raises:
      GrpoError: the set cannot be read, or the processes have different ones.
    """
    data = run.config.data
    examples = datasets.load_dataset(
        data.train, "train", data_dir=data.dir or None, require=("answer",)
    )
    kept, dropped = encode_prompts(
        run.tokenizer, examples, limit=data.max_prompt_tokens, **run.prompt_options
    )
    if dropped:
        processes.print_once(
            f"rl: {dropped} of {dropped + len(kept)} questions are longer than "
            f"data.max_prompt_tokens {data.max_prompt_tokens} and left out"
        )
    prompts = [ids for _, ids in kept]
    processes.check_equal("data.train", {"rows": examples.digest, "prompts": prompts})
    return kept


@dataclasses.dataclass(frozen=True)
class PendingRollout:
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


def read_outputs(rollout: PendingRollout) -> list[Output]:
    """Waits for the outputs and returns them, not decoded to text yet."""
    arrays = sharding.fetch_to_hosts(rollout.arrays)
    lengths = arrays.pop("lengths")
    samples = len(lengths) // len(rollout.prompts)
    del arrays["occupancy"]
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"].astype(int)
    outputs = []
    for i, n in enumerate(lengths):
        example, prompt = rollout.prompts[i // samples]
        fields = {
            name: x[i, :n].tolist() if x.ndim == 2 else x[i].item()
            for name, x in arrays.items()
        }
        outputs.append(Output(example=example, prompt=prompt, **fields))
    return outputs


class RolloutSource:
    """Samples and scores the outputs of a step.

    The same step, parameters and seed give the same outputs.

    Raises:
      GrpoError: the questions or reward functions cannot be used, no sandbox works
        here and the run has tools, or the longest output fits no row.
    """

    def __init__(self, run: Run):
        config = run.config
        self.run = run
        self.interpreter: Interpreter | None = None
        if tool_generations(config):  # fails here if no sandbox works
            self.interpreter = Interpreter(config.tools.timeout)
        self.questions = load_questions(run)
        self.rewards = Rewards(config, [example for example, _ in self.questions])
        self._check_rows(max(len(ids) for _, ids in self.questions))
        # DAPO's dynamic sampling: each further rollout of a step asks other questions.
        self.attempts = 1 + config.method_values().get("dynamic_sampling", 0)
        self.replaces = self.attempts > 1
        self.batches = self._make_batches()

    def _make_batches(self) -> list[datasets.Batches]:
        size, seed = self.run.config.questions_per_step, self.run.config.seed
        return [
            datasets.Batches(self.questions, size, seed=seed + 7919 * i)
            for i in range(self.attempts)
        ]

    def keep_questions(self, examples: Sequence[Example]) -> None:
        """Leaves out all questions but these.

        Raises:
          GrpoError: they are too few for a step.
        """
        kept = {(e.question, e.answer) for e in examples}
        questions = [q for q in self.questions if (q[0].question, q[0].answer) in kept]
        size = self.run.config.questions_per_step
        if len(questions) < size:
            raise GrpoError(
                f"census: only {len(questions)} questions teach, and a step takes "
                f"{size} (questions_per_step). Ask more (census_questions), train with "
                "SFT for longer, or take easier questions"
            )
        self.questions = questions
        self.batches = self._make_batches()

    def _check_rows(self, prompt: int) -> None:
        """Checks that a row holds a prompt of so many tokens and any output."""
        config = self.run.config
        row, most = config.optimizer.row_length, config.max_new_tokens
        turns = tool_generations(config)
        longest = prompt + max_output_tokens(turns, most) - 1
        if row and row < longest:
            output = f"{turns} generations with their outputs"
            if not turns:
                output = f"an output of {most}"
            raise GrpoError(
                f"config.optimizer.row_length: {row}; a prompt of {prompt} tokens and "
                f"{output} may take {longest}; raise it, or set 0"
            )

    def sample_rollout(
        self, step: int, params: Params, round: int = 1
    ) -> PendingRollout:
        """Dispatches a step's rollout: the first, or a further one.

        It does not wait for the outputs, except with tools, whose programs run between
        the generations.

        Args:
          step: the step's number.
          params: the policy that samples.
          round: 1, or the number of the further rollout.
        """
        run, config = self.run, self.run.config
        key = run.key("rl", step)
        key = key if round == 1 else jax.random.fold_in(key, round)
        prompts = self.batches[round - 1][step]
        ids = [ids for _, ids in prompts]
        options: dict[str, Any] = dict(
            key=key,
            samples=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            cache_dtype=config.model.cache_dtype or None,
        )
        names = "tokens", "logps", "lengths", "finished", "occupancy"
        if self.interpreter is None:
            slots, eos_id = config.mesh.slots or None, run.tokenizer.eos_ids
            options |= dict(slots=slots, eos_id=eos_id)
            found: Any = generate(run.model, params, ids, **options)
            arrays = {name: getattr(found, name) for name in names}
        else:
            options |= dict(interpreter=self.interpreter, rows=config.tools.rows)
            options["generations"] = tool_generations(config)
            found = generate_with_tools(
                run.model, params, run.tokenizer, ids, **options
            )
            arrays = {n: np.asarray(getattr(found, n)) for n in (*names, "mask")}
            failed = [[call.failed for call in calls] for calls in found.calls]
            arrays["calls"] = np.array([*map(len, failed)])
            arrays["failures"] = np.array([*map(sum, failed)])
        return PendingRollout(
            step, prompts, sharding.wait_on_cpu_mesh(run.mesh, arrays)
        )

    def decode_text(self, output: Output) -> str:
        """Returns an output's text, as the reward functions get it."""
        return decode_output(self.run.tokenizer, output.tokens, output.mask or [])

    def score_rollout(
        self,
        step: int,
        outputs: Sequence[Output],
        params: Params,
        outcome_scorer: OutcomeScorer | None = None,
    ) -> tuple[list[Output], RewardScores, dict[str, float]]:
        """Scores a step's outputs; with dynamic sampling, replaces tied groups.

        A group is tied if all its outputs are right, or none is
        (`Rewards.correctness`). Tied groups are replaced by groups of at most
        `dynamic_sampling` further rollouts. If these do not suffice, tied groups fill
        the batch.

        Args:
          step: the step's number.
          outputs: the outputs of the step's first rollout, [N].
          params: the policy that samples further rollouts.
          outcome_scorer: the reward model's outcome scores; None without such a reward.

        Returns:
          (N outputs, their scores, metrics of the dynamic sampling).
        """
        config = self.run.config
        size, wanted = config.group_size, config.questions_per_step
        groups: list[tuple[bool, list[Output], RewardScores]] = []  # (tied, …)
        rounds = 1
        while True:
            outputs, scores = self.score_outputs(outputs, outcome_scorer)
            if not self.replaces:
                return outputs, scores, {}
            correct = self.rewards.correctness(scores)
            for start in range(0, len(outputs), size):
                group = range(start, start + size)
                tied = len(_values(correct[group])) < 2
                members = outputs[start : start + size]
                groups.append((tied, members, scores.take(group)))
            ties = sum(tied for tied, _, _ in groups)
            if len(groups) - ties >= wanted or rounds == len(self.batches):
                break
            rounds += 1
            outputs = read_outputs(self.sample_rollout(step, params, rounds))
        metrics = {
            "dynamic/rollouts": float(rounds),
            "dynamic/tied": ties / len(groups),
        }
        groups = sorted(groups, key=lambda group: group[0])[:wanted]
        outputs = [o for _, group, _ in groups for o in group]
        return outputs, RewardScores.join([scores for _, _, scores in groups]), metrics

    def score_outputs(
        self, outputs: Sequence[Output], outcome_scorer: OutcomeScorer | None
    ) -> tuple[list[Output], RewardScores]:
        """Returns the outputs with their texts, and the scores of all of them.

        Each process decodes and grades its own share, so `text` is set only there. The
        reward model runs before that on all outputs, since it needs all devices.
        """
        outputs = list(outputs)
        mine = processes.share_of_process(len(outputs), self.run.config.group_size)
        model_scores = None
        if self.rewards.asks_model:
            assert outcome_scorer is not None  # as "model" is among the rewards
            model_scores = outcome_scorer(outputs)[mine]
        graded = [
            dataclasses.replace(o, text=self.decode_text(o)) for o in outputs[mine]
        ]
        outputs[mine] = graded
        return outputs, self.rewards(graded, model_scores).gather()


def _values(rewards: np.ndarray) -> set[float]:
    return set(rewards[~np.isnan(rewards)].tolist())


def outcome_metrics(
    outputs: Sequence[Output], scores: RewardScores, group_size: int
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
        **{
            f"completions/{name}_length": float(getattr(lengths, name)())
            for name in ("mean", "min", "max")
        },
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
        metrics[f"rewards/{name}/std"] = float(np.nanstd(values))
        metrics[f"rewards/{name}/failures"] = float(scores.failures[name])
    return metrics


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


SHOWN = 8  # how many outputs of a group are written token by token


def write_sample_group(
    run: Run, step: int, outputs, rewards: np.ndarray, samples, **logps
) -> None:
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
    one_each = len(samples) == len(outputs)  # not for DPO's pairs
    shown = []
    for i, o in enumerate(outputs[: run.config.group_size]):
        row = {
            "completion": o.text or run.tokenizer.decode(o.tokens),
            "reward": _number(rewards[i]),
            "advantage": _advantage(samples[i]) if one_each else None,
            "finished": o.finished,
        }
        if o.calls is not None:
            row |= {"calls": o.calls, "failures": o.failures}
        if i < SHOWN:
            row["tokens"] = run.tokenizer.text_pieces(o.tokens)
            if o.mask is not None:
                row["mask"] = o.mask
            known = {"logps": o.logps}
            known |= {name: values[i] for name, values in logps.items() if values}
            row |= {name: [_number(x, 3) for x in known[name]] for name in known}
        shown.append(row)
    example = outputs[0].example
    question = {"question": example.question, "answer": example.answer}
    run.recorder.write_samples("rl", step + 1, {**question, "completions": shown})


def _advantage(sample: Sample) -> Any:
    """Returns one number, or one for each of the output's tokens; None if masked."""
    if not any(sample.mask):
        return None
    if isinstance(sample.advantages, float):
        return _number(sample.advantages)
    return [_number(a) for a in (sample.advantages or ())[sample.prompt :]]


def _number(x: Any, digits: int = 4) -> float | None:
    return round(float(x), digits) if np.isfinite(x) else None
