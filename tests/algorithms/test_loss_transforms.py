"""The losses under every type and transformation: vmap, shard_map, pmap, jit.

Axes: B rows, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses
from jax.sharding import PartitionSpec as P
from loss_cases import assert_same, batch, case, float_batch, run

from grpo_jax.algorithms.policy_losses import grpo_loss


def test_mask_types_are_equal():
    arrays = batch(6)
    results = run(
        [
            case(arrays, mask=arrays["mask"].astype(t))
            for t in (bool, np.int32, np.float32)
        ]
        + [case(arrays, mask=jnp.asarray(arrays["mask"], jnp.bfloat16))]
    )
    for loss, gradient, _ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)  # fused differently
        np.testing.assert_allclose(gradient, results[0][1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    """The inputs are rounded; nothing after that is."""
    half = run([case(batch(7))], jnp.dtype(dtype))[0]
    rounded = {
        k: np.asarray(jnp.asarray(x, x.dtype if x.dtype == bool else dtype), x.dtype)
        for k, x in batch(7).items()
    }
    full = run([case(rounded)])[0]
    assert half[0].dtype == np.float32 and half[1].dtype == dtype
    assert all(x.dtype == np.float32 for x in half[2].values())
    np.testing.assert_allclose(half[0], full[0], rtol=1e-6)
    np.testing.assert_allclose(half[1].astype(np.float32), full[1], rtol=1e-2)


def test_vmap_is_a_loop():
    batches = [float_batch(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

    def value(arrays, kl_coef):
        positional, named = case(arrays, kl_coef=kl_coef, importance="sequence")
        return grpo_loss(*positional, **named)[0]

    def slope(arrays, kl_coef):
        rest = {k: x for k, x in arrays.items() if k != "logps"}
        return jax.grad(lambda x: value(rest | {"logps": x}, kl_coef))(arrays["logps"])

    coefficients = jnp.array([0.0, 0.04, 1.0])
    both = jax.vmap(lambda *x: (value(*x), slope(*x)))
    values, slopes = jax.jit(both)(stacked, coefficients)
    cases = [
        case(batch(seed), kl_coef=k, importance="sequence")
        for seed, k in enumerate(coefficients)
    ]
    for i, expected in enumerate(run(cases)):
        assert_same((values[i], slopes[i]), expected, i)


@pytest.mark.parametrize("packed", [False, True])
def test_shards_sum_to_the_whole(packed):
    """shard_map over rows: with the normaliser the psum of the shards is the loss."""
    arrays = float_batch(8)
    options: dict = dict(importance="sequence")
    if packed:
        arrays["advantages"] = jnp.tile(arrays["advantages"][:, None], (1, 6))
        arrays["segment_ids"] = jnp.array([[0, 0, 1, 1, 1, 2]] * 4)
        options["num_segments"] = 12
    sequences = 12 if packed else 4

    def whole_loss(logps):
        positional, named = case(arrays | {"logps": logps}, **options)
        return grpo_loss(*positional, **named)[0]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rest = {k: x for k, x in arrays.items() if k != "logps"}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()
    )
    def sharded(logps, rest):
        positional, named = case(rest | {"logps": logps}, **options)
        loss, _ = grpo_loss(*positional, **named, normalizer=sequences)
        return jax.lax.psum(loss, "data")

    expected = jax.value_and_grad(whole_loss)(arrays["logps"])
    ours = jax.jit(jax.value_and_grad(lambda x: sharded(x, rest)))(arrays["logps"])
    assert_same(ours, expected, packed)


def test_pmap():
    arrays = float_batch(9)
    rows = {k: x[:, None] for k, x in arrays.items()}  # one row a device

    def one(logps, rest):
        def loss(logps):
            positional, named = case(rest | {"logps": logps})
            return grpo_loss(*positional, **named, normalizer=4)[0]

        value, gradient = jax.value_and_grad(loss)(logps)
        return jax.lax.psum(value, "devices"), gradient

    rest = {k: x for k, x in rows.items() if k != "logps"}
    loss, gradient = jax.pmap(one, axis_name="devices")(rows["logps"], rest)
    [expected] = run([case(batch(9))])
    assert_same((loss[0], gradient[:, 0]), expected, "pmap")


def test_new_numbers_do_not_compile_again(caplog):
    arrays = float_batch(10)

    def call(kl_coef, clip_low, clip_high, delta, normalizer):
        positional, named = case(arrays, kl_coef=kl_coef, clip_low=clip_low)
        numbers = dict(clip_high=clip_high, delta=delta, normalizer=normalizer)
        return float(grpo_loss(*positional, **named, **numbers)[0])

    first = call(0.04, 0.2, 0.3, 3.0, 4)
    with jax.log_compiles():
        caplog.clear()
        second = call(0.5, 0.1, 0.4, 2.0, 7)
    assert first != second
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_numbers_may_be_traced():
    arrays = float_batch(11)
    numbers = dict(kl_coef=0.3, clip_low=0.1, clip_high=0.25, delta=1.4, normalizer=9)
    numbers["max_length"] = 5.0

    @jax.jit
    def outer(numbers):
        positional, named = case(arrays, aggregate="constant")
        return grpo_loss(*positional, **named, **numbers)[0]

    positional, named = case(batch(11), aggregate="constant", **numbers)
    expected, _, _ = reference_losses.grpo(*positional, **named)
    assert float(outer(numbers)) == pytest.approx(expected, rel=1e-5)
    # and a gradient with respect to β is the aggregated KL, per unit
    slope = jax.grad(lambda b: outer(numbers | {"kl_coef": b}))(0.3)
    bare = float(outer(numbers | {"kl_coef": 0.0}))
    assert float(slope) == pytest.approx((expected - bare) / 0.3, rel=1e-4)


def test_only_logps_and_advantages_carry_a_gradient():
    arrays = float_batch(12)

    def loss(constants):
        positional, named = case(arrays | constants)
        return grpo_loss(*positional, **named)[0]

    constants = {k: arrays[k] for k in ("old_logps", "ref_logps", "weights")}
    for slope in jax.tree.leaves(jax.grad(loss)(constants)):
        assert not slope.any()
