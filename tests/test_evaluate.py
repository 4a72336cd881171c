"""The measures, by hand, and the published figures' place beside them."""

import itertools

import pytest

from grpo_jax import published
from grpo_jax.measures import majority, pass_at_k, wilson
from grpo_jax.tables import table


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    right = [True, False, False, True, False]
    for k in (1, 2, 3, 5):
        choices = list(itertools.combinations(right, k))
        by_hand = sum(any(c) for c in choices) / len(choices)
        assert pass_at_k([2], 5, k) == pytest.approx(by_hand)
    assert pass_at_k([0, 5], 5, 3) == 0.5


def test_majority_counts_answers_and_not_completions_without_one():
    assert majority(["7", None, None, None], [True, False, False, False])
    assert not majority([None, None], [False, False])
    assert majority(["7", "8"], [True, False])  # a tie: the first


def test_the_interval_is_wilsons():
    """Against the values of R's binom.confint(…, method="wilson")."""
    assert wilson(0.0, 50) == pytest.approx((0.0, 0.07135), abs=1e-4)
    assert wilson(0.9, 1000) == pytest.approx((0.87984, 0.91711), abs=1e-4)


def test_the_table_says_what_was_measured_where():
    def cell(accuracy):
        return {"accuracy": accuracy, "ci95": wilson(accuracy, 100)}

    results = {
        "models": ["instruct", "rl"],
        "settings": {"temperature": 0.7},
        "sets": {
            "a": {
                "in_domain": True,
                "instruct": {"n": 100, "greedy": cell(0.25), "sampled": cell(0.5)},
                "rl": {"n": 100, "greedy": cell(0.75), "sampled": cell(0.5)},
            }
        },
    }
    text = table(results)
    assert "temperature 0.7: instruct → rl" in text
    assert "| a (in-domain) | 100 | 25.0 ± 8.4 → 75.0 ± 8.4 | 50.0 ± 9.6 →" in text


def test_published_figures_are_marked_and_complete():
    assert len(published.CHAIN_OF_THOUGHT) == 19
    assert published.CHAIN_OF_THOUGHT["GPT-4"]["cmath"] == "86.0"
    assert published.CHAIN_OF_THOUGHT["DeepSeekMath-RL 7B"]["mgsm_zh"] == "79.6"
    assert published.table(["gsm8k"]).startswith("Published, not measured here")
    assert published.table(["svamp"]) == ""
