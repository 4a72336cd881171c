"""Automatic step labels by sampled completions: Math-Shepherd (Wang et al. 2023).

1. Sample outputs of each question from the policy, and grade them.
2. Find where the steps of each output end.
3. Sample K completions from the end of each step but the last.
4. Label each step: 1 if any of its completions is right (hard label), or the share that
   is right (soft label). The last step's label is whether the output itself is right.

Prefixes keep the token ids that the policy sampled; they are not encoded again. Soft
labels also depend on how hard the question is for the policy: on chain sums, a model
trained on hard labels finds wrong steps better (AUC 0.860 against 0.800; 4,096
questions, K = 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes, sharding
from grpo_jax.generation.sampler import generate
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.rewards.reward_functions import rule_reward
from grpo_jax.training.reward_model.labels import LabelledSequence
from grpo_jax.training.reward_model.solution_steps import step_ends

Tokens = list[int]
# (examples, texts of their outputs) → one reward each; above ½ counts as right
Grade = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]
# (prompts, samples of each, key) → continuations of each prompt
Sample = Callable[[Sequence[Tokens], int, jax.Array], list[list[Tokens]]]


def grade_by_rule(examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
    """Returns 1 for each output whose final answer equals the reference, else 0.

    Equal pairs of reference and text are graded once.
    """
    pairs = [(e.answer, text) for e, text in zip(examples, texts, strict=True)]
    unique = dict.fromkeys(pairs)
    answers, different = zip(*unique, strict=True)
    found = rule_reward(different, different, answer=answers)
    values = dict(zip(unique, found, strict=True))
    return [values[pair] for pair in pairs]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The policy with its sampling settings."""

    model: Decoder
    params: Params
    tokenizer: Tokenizer
    max_new_tokens: int  # of a whole output; `label_outputs` cuts completions there
    temperature: float = 1.0
    batch: int = 512  # outputs decoded at a time

    def __call__(
        self, prompts: Sequence[Tokens], samples: int, key: jax.Array
    ) -> list[list[Tokens]]:
        """Returns `samples` continuations of each prompt, with their EOS tokens."""
        found: list[list[Tokens]] = [[] for _ in prompts]
        size = max(1, self.batch // samples)
        # Sorted by length, so that prompts of a call need little padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), size):
            chunk = order[at : at + size]
            filled = chunk + chunk[-1:] * (size - len(chunk))  # one shape for all calls
            rollouts = generate(
                self.model,
                self.params,
                [prompts[i] for i in filled],
                key=jax.random.fold_in(key, at),
                samples=samples,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_id=self.tokenizer.eos_ids,
            )
            tokens, ends = sharding.fetch_to_hosts((rollouts.tokens, rollouts.lengths))
            for place, i in enumerate(chunk):
                rows = range(place * samples, (place + 1) * samples)
                found[i] = [tokens[row, : ends[row]].tolist() for row in rows]
        return found


def label_questions(
    sample: Sampler,
    prompts: Sequence[tuple[Example, Tokens]],
    *,
    key: jax.Array,
    outputs: int = 1,
    **options: Any,
) -> list[LabelledSequence]:
    """Samples outputs of each question and labels their steps.

    Args:
      sample: the policy.
      prompts: the questions with their prompts' tokens (`prompts.encode_prompts`).
      key: the random key of all draws.
      outputs: how many are sampled of each question.
      **options: completions, soft and grade, as in `label_outputs`.

    Returns:
      questions × outputs labelled sequences.
    """
    tokens = [prompt for _, prompt in prompts]
    sampled = sample(tokens, outputs, jax.random.fold_in(key, 0))
    return label_outputs(
        sample,
        sample.tokenizer,
        [
            (example, prompt, output)
            for (example, prompt), several in zip(prompts, sampled, strict=True)
            for output in several
        ],
        max_new_tokens=sample.max_new_tokens,
        key=jax.random.fold_in(key, 1),
        **options,
    )


def label_outputs(
    sample: Sample,
    tokenizer: Tokenizer,
    outputs: Sequence[tuple[Example, Tokens, Tokens]],
    *,
    max_new_tokens: int,
    key: jax.Array,
    completions: int = 8,
    soft: bool = False,
    grade: Grade = grade_by_rule,
) -> list[LabelledSequence]:
    """Labels the steps of given outputs.

    Args:
      sample: any sampler of the policy.
      tokenizer: of the policy.
      outputs: (example, prompt tokens, output tokens) each.
      max_new_tokens: the limit of a whole output. Prefix and completion together are
        cut off there, as the policy's own outputs are.
      key: the random key of all draws.
      completions: K, how many are sampled from each prefix.
      soft: label a step with the share of right completions, instead of whether any is.
      grade: grades the texts of whole outputs.

    Returns:
      One labelled sequence for each output.
    """
    ends = [step_ends(tokenizer, output) for _, _, output in outputs]
    starts = [  # of each step but the last
        (example, prompt, output[: end + 1])
        for (example, prompt, output), steps in zip(outputs, ends, strict=True)
        for end in steps[:-1]
    ]
    prefixes = [prompt + start for _, prompt, start in starts]
    continued = sample(prefixes, completions, key) if prefixes else []
    whole = [(example, output) for example, _, output in outputs]
    whole += [
        (example, (start + tokens)[:max_new_tokens])
        for (example, _, start), several in zip(starts, continued, strict=True)
        for tokens in several
    ]

    def graded(rows: Sequence[tuple[Example, Tokens]]) -> Sequence[float]:
        texts = [tokenizer.decode(tokens) for _, tokens in rows]
        return grade([example for example, _ in rows], texts)

    rewards = processes.map_divided(graded, whole)
    right = np.asarray(rewards, np.float64) > 0.5  # a reward of NaN is not right
    shares = right[len(outputs) :].reshape(-1, completions).mean(1)
    values = iter((shares if soft else shares > 0).astype(float).tolist())
    found = []
    rows = zip(outputs, ends, right[: len(outputs)].tolist(), strict=True)
    for (example, prompt, output), steps, is_right in rows:
        found.append(
            LabelledSequence(
                tokens=(*prompt, *output),
                prompt=len(prompt),
                ends=tuple(len(prompt) + end for end in steps),
                labels=(*(next(values) for _ in steps[:-1]), float(is_right)),
                id=example.id,
            )
        )
    return found
