"""A census counts which questions can teach, and says what to change."""

import itertools

import numpy as np
import pytest

from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.evaluation.census import (
    Counts,
    chance_of_signal,
    count_outcomes,
    give_advice,
    summarize_counts,
)
from grpo_jax.evaluation.completion_files import Completion


def test_counts_of_outputs_by_hand():
    """Four outputs: right, wrong, cut off before the answer, without a number."""
    tokenizer = Tokenizer.from_alphabet("0123456789+= abc")
    texts = "1+1=2", "1+1=3", "1+1=", "abc"
    row = [Completion(text, cut_off=i == 2) for i, text in enumerate(texts)]
    counts = count_outcomes(tokenizer, [Example("1+1", "2")], [[3, 4, 5]], [row])
    assert counts.prompt_tokens.tolist() == [3]
    assert counts.right.tolist() == [[True, False, False, False]]
    assert counts.cut_off.tolist() == [[False, False, True, False]]
    assert counts.answered.tolist() == [[True, True, True, False]]
    assert counts.tokens.tolist() == [[5, 5, 4, 3]]
    assert counts.teaches.tolist() == [True]


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_chance_of_signal_is_the_share_of_all_groups(group_size):
    """All groups of G that can be drawn of k outputs, counted one by one."""
    k = 5
    for right in range(k + 1):
        outputs = [1] * right + [0] * (k - right)
        groups = list(itertools.combinations(outputs, group_size))
        mixed = sum(0 < sum(group) < group_size for group in groups) / len(groups)
        found = chance_of_signal(np.array([right]), k, group_size)
        assert found[0] == pytest.approx(mixed)


def test_chance_of_signal_in_larger_groups():
    """G = 8 of p = ½: 1 − 2·2⁻⁸."""
    assert chance_of_signal(np.array([2]), 4, 8)[0] == 1 - 2 / 256


def counts_of(right, *, lengths=None, cut_off=0.0, answered=1.0):
    right = np.array(right, bool)
    share = (np.arange(right.size) / right.size).reshape(right.shape)
    lengths = np.arange(len(right)) if lengths is None else np.array(lengths)
    return Counts(lengths, right, share < cut_off, share < answered, share * 100)


def test_figures_of_a_set_and_of_its_lengths():
    """64 questions; the 16 shortest are right once of twice, the others never."""
    right = [[1, 0]] * 16 + [[0, 0]] * 48
    whole, *classes = summarize_counts(counts_of(right), group_size=2)
    assert whole["questions"] == 64 and whole["prompt_tokens"] == [0, 63]
    assert (whole["never"], whole["sometimes"], whole["always"]) == (0.75, 0.25, 0)
    assert whole["teaches"] == 0.25 and whole["accuracy"] == 0.125
    assert [c["teaches"] for c in classes] == [1, 0, 0, 0]
    assert [c["prompt_tokens"] for c in classes][0] == [0, 15]


def advice_of(counts):
    return " ".join(give_advice({"gsm8k": summarize_counts(counts, 2)}, 256))


def test_advice_names_what_is_wrong():
    hard = counts_of([[1, 0]] * 10 + [[0, 0]] * 90)
    assert "never right: train with SFT" in advice_of(hard)
    assert "those of 0 to 24 tokens teach most" in advice_of(hard)
    assert "always right: take harder" in advice_of(counts_of([[1, 1]] * 40))
    assert "cut off at max_new_tokens 256" in advice_of(
        counts_of([[1, 0]] * 40, cut_off=0.5)
    )
    assert "no answer is found in 50%" in advice_of(
        counts_of([[1, 0]] * 40, answered=0.5)
    )


def test_no_advice_for_questions_that_teach():
    assert not advice_of(counts_of([[1, 0]] * 30 + [[0, 0]] * 20 + [[1, 1]] * 14))
