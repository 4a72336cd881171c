"""A census of questions: which of them can teach a model by RL.

k outputs of each question are graded. GRPO learns from a group of G outputs only if
some are right and some are wrong, so questions that are never or always right cost time
and teach nothing. `count_outcomes` returns the counts, `summarize_counts` the figures
of a set, and `give_advice` what to do first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes
from grpo_jax.evaluation.completion_files import Completion
from grpo_jax.rewards import answers
from grpo_jax.rewards.reward_functions import rule_reward

Figures = dict[str, Any]
LENGTHS = 4  # classes of prompt length, with about as many questions each


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a census found for Q questions of a set, with k outputs each.

    Attributes:
      prompt_tokens: int [Q], of a question with its template.
      right: bool [Q, k], whether the rule reward is 1.
      cut_off: bool [Q, k], whether an output reached the limit.
      answered: bool [Q, k], whether an answer is found in the text.
      tokens: int [Q, k], tokens of the text.
    """

    prompt_tokens: np.ndarray
    right: np.ndarray
    cut_off: np.ndarray
    answered: np.ndarray
    tokens: np.ndarray

    @property
    def teaches(self) -> np.ndarray:
        """bool [Q]: some outputs are right and some are wrong."""
        return np.asarray(self.right.any(1) & ~self.right.all(1))


def count_outcomes(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Completion]],
) -> Counts:
    """Grades the outputs by the rule reward.

    Args:
      tokenizer: the model's.
      examples: Q questions.
      prompts: their token ids.
      completions: k of each question.
    """

    def grade(indices: Sequence[int]) -> list[list[list[int]]]:
        repeated = [examples[i] for i in indices for _ in completions[i]]
        texts = [c.text for i in indices for c in completions[i]]
        languages = [example.language for example in repeated]
        right = rule_reward(
            [example.question for example in repeated],
            texts,
            answer=[example.answer for example in repeated],
            language=languages,
        )
        found = [answers.extract(*x) for x in zip(texts, languages, strict=True)]
        lengths = [len(tokenizer.encode(text)) for text in texts]
        flat = np.stack([right, [f is not None for f in found], lengths], -1)
        return flat.astype(int).reshape(len(indices), -1, 3).tolist()

    table = np.array(processes.map_divided(grade, range(len(examples))))  # [Q, k, 3]
    return Counts(
        np.array([len(ids) for ids in prompts]),
        table[..., 0].astype(bool),
        np.array([[bool(c.cut_off) for c in row] for row in completions]),
        table[..., 1].astype(bool),
        table[..., 2],
    )


def chance_of_signal(right: np.ndarray, samples: int, group_size: int) -> np.ndarray:
    """Returns the chance that a group of G outputs is neither all right nor all wrong.

    With c of k outputs right and G ≤ k, it is the unbiased 1 − [C(c,G) + C(k−c,G)] /
    C(k,G); with G > k it is 1 − pᴳ − (1−p)ᴳ with p = c/k.

    Args:
      right: int [Q], c.
      samples: k.
      group_size: G.

    >>> chance_of_signal(np.array([0, 2, 4]), 4, 2).round(3).tolist()
    [0.0, 0.667, 0.0]
    """
    if group_size > samples:
        p = right / samples
        return 1 - p**group_size - (1 - p) ** group_size
    tied = [
        math.comb(int(c), group_size) + math.comb(samples - int(c), group_size)
        for c in right
    ]
    return 1 - np.array(tied, float) / math.comb(samples, group_size)


def summarize_counts(counts: Counts, group_size: int) -> list[Figures]:
    """Returns the figures of all questions, then of each class of prompt length.

    Args:
      counts: of one set.
      group_size: G of the training.

    Returns:
      Objects with questions, prompt_tokens (lowest and highest), the shares never,
      sometimes and always (right), teaches (groups of G that have a signal), accuracy,
      cut_off and answered, and tokens (mean, and the 9 in 10 quantile).
    """
    order = np.argsort(counts.prompt_tokens, kind="stable")
    parts = [order]
    if len(order) >= 8 * LENGTHS:
        parts += np.array_split(order, LENGTHS)
    return [_figures(counts, part, group_size) for part in parts]


def _figures(counts: Counts, part: np.ndarray, group_size: int) -> Figures:
    right, samples = counts.right[part].sum(1), counts.right.shape[1]
    lengths = counts.prompt_tokens[part]
    return {
        "questions": len(part),
        "prompt_tokens": [int(lengths.min()), int(lengths.max())],
        "never": float(np.mean(right == 0)),
        "sometimes": float(np.mean(counts.teaches[part])),
        "always": float(np.mean(right == samples)),
        "teaches": float(np.mean(chance_of_signal(right, samples, group_size))),
        "accuracy": float(np.mean(right)) / samples,
        "cut_off": float(np.mean(counts.cut_off[part])),
        "answered": float(np.mean(counts.answered[part])),
        "tokens": float(np.mean(counts.tokens[part])),
        "tokens_90": float(np.quantile(counts.tokens[part], 0.9)),
    }


def give_advice(
    sets: Mapping[str, Sequence[Figures]], max_new_tokens: int
) -> list[str]:
    """Returns what the census says to change, the most urgent first.

    Args:
      sets: set → figures of `summarize_counts`.
      max_new_tokens: the limit of the outputs.
    """
    lines = []
    for name, (all_of_it, *classes) in sets.items():
        if all_of_it["cut_off"] > 0.2:
            lines.append(
                f"{name}: {all_of_it['cut_off']:.0%} of the outputs are cut off at "
                f"max_new_tokens {max_new_tokens}: raise it, or train with SFT first, "
                "so that outputs end"
            )
        if all_of_it["answered"] < 0.7:
            lines.append(
                f"{name}: no answer is found in {1 - all_of_it['answered']:.0%} of the "
                "outputs: try another data.template or data.instruction, and read some "
                "of the completions"
            )
        if all_of_it["always"] > 0.8:
            lines.append(
                f"{name}: {all_of_it['always']:.0%} of the questions are always right: "
                "take harder ones"
            )
        elif all_of_it["never"] > 0.8:
            text = (
                f"{name}: {all_of_it['never']:.0%} of the questions are never right: "
            )
            text += "train with SFT first, or take easier ones"
            best = max(classes, key=lambda row: row["teaches"], default=all_of_it)
            if best["teaches"] > 1.5 * all_of_it["teaches"]:
                low, high = best["prompt_tokens"]
                text += f"; those of {low} to {high} tokens teach most"
            lines.append(text)
    return lines
