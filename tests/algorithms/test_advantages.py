"""Group advantages: by hand, against TRL's and the reference, and what must be 0."""

import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.algorithms.advantages import decoupled_advantages, group_advantages

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_losses.npz")
NAN = float("nan")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl(scale, x64):
    ours = group_advantages(GOLDEN["rewards"], 6, scale=scale)
    # TRL's nanstd takes count / (count - 1) in float32, even of float64 rewards
    np.testing.assert_allclose(ours, GOLDEN[f"advantages_{scale}"], rtol=1e-7)


BY_HAND = [
    # mean 1/2; std with ddof 1: sqrt(4 · 1/4 / 3) = 1/sqrt(3)
    (dict(), [1, 0, 1, 0], [math.sqrt(3) / 2, -math.sqrt(3) / 2] * 2),
    (dict(ddof=0), [1, 0, 1, 0], [1, -1, 1, -1]),
    (dict(eps=0.5, ddof=0), [1, 0, 1, 0], [0.5, -0.5, 0.5, -0.5]),
    (dict(scale="none"), [3, 1, 1, 1], [1.5, -0.5, -0.5, -0.5]),
    (
        dict(scale="none", baseline="leave_one_out"),
        [3, 1, 1, 1],
        [2, -2 / 3] + [-2 / 3] * 2,
    ),
    # std stays that around the mean: sqrt((2.25 + 3/4) / 3) = 1
    (dict(baseline="leave_one_out"), [3, 1, 1, 1], [2, -2 / 3, -2 / 3, -2 / 3]),
    # the unscored output takes no part: mean 1/2, std sqrt(1/2)
    (dict(), [1, NAN, NAN, 0], [math.sqrt(0.5), 0, 0, -math.sqrt(0.5)]),
    (dict(scale="none", baseline="leave_one_out"), [4, NAN, 1, 1], [3, 0, -1.5, -1.5]),
    (dict(), [1, NAN, NAN, NAN], [0, 0, 0, 0]),
    (dict(), [NAN, NAN, NAN, NAN], [0, 0, 0, 0]),
    (dict(), [2, NAN, 2, 2], [0, 0, 0, 0]),
    # the batch's std: (1, 0, 3, 4) has mean 2 and sum of squares 10
    (
        dict(scale="batch", group_size=2, ddof=0),
        [1, 0, 3, 4],
        [x / math.sqrt(2.5) for x in (0.5, -0.5, -0.5, 0.5)],
    ),
    # REINFORCE++: mean 2 of the batch; a tied group, or one of one, has an advantage
    (dict(scale="none", baseline="batch", group_size=2), [1, 1, 4, 2], [-1, -1, 2, 0]),
    (dict(scale="none", baseline="batch", group_size=1), [1, 1, 4, 2], [-1, -1, 2, 0]),
    (
        dict(scale="batch", baseline="batch", group_size=2),
        [1, NAN, 4, 1],
        [-1 / math.sqrt(3), 0, 2 / math.sqrt(3), -1 / math.sqrt(3)],
    ),
    (dict(scale="batch", baseline="batch", group_size=2), [3, 3, 3, 3], [0] * 4),
    (
        dict(scale="batch", group_size=2),
        [1, 0, 3, 3],
        [x / math.sqrt(6.75 / 3) for x in (0.5, -0.5, 0, 0)],
    ),
]


@pytest.mark.parametrize(("options", "rewards", "expected"), BY_HAND)
def test_by_hand(options, rewards, expected):
    options = dict(group_size=4, eps=0.0) | options
    ours = group_advantages(jnp.array(rewards, jnp.float32), **options)
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-7)


def test_reference(x64):
    rng = np.random.default_rng(0)
    rewards = rng.choice([0.0, 0.1, 0.5, 1.0, NAN], 20)
    rewards[:5], rewards[5:9] = 0.3, NAN  # a tied group, and one scored once
    grid = itertools.product(
        ("group", "batch", "none"), ("mean", "leave_one_out"), (0, 1)
    )
    for scale, baseline, ddof in grid:
        options = dict(scale=scale, baseline=baseline, ddof=ddof)
        ours = group_advantages(jnp.asarray(rewards), 5, **options)
        theirs = reference_losses.group_advantages(rewards, 5, **options)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, err_msg=str(options))
        assert not ours[:10].any()


def test_the_batch_is_one_group():
    """baseline="batch" is the mean baseline over a single group of all outputs."""
    rewards = jnp.array([0.1, 0.9, NAN, 0.3, 0.3, 0.3])
    for scale in ("batch", "none"):
        ours = group_advantages(rewards, 2, scale=scale, baseline="batch")
        theirs = group_advantages(rewards, 6, scale=scale)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("value", [0.95, 0.1, 1 / 3, 1e-30, 1e6, -0.7])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_tied_group_is_exactly_0(value, scale):
    """Rounding gives eight rewards of 0.95 a std of 6e-8: noise over noise is 0.9."""
    rewards = jnp.array([value] * 8 + [0.0, 1.0] * 4)
    for baseline in ("mean", "leave_one_out"):
        ours = group_advantages(rewards, 8, scale=scale, baseline=baseline, eps=1e-9)
        assert not ours[:8].any()
        assert ours[8:].all()


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float16, jnp.bfloat16])
def test_any_type_of_reward(dtype):
    ours = group_advantages(jnp.array([1, 0, 0, 1, 1, 0, 0, 0], dtype), 4)
    wanted = group_advantages(jnp.array([1.0, 0, 0, 1, 1, 0, 0, 0]), 4)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, wanted)


def test_infinite_rewards_are_left_out_as_nan_is():
    for bad in (jnp.inf, -jnp.inf):
        ours = group_advantages(jnp.array([1.0, bad, 0.0, 0.0]), 4)
        wanted = group_advantages(jnp.array([1.0, jnp.nan, 0.0, 0.0]), 4)
        np.testing.assert_array_equal(ours, wanted)


REWARDS = st.lists(st.integers(-8, 8), min_size=12, max_size=12)


@settings(max_examples=40, deadline=None)
@given(REWARDS, st.permutations(range(4)), st.integers(-50, 50))
def test_identities(rewards, order, shift):
    """Each group sums to 0; a shift changes nothing; a permutation permutes."""
    r = jnp.array(rewards, jnp.float32)
    ours = np.asarray(group_advantages(r, 4)).reshape(3, 4)
    np.testing.assert_allclose(ours.sum(-1), 0, atol=2e-6)
    shifted = group_advantages(r + shift, 4)
    np.testing.assert_allclose(shifted, ours.ravel(), rtol=1e-4, atol=2e-5)
    permuted = group_advantages(r.reshape(3, 4)[:, np.array(order)].ravel(), 4)
    np.testing.assert_allclose(permuted, ours[:, list(order)].ravel(), atol=2e-6)
    # RLOO is the mean baseline times G / (G - 1)
    loo = group_advantages(r, 4, scale="none", baseline="leave_one_out")
    mean = group_advantages(r, 4, scale="none")
    np.testing.assert_allclose(loo, np.asarray(mean) * 4 / 3, rtol=1e-5, atol=1e-5)
    # scaled by its std, a group that is not tied has std 1 (ddof 1)
    scaled = np.asarray(group_advantages(r, 4, eps=0.0)).reshape(3, 4)
    for group, reward in zip(scaled, np.asarray(r).reshape(3, 4), strict=True):
        tied = reward.min() == reward.max()
        assert np.std(group, ddof=1) == pytest.approx(0 if tied else 1, abs=1e-5)


def test_groups_do_not_mix():
    one = group_advantages(jnp.array([1.0, 0.0, 0.0]), 3)
    two = group_advantages(jnp.array([1.0, 0.0, 0.0, 9.0, 2.0, jnp.nan]), 3)
    np.testing.assert_array_equal(two[:3], one)


def test_jit_vmap_and_traced_eps():
    rewards = jnp.array([[1.0, 0, 0, 1], [0.0, 0, 0, 0], [0.0, 5, jnp.nan, 1]])
    mapped = jax.jit(
        jax.vmap(lambda r, eps: group_advantages(r, 2, eps=eps), in_axes=(0, None))
    )(rewards, 0.1)
    for row, ours in zip(rewards, mapped, strict=True):
        np.testing.assert_allclose(ours, group_advantages(row, 2, eps=0.1), rtol=1e-6)


def test_a_learned_reward_gets_a_finite_gradient():
    """Tied groups and NaN must not leak a NaN into a reward model's gradient."""
    rewards = jnp.array([1.0, 1.0, 1.0, 0.0, jnp.nan, 2.0])
    for scale in ("group", "batch", "none"):
        slope = jax.grad(lambda r, s=scale: group_advantages(r, 2, scale=s)[2])(rewards)
        assert jnp.isfinite(slope).all()


@pytest.mark.parametrize(
    ("message", "rewards", "options"),
    [
        ("scale='std'", [1.0, 2.0], dict(group_size=2, scale="std")),
        ("baseline='min'", [1.0, 2.0], dict(group_size=2, baseline="min")),
        ("has no group", [1.0, 2.0], dict(group_size=2, baseline="batch")),
        ("group_size=2", [1.0, 2.0, 3.0], dict(group_size=2)),
        ("group_size=0", [1.0, 2.0], dict(group_size=0)),
        ("rewards has shape", [[1.0, 2.0]], dict(group_size=2)),
    ],
)
def test_refuses(message, rewards, options):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.array(rewards), **options)


# --- several reward functions ------------------------------------------------------


def test_decoupled_by_hand():
    """std (ddof 0) of each column is 1/2 and 2: A = ±1 w_1 ±1 w_2."""
    rewards = jnp.array([[1.0, 0.0], [0.0, 4.0], [1.0, 4.0], [0.0, 0.0]])
    options = dict(ddof=0, eps=0.0)
    weights = jnp.array([1.0, 3.0])
    ours = decoupled_advantages(rewards, weights, 4, normalize_sum=False, **options)
    np.testing.assert_allclose(ours, [-2, 2, 4, -4], rtol=1e-6)
    ours = decoupled_advantages(rewards, weights, 4, **options)  # std of that: √10
    np.testing.assert_allclose(ours, np.array([-2, 2, 4, -4]) / 10**0.5, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_decoupled_reference(seed, x64):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 0.1, 0.5, 1.0, NAN], (15, 3))
    rewards[:5] = [0.3, NAN, 0.1]  # tied in every function
    rewards[7] = NAN
    weights = rng.uniform(0.1, 2, 3)
    total, scaled = reference_losses.decoupled_advantages(rewards, weights, 5)
    rewards, weights = jnp.array(rewards), jnp.array(weights)
    ours = decoupled_advantages(rewards, weights, 5)
    np.testing.assert_allclose(ours, scaled, rtol=1e-11, atol=1e-13)
    assert not ours[:5].any() and ours[7] == 0
    ours = decoupled_advantages(rewards, weights, 5, normalize_sum=False)
    np.testing.assert_allclose(ours, total, rtol=1e-11, atol=1e-13)


def test_decoupled_tells_apart_what_a_sum_does_not():
    """The rewards (0, 2) and (1, 1) have one sum; GDPO's example."""
    rewards = jnp.array([[0.0, 2.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    summed = group_advantages(rewards.sum(-1), 4)
    assert summed[0] == summed[1]
    skewed = jnp.array([1.0, 0.5])
    ours = decoupled_advantages(rewards, skewed, 4)
    assert ours[1] > ours[0] > ours[2] == ours[3]


def test_decoupled_with_one_function_is_the_group_advantage():
    rewards = jnp.array([1.0, 0.0, 0.0, 5.0, 2.0, NAN])
    ours = decoupled_advantages(rewards[:, None], None, 3, normalize_sum=False)
    np.testing.assert_array_equal(ours, group_advantages(rewards, 3))
    opposite = jnp.stack([rewards, -rewards], axis=1)
    assert not decoupled_advantages(opposite, None, 3, eps=0.0).any()


@pytest.mark.parametrize(
    ("message", "shape", "weights"),
    [
        ("rewards has shape", (4,), None),
        ("group_size=2", (3, 1), None),
        ("weights has shape", (4, 3), np.ones(2)),
    ],
)
def test_decoupled_refuses(message, shape, weights):
    with pytest.raises(ValueError, match=message):
        decoupled_advantages(jnp.zeros(shape), weights, 2)
