"""DPO: by hand, TRL's values and gradients, padding, parts, masked garbage.

Axes: B pairs, T and S tokens of o+ and o-.
"""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import grpo_jax

# NumPy arrays go in, which jax takes and its type `Array` does not name.
dpo_loss: Any = grpo_jax.dpo_loss
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_dpo_ppo.npz")
NAMES = ("chosen", "rejected", "margins", "accuracies")


def run(*arrays, **options):
    """(loss, metrics, the gradients with respect to both sides' log π_θ)."""
    return jax.device_get(program(*arrays, **options))


@functools.partial(jax.jit, static_argnames="length_normalized")
def program(*arrays, **options):
    f = jax.value_and_grad(
        functools.partial(dpo_loss, **options), argnums=(0, 1), has_aux=True
    )
    (loss, metrics), gradients = f(*arrays)
    return loss, metrics, gradients


def pairs(seed, B=4, T=5, S=3):
    rng = np.random.default_rng(seed)
    chosen, ref_chosen = rng.normal(-1, 1, (2, B, T))
    rejected, ref_rejected = rng.normal(-1, 1, (2, B, S))
    masks = (np.arange(n) < rng.integers(1, n + 1, (B, 1)) for n in (T, S))
    return [chosen, rejected, ref_chosen, ref_rejected, *masks]


def test_by_hand():
    """log-ratios (ln 4, 0) against (ln 2): Δ = ln 2 of sums, 0 of means."""
    zeros = np.zeros((1, 2))
    chosen, rejected = np.log([[4.0, 1.0]]), np.log([[2.0, 99.0]])
    arrays = [chosen, rejected, zeros, zeros, np.array([[1, 1]]), np.array([[1, 0]])]
    loss, metrics, (up, down) = run(*arrays, beta=1.0)
    assert loss == pytest.approx(math.log(1.5))  # σ(ln 2) = 2/3
    expected = dict(chosen=math.log(4), rejected=math.log(2), margins=math.log(2))
    for name, value in expected.items():
        assert metrics[f"rewards/{name}"] == pytest.approx(value, rel=1e-6)
    assert metrics["rewards/accuracies"] == 1
    np.testing.assert_allclose(up, [[-1 / 3, -1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(down, [[1 / 3, 0]], rtol=1e-6)
    loss, metrics, (up, down) = run(*arrays, beta=0.5, length_normalized=True)
    assert loss == pytest.approx(math.log(2))
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-7)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * math.log(2), rel=1e-6)
    np.testing.assert_allclose(up, [[-0.125, -0.125]], rtol=1e-6)
    np.testing.assert_allclose(down, [[0.25, 0]], rtol=1e-6)


def test_trl(x64):
    x, y = np.split(GOLDEN["logps"], 2), np.split(GOLDEN["ref_logps"], 2)
    arrays = [*x, *y, *np.split(GOLDEN["mask"], 2)]
    cases = json.loads(str(GOLDEN["cases"]))
    metrics = json.loads(str(GOLDEN["dpo_metrics"]))
    for i, options in enumerate(cases):
        mean = options["loss"] == "sigmoid_norm"
        ours = run(*arrays, beta=options["beta"], length_normalized=mean)
        assert ours[0].dtype == jnp.float64
        np.testing.assert_allclose(ours[0], GOLDEN["dpo"][i], rtol=1e-12)
        np.testing.assert_allclose(
            np.concatenate(ours[2]), GOLDEN["dpo_gradient"][i], rtol=1e-10, atol=1e-14
        )
        assert ours[1].keys() == metrics[i].keys() == {f"rewards/{n}" for n in NAMES}
        if not mean:  # TRL's rewards are of sums in either case
            for name, value in metrics[i].items():
                assert ours[1][name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_a_pair_without_a_token_on_one_side_counts_as_0(length_normalized):
    """In the mean of the loss; the metrics are of the pairs that count."""
    arrays = pairs(0)
    options = dict(length_normalized=length_normalized)
    expected = run(*(x[:2] for x in arrays), **options)
    arrays[4][2] = False  # o+ of pair 2, o- of pair 3
    arrays[5][3] = False
    loss, metrics, gradients = run(*arrays, **options)
    assert loss == pytest.approx(expected[0] / 2, rel=1e-6)
    for ours, theirs in zip(gradients, expected[2], strict=True):
        np.testing.assert_allclose(ours[:2], theirs / 2, rtol=1e-5)
        assert not ours[2:].any()
    for name, value in expected[1].items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5)
    alone, _, _ = run(*arrays, normalizer=2, **options)
    assert alone == pytest.approx(expected[0], rel=1e-6)
    nothing = [x if x.dtype != bool else x & False for x in arrays]
    loss, metrics, gradients = run(*nothing, normalizer=0, **options)
    assert loss == 0 and not any(jax.tree.leaves(metrics))
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_what_is_masked_may_hold_anything(garbage):
    clean = pairs(1)
    masks = [clean[4], clean[5]] * 2
    dirty = [np.where(m, x, garbage) for m, x in zip(masks, clean, strict=False)]
    # as numbers: XLA makes a bool times NaN a select, which would hide a product
    numbers = [m.astype(float) for m in clean[4:]]
    one, other = (jax.tree.leaves(run(*x, *numbers)) for x in (clean[:4], dirty))
    for a, b in zip(one, other, strict=True):
        assert np.isfinite(a).all() and np.asarray(a).tobytes() == b.tobytes()


def test_parts_padding_and_order():
    arrays = pairs(2)
    loss, _, (up, down) = run(*arrays)
    halves = (slice(0, 2), slice(2, 4))
    parts = [run(*(x[half] for x in arrays), normalizer=4) for half in halves]
    assert parts[0][0] + parts[1][0] == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(
        np.concatenate([p[2][0] for p in parts]), up, rtol=1e-5, atol=1e-7
    )
    order = np.array([3, 1, 0, 2])
    moved = run(*(np.pad(x[order], ((0, 0), (0, 2))) for x in arrays))
    assert moved[0] == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(moved[2][1][:, :3], down[order], rtol=1e-5, atol=1e-7)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(*rows):
        return jax.lax.psum(dpo_loss(*rows, normalizer=4)[0], "data")

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert float(jax.jit(sharded)(*arrays)) == pytest.approx(loss, rel=1e-6)


def test_huge_margins_are_finite():
    """-log σ(-x) is x: no overflow, and a pair that is right by far moves nothing."""
    ones = np.ones((1, 1))
    for size in (1e3, 1e30):
        loss, _, gradients = run(-size * ones, ones, ones, ones, ones, ones)
        assert loss == pytest.approx(0.1 * size, rel=1e-2)
        assert gradients[0] == pytest.approx(-0.1)
        loss, _, gradients = run(size * ones, ones, ones, ones, ones, ones)
        assert loss == 0 and gradients[0] == 0


def test_only_the_policy_carries_a_gradient():
    arrays = [jnp.array(x) for x in pairs(3)]
    slopes = jax.grad(lambda *ref: dpo_loss(*arrays[:2], *ref, *arrays[4:])[0], (0, 1))
    assert not any(g.any() for g in slopes(*arrays[2:4]))
    half = [x.astype(jnp.bfloat16) if x.dtype != bool else x for x in arrays]
    assert dpo_loss(*half)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("message", "place", "shape"),
    [
        ("chosen_logps has shape", 0, (4,)),
        ("rejected_logps has shape", 1, (4,)),
        ("ref_chosen_logps has shape", 2, (4, 3)),
        ("ref_rejected_logps has shape", 3, (4, 5)),
        ("chosen_mask has shape", 4, (4, 1)),
        ("rejected_mask has shape", 5, (2, 3)),
    ],
)
def test_refuses(message, place, shape):
    arrays = pairs(4)
    arrays[place] = np.zeros(shape)
    with pytest.raises(ValueError, match=message):
        dpo_loss(*arrays)


def test_refuses_rows_that_are_not_pairs():
    five, four = np.zeros((5, 2)), np.zeros((4, 2))
    with pytest.raises(ValueError, match="5 chosen rows, 4 rejected"):
        dpo_loss(five, four, five, four, five, four)
