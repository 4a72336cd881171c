"""GAE: by hand, against TRL's loop and our own, holes, padding, its two limits.

Axes: B rows, T tokens.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses
from jax.sharding import PartitionSpec as P

import grpo_jax

# NumPy arrays go in, which jax takes and its type `Array` does not name.
gae: Any = grpo_jax.gae
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_dpo_ppo.npz")


def random_rows(seed, B=4, T=7):
    """Ragged rows with holes, an empty one; what is masked is NaN."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.6
    mask[1] = False
    rewards, values = rng.normal(0, 1, (2, B, T))
    return np.where(mask, rewards, np.nan), np.where(mask, values, np.nan), mask


def test_by_hand():
    """γ = 1/2, λ = 1/2, V = 1, 2, 4, r = 0, 1, 8."""
    rewards, values = jnp.array([[0.0, 1, 8]]), jnp.array([[1.0, 2, 4]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 3)), gamma=0.5, lam=0.5)
    # δ = 0 + 1 - 1, 1 + 2 - 2, 8 - 4; A_3 = 4, A_2 = 1 + 4/4, A_1 = 0 + 2/4
    np.testing.assert_allclose(advantages, [[0.5, 2, 4]])
    np.testing.assert_allclose(returns, [[1.5, 4, 8]])


def test_trl(x64):
    named = {k: float(GOLDEN[k]) for k in ("gamma", "lam")}
    arrays = (GOLDEN[k] for k in ("rewards", "values", "mask"))
    advantages, returns = gae(*arrays, **named)
    np.testing.assert_allclose(advantages, GOLDEN["advantages"], rtol=1e-12)
    np.testing.assert_allclose(returns, GOLDEN["returns"], rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_reference(seed, x64):
    arrays, rng = random_rows(seed), np.random.default_rng(seed)
    named = dict(gamma=rng.uniform(0, 1), lam=rng.uniform(0, 1))
    ours = gae(*arrays, **named)
    for x, expected in zip(ours, reference_losses.gae(*arrays, **named), strict=True):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, expected, rtol=1e-11, atol=1e-13)


def test_limits():
    """λ = 0: A is δ. γ = λ = 1: R is the sum of the later rewards, whatever V is."""
    rewards, values, mask = random_rows(5)
    later = np.where(mask, rewards, 0)[:, ::-1].cumsum(1)[:, ::-1]
    _, returns = gae(rewards, values, mask)
    np.testing.assert_allclose(returns, later * mask, rtol=1e-5, atol=1e-6)
    _, one_step = gae(rewards, values, mask, gamma=0.0)
    np.testing.assert_allclose(one_step, np.where(mask, rewards, 0), atol=1e-6)


def test_a_hole_is_as_if_it_were_not_there():
    rewards, values, mask = random_rows(6)
    ours = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    for b in range(4):
        kept = np.flatnonzero(mask[b])
        if kept.size == 0:
            assert not ours[0][b].any() and not ours[1][b].any()
            continue
        row = [x[b : b + 1, kept] for x in (rewards, values, mask)]
        short = gae(*row, gamma=0.9, lam=0.7)
        for whole, part in zip(ours, short, strict=True):
            np.testing.assert_allclose(whole[b, kept], part[0], rtol=1e-5, atol=1e-6)
            assert not whole[b, ~mask[b]].any()


def test_transforms():
    """jit with traced numbers, vmap, grad, half precision, shards of rows."""
    rewards, values, mask = (jnp.array(x) for x in random_rows(7))
    expected = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    f = jax.jit(lambda r, v, m, g, k: gae(r, v, m, gamma=g, lam=k))
    mapped = jax.vmap(f, in_axes=(0, 0, 0, None, None))(
        rewards[:, None], values[:, None], mask[:, None], 0.9, 0.8
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(gae, gamma=0.9, lam=0.8),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
    )(rewards, values, mask)
    for ours, rows, x in zip(sharded, mapped, expected, strict=True):
        np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows[:, 0], x, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda v: gae(rewards, v, mask, lam=0.5)[0].sum())(values)
    assert jnp.isfinite(slope).all() and slope[mask].any() and not slope[~mask].any()
    half = gae(rewards.astype(jnp.bfloat16), values.astype(jnp.bfloat16), mask)
    assert half[0].dtype == half[1].dtype == jnp.float32


@pytest.mark.parametrize(
    ("message", "shapes"),
    [
        ("rewards has shape", ((3,), (3,), (3,))),
        ("values has shape", ((2, 3), (2, 4), (2, 3))),
        ("mask has shape", ((2, 3), (2, 3), (2,))),
    ],
)
def test_refuses(message, shapes):
    with pytest.raises(ValueError, match=message):
        gae(*(jnp.zeros(s) for s in shapes))
