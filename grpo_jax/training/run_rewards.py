"""The reward functions that a run's config names, applied to outputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.config import Config, reward_names, reward_weights, tool_generations
from grpo_jax.data.example import Example
from grpo_jax.distributed import processes
from grpo_jax.rewards import answers
from grpo_jax.rewards.reward_calls import CallRecord
from grpo_jax.rewards.reward_functions import (
    RewardScores,
    check_signatures,
    compute_rewards,
    find_reward_function,
    rule_reward,
)
from grpo_jax.training.credit import Output, overlong_punishment


class Rewards:
    """The reward functions of a run; called with outputs, it returns `RewardScores`.

    Args:
      config: the run's config.
      questions: all questions of the run; the functions get their columns.

    Raises:
      GrpoError: a function cannot be found, or does not take the columns.
    """

    def __init__(self, config: Config, questions: Sequence[Example]):
        # With a process reward model, the rule's rewards are only reported.
        names = reward_names(config) or ["rule"]
        self.weights = reward_weights(config) or [1.0]
        self.functions = [
            None if n == "model" else find_reward_function(n) for n in names
        ]
        self.timeout = config.rewards.timeout
        self.limit = config.max_new_tokens * max(1, tool_generations(config))
        self.buffer = config.method_values().get("overlong_buffer", 0)
        # The weights of `RewardScores.by_function`, with the length punishment.
        self.all_weights = [*self.weights, 1.0] if self.buffer else self.weights
        self.calls = CallRecord()
        # The columns of all questions, so that they are the same at every step.
        self.columns = sorted({name for e in questions for name in e.columns})
        # Graders read numbers in the notation of the question's language.
        self.tells_language = any(e.language != "en" for e in questions)
        given = ["answer", *(["language"] if self.tells_language else [])]
        check_signatures([f for f in self.functions if f], [*self.columns, *given])

    @property
    def asks_model(self) -> bool:
        """Whether the reward model is one of the functions."""
        return None in self.functions

    def __call__(
        self, outputs: Sequence[Output], model_scores: np.ndarray | None
    ) -> RewardScores:
        examples = [o.example for o in outputs]
        columns: dict[str, list[Any]] = {
            name: [e.columns.get(name) for e in examples] for name in self.columns
        }
        columns["answer"] = [e.answer for e in examples]
        if self.tells_language:
            columns["language"] = [e.language for e in examples]

        def model(prompts, completions, **columns):
            return model_scores

        scores = compute_rewards(
            [function or model for function in self.functions],
            self.weights,
            [e.question for e in examples],
            [o.text for o in outputs],
            columns,
            timeout=self.timeout,
            calls=self.calls,
        )
        if not self.buffer:
            return scores
        lengths = [sum(o.sampled) for o in outputs]
        punishment = overlong_punishment(lengths, self.limit, self.buffer)
        return dataclasses.replace(
            scores,
            rewards=scores.rewards + punishment,
            by_function=scores.by_function | {"overlong": punishment},
        )

    def correctness(self, scores: RewardScores) -> np.ndarray:
        """Returns what dynamic sampling compares within a group, [N].

        This is the rule's reward if it is one of the functions, else the weighted sum
        without the length punishment. DAPO keeps groups in which some outputs are right
        and some are wrong (Yu et al. 2025, equation 11).
        """
        if rule_reward.__name__ in scores.by_function:
            return scores.by_function[rule_reward.__name__]
        # The punishment comes after all functions, and has no weight here.
        pairs = zip(self.weights, scores.by_function.values(), strict=False)
        total = np.zeros(len(scores.rewards), np.float64)
        for weight, values in pairs:
            total += weight * np.nan_to_num(values)
        return np.where(np.isnan(scores.rewards), np.nan, total)


def share_without_answer(outputs: Sequence[Output]) -> float:
    """Returns the share of outputs with digits in which the rule finds no answer.

    Only the first 64 outputs are read, each by the process that has decoded it.
    """
    missing = [
        bool(re.search(r"\d", o.text))
        and answers.extract(o.text, o.example.language) is None
        for o in outputs[:64]
        if o.text
    ]
    parts = processes.all_gather([sum(missing), len(missing)])
    count, texts = (sum(part) for part in zip(*parts, strict=True))
    return count / max(texts, 1)
