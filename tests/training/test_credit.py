"""What rewards teach each token: by hand, row by row of the table of methods."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from grpo_jax.data.example import Example
from grpo_jax.rewards.reward_functions import RewardScores
from grpo_jax.training import credit
from grpo_jax.training.credit import Output


def output(tokens, prompt=(7,), logps=None, finished=True):
    example = Example(question="q", answer="a", id="x")
    return Output(
        example=example,
        prompt=list(prompt),
        tokens=list(tokens),
        logps=list(logps or [-1.0] * len(tokens)),
        text="",
        finished=finished,
    )


def taught(sample) -> Any:
    return sample.advantages


def masked(samples, name) -> Any:
    """A field's numbers at the masked tokens of all samples."""
    return [
        x for s in samples for x, m in zip(getattr(s, name), s.mask, strict=True) if m
    ]


def scores(**by_function):
    arrays = {k: np.array(v, np.float32) for k, v in by_function.items()}
    total = np.sum(list(arrays.values()), 0)
    return RewardScores(rewards=total, by_function=arrays)


def test_rejection_sampling_keeps_what_is_right():
    outputs = [output([1]), output([2]), output([3])]
    samples = credit.assign_indicator_credit(outputs, np.array([1.0, 0.0, np.nan]))
    assert [s.advantages for s in samples] == [1.0, 0.0, 0.0]
    assert [credit.has_gradient(s) for s in samples] == [True, False, False]


def test_outcome_is_one_number_for_every_token():
    outputs = [output([1, 2]), output([3])]
    options = dict(group_size=2, scale="none", baseline="mean")
    samples = credit.assign_outcome_credit(
        outputs, scores(rule=[1.0, 0.0]), [1.0], **options
    )
    assert [s.advantages for s in samples] == [0.5, -0.5]
    assert samples[0].tokens == [7, 1, 2] and samples[0].mask == [0, 1, 1]


def test_functions_normalised_each_count_alike():
    """Summed, the function with the large values decides alone."""
    outputs = [output([1]), output([2]), output([3])]
    both = scores(rule=[1.0, 0.0, 0.0], length=[0.0, 100.0, 0.0])
    options = dict(group_size=3, scale="group", baseline="mean")
    summed = credit.assign_outcome_credit(outputs, both, [1.0, 1.0], **options)
    each = credit.assign_outcome_credit(outputs, both, [1.0, 1.0], **options, each=True)
    assert taught(summed[0]) < 0 < 1 < taught(summed[1])
    assert taught(each[0]) == pytest.approx(taught(each[1]), rel=1e-3)
    assert taught(each[0]) > 0.5 and taught(each[2]) < -1


def test_process_credit_is_the_sum_of_the_steps_to_come():
    """Step rewards 1, 0 | 0, 0 have mean 1/4, and std 1/2 (ddof 1)."""
    outputs = [output([1, 2, 3]), output([4, 5])]
    ends, rewards = [[1, 2], [0, 1]], [np.array([1.0, 0.0]), np.array([0.0, 0.0])]
    first, second = credit.assign_process_credit(outputs, ends, rewards, 2)
    r = (np.array([1.0, 0.0]) - 0.25) / (0.5 + 1e-4)
    want = [r[0] + r[1], r[0] + r[1], r[1]]
    np.testing.assert_allclose(taught(first), [0.0, *want], rtol=1e-5)
    np.testing.assert_allclose(taught(second), [0.0, 2 * r[1], r[1]], rtol=1e-5)


def test_the_critics_credit_by_hand():
    """γ = λ = 1: the return is what follows, KL and reward, and A = return - V."""
    outputs = [output([1, 2], logps=[-1.0, -2.0]), output([3], logps=[-0.5])]
    ref = [np.array([-1.5, -2.0]), np.array([-0.5])]
    values = [np.array([0.2, 0.4]), np.array([0.1])]
    samples = credit.assign_critic_credit(
        outputs, np.array([1.0, 0.0]), values, ref, kl_coef=0.1, gamma=1.0, lam=1.0
    )
    returns = np.array([1.0 - 0.1 * 0.5, 1.0, 0.0])
    np.testing.assert_allclose(masked(samples, "returns"), returns, rtol=1e-5)
    raw = returns - np.array([0.2, 0.4, 0.1])
    white = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(masked(samples, "advantages"), white, rtol=1e-4)
    assert samples[0].values == pytest.approx([0.0, 0.2, 0.4])


def test_the_critic_passes_over_what_a_tool_wrote():
    """Tokens of the policy, of a tool, of the policy, of a tool: the reward is at the
    third, and A of the first reaches over the second. λ = 0.5, γ = 1."""
    one = dataclasses.replace(output([1, 2, 3, 4]), mask=[1, 0, 1, 0])
    one = dataclasses.replace(one, logps=[-1.0, 0.0, -1.0, 0.0])
    ref, values = [np.array([-2.0, -9.0, -1.0, -9.0])], [np.array([0.5, 9, 0.25, 9])]
    (sample,) = credit.assign_critic_credit(
        [one], np.array([1.0]), values, ref, kl_coef=0.1, gamma=1.0, lam=0.5
    )
    last = 1.0 - 0.25
    first = -0.1 + 0.25 - 0.5 + 0.5 * last
    assert sample.mask == [0, 1, 0, 1, 0]
    returns = [first + 0.5, last + 0.25]
    np.testing.assert_allclose(masked([sample], "returns"), returns, rtol=1e-5)
    raw = np.array([first, last])
    white = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(masked([sample], "advantages"), white, rtol=1e-4)


def test_an_output_without_a_reward_teaches_the_critic_nothing():
    outputs = [output([1, 2]), output([3, 4])]
    values = [np.zeros(2), np.zeros(2)]
    rewards = np.array([1.0, np.nan])
    a, b = credit.assign_critic_credit(
        outputs, rewards, values, None, kl_coef=0.0, gamma=1.0, lam=1.0
    )
    assert not any(b.mask) and np.isfinite(taught(b)).all()
    assert sum(a.mask) == 2 and np.isfinite(taught(a)).all()


def test_pairs_are_of_one_question_right_before_wrong():
    outputs = [output([i]) for i in range(8)]
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1.0])  # the second group has no pair
    rng = np.random.default_rng(0)
    pairs = credit.make_preference_pairs(outputs, rewards, 4, rng)
    tokens = [s.tokens[-1] for s in pairs]
    assert len(tokens) == 4 == len(set(tokens))
    assert all(rewards[right] for right in tokens[::2])
    assert not any(rewards[wrong] for wrong in tokens[1::2])
    assert max(tokens) < 4


def test_reinforce_pp_credits_each_token_with_what_follows_it():
    """A_t = r - β Σ_s≥t log(π_old/π_ref), normalised over all tokens."""
    outputs = [output([1, 2], logps=[-1.0, -2.0]), output([3], logps=[-0.5])]
    ref = [np.array([-1.5, -3.0]), np.array([-0.25])]
    samples = credit.assign_return_credit(
        outputs, np.array([1.0, 0.0]), ref, kl_coef=0.1
    )
    raw = np.array([1 - 0.1 * (0.5 + 1.0), 1 - 0.1 * 1.0, 0.1 * 0.25])
    white = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(masked(samples, "advantages"), white, rtol=1e-5)
    assert all(s.returns is None and s.values is None for s in samples)
    # without a KL term it is one number for each output
    plain = credit.assign_return_credit(
        outputs, np.array([1.0, 0.0]), None, kl_coef=0.0
    )
    a, b, c = masked(plain, "advantages")
    assert a == b > 0 > c


def test_tied_rewards_have_exactly_no_returns():
    """Rounding leaves 0.95 - mean(0.95) above 0, and its std as small."""
    outputs = [output(range(1, 2 + i)) for i in range(7)]
    rewards = np.full(7, 0.95)
    for sample in credit.assign_return_credit(outputs, rewards, None, kl_coef=0.0):
        assert not np.any(taught(sample))


def test_rloo_has_the_divergence_of_the_whole_output_in_its_reward():
    """A tool's tokens are not the policy's."""
    one = output([1, 2, 3], logps=[-1.0, 0.0, -2.0])
    one = dataclasses.replace(one, mask=[1, 0, 1])
    two = output([4], logps=[-1.0])
    ref = [np.array([-2.0, 9.0, -2.5]), np.array([-0.5])]
    np.testing.assert_allclose(credit.log_ratio_sums([one, two], ref), [1.5, -0.5])
