"""Process supervision's advantages: by hand, against loops, and what must be 0.

Axes: N outputs, T tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses

import grpo_jax

# NumPy arrays go in, which jax takes and its type `Array` does not name.
process_advantages: Any = grpo_jax.process_advantages
NAN = float("nan")


def random_steps(seed, N=8, T=9):
    """Ragged: outputs of 0 to 4 steps; what is no step's end holds garbage."""
    rng = np.random.default_rng(seed)
    mask = rng.random((N, T)) < 0.3
    mask[1] = False
    rewards = np.where(mask, rng.choice([0.1, 0.5, 0.9], (N, T)), 1e30)
    return rewards, mask


BY_HAND = [
    # R = {1, 0, 1, 0}: mean 1/2, std (ddof 0) 1/2, so r̃ = ±1
    (
        dict(),
        [[0, 1, 0, 0], [0, 1, 0, 9]],
        [[0, 1, 0, 1], [1, 1, 0, 0]],
        [[0, 0, -1, -1], [0, 1, 0, 0]],
    ),
    (
        dict(ddof=1),
        [[0, 1, 0, 0], [0, 1, 0, 9]],
        [[0, 1, 0, 1], [1, 1, 0, 0]],
        [[0, 0, -math.sqrt(0.75), -math.sqrt(0.75)], [0, math.sqrt(0.75), 0, 0]],
    ),
    (dict(eps=0.5), [[2, 1], [9, 3]], [[0, 1], [0, 1]], [[-2 / 3] * 2, [2 / 3] * 2]),
    # an output without steps, and one whose step was not scored
    (
        dict(),
        [[1, 0, 7], [7, 7, 7], [NAN, 1, 0]],
        [[1, 1, 0], [0, 0, 0], [1, 1, 1]],
        [[0, -1, 0], [0, 0, 0], [0, 0, -1]],
    ),
    (dict(), [[NAN, 1], [7, 7]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]),  # one reward
    (dict(), [[0.95, 0.95], [7, 0.95]], [[1, 1], [0, 1]], [[0, 0], [0, 0]]),  # tied
    (dict(), [[7, 7], [7, 7]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]),  # no step at all
    (dict(), [[math.inf, 0], [7, 1]], [[1, 1], [0, 1]], [[-1, -1], [1, 1]]),
]


@pytest.mark.parametrize(("options", "rewards", "mask", "expected"), BY_HAND)
def test_by_hand(options, rewards, mask, expected):
    options = dict(group_size=len(rewards), ddof=0, eps=0.0) | options
    ours = process_advantages(jnp.array(rewards, float), jnp.array(mask), **options)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_reference(seed, x64):
    rewards, mask = random_steps(seed)
    rewards[mask & (np.random.default_rng(seed).random(mask.shape) < 0.1)] = NAN
    for ddof in (0, 1):
        ours = process_advantages(rewards, mask, 4, ddof=ddof)
        theirs = reference_losses.process_advantages(rewards, mask, 4, ddof=ddof)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def test_one_step_an_output_is_outcome_supervision():
    rng = np.random.default_rng(1)
    r = rng.choice([0.0, 0.3, 1.0], 12)
    lengths = rng.integers(1, 7, 12)
    ends = np.arange(6) == lengths[:, None] - 1
    ours = process_advantages(jnp.array(np.where(ends, r[:, None], NAN)), ends, 4)
    outcome = np.asarray(grpo_jax.group_advantages(jnp.array(r), 4))[:, None]
    np.testing.assert_allclose(
        ours, outcome * (np.arange(6) < lengths[:, None]), rtol=1e-5, atol=1e-6
    )


def test_tied_steps_are_exactly_0_and_padding_is_not_read():
    rewards = np.full((8, 5), 0.95, np.float32)
    ends = np.ones((8, 5), bool)
    ends[:, 3:] = False
    for garbage in (NAN, np.inf, 1e30, 0.0):
        rewards[:, 3:] = garbage
        assert not process_advantages(rewards, ends, 8, eps=1e-9).any()
    rewards, ends = random_steps(5)
    wide = np.pad(rewards, ((0, 0), (0, 3)), constant_values=NAN)
    padded = process_advantages(wide, np.pad(ends, ((0, 0), (0, 3))), 4)
    expected = process_advantages(rewards, ends, 4)
    np.testing.assert_allclose(padded[:, :9], expected, rtol=1e-5, atol=1e-6)
    assert not padded[:, 9:].any()


def test_groups_do_not_mix_and_outputs_permute():
    rewards, ends = random_steps(6)
    whole = process_advantages(rewards, ends, 4)
    first = process_advantages(rewards[:4], ends[:4], 4)
    np.testing.assert_allclose(whole[:4], first, rtol=1e-6, atol=1e-7)
    order = np.array([2, 0, 3, 1, 4, 7, 6, 5])
    permuted = process_advantages(rewards[order], ends[order], 4)
    np.testing.assert_allclose(permuted, whole[order], rtol=1e-5, atol=1e-6)


def test_transforms():
    """vmap is a loop, a mask of any type is the same, half precision is float32."""
    both = [random_steps(seed) for seed in (7, 8)]
    rewards, ends = (jnp.array(np.stack(x)) for x in zip(*both, strict=True))
    mapped = jax.jit(jax.vmap(lambda r, m: process_advantages(r, m, 4)))(rewards, ends)
    for r, m, ours in zip(rewards, ends, mapped, strict=True):
        expected = process_advantages(r, m, 4)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
        as_float = process_advantages(r, m.astype(float), 4)
        np.testing.assert_array_equal(as_float, expected)
    half = process_advantages(rewards[0].astype(jnp.bfloat16), ends[0], 4)
    assert half.dtype == jnp.float32


def test_a_learned_reward_gets_a_finite_gradient():
    rewards, ends = random_steps(9)
    rewards[ends & (rewards == 0.5)] = NAN
    slope = jax.grad(lambda r: jnp.square(process_advantages(r, ends, 4)).sum())(
        jnp.array(rewards, jnp.float32)
    )
    assert jnp.isfinite(slope).all() and not slope[~ends].any()


@pytest.mark.parametrize(
    ("message", "shapes", "group_size"),
    [
        ("step_rewards has shape", ((4,), (4,)), 2),
        ("step_mask has shape", ((4, 3), (4, 2)), 2),
        ("group_size=3", ((4, 3), (4, 3)), 3),
        ("group_size=0", ((4, 3), (4, 3)), 0),
    ],
)
def test_refuses(message, shapes, group_size):
    with pytest.raises(ValueError, match=message):
        process_advantages(jnp.zeros(shapes[0]), jnp.zeros(shapes[1]), group_size)
