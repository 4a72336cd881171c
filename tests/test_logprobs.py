"""token_logprobs against jax.nn.log_softmax, forward and backward, and its memory.

Axes: B rows, T positions, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.logprobs import logprobs_from_logits, token_logprobs

D, V = 8, 29


def arrays(lead=(3, 7), dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (*lead, D)).astype(dtype)
    unembed = jax.random.normal(keys[1], (D, V)).astype(dtype)
    return hidden, unembed, jax.random.randint(keys[2], lead, 0, V)


def plain(hidden, unembed, targets, temperature=1.0):
    """Every logit at once, in float32."""
    logits = hidden.astype(jnp.float32) @ unembed.astype(jnp.float32) / temperature
    log_p = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return logps, -(jnp.exp(log_p) * log_p).sum(-1)


@functools.partial(jax.jit, static_argnames=("f", "chunk"))
def with_gradients(hidden, unembed, targets, temperature, *, f, chunk=None):
    """(outputs, gradients of a weighted sum of both outputs); the weights differ."""
    more = {} if chunk is None else dict(chunk=chunk)

    def total(hidden, unembed, temperature):
        logps, entropy = f(hidden, unembed, targets, temperature=temperature, **more)
        w = jnp.sin(jnp.arange(logps.size)).reshape(logps.shape)
        return (w * logps + (0.3 - w) * entropy).sum(), (logps, entropy)

    grad = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, outputs), gradients = grad(hidden, unembed, temperature)
    return outputs, gradients


def assert_close(ours, theirs, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
def test_chunks_that_divide_or_do_not(chunk):
    x = (*arrays(), 0.7)
    expected = with_gradients(*x, f=plain)
    assert_close(with_gradients(*x, f=token_logprobs, chunk=chunk), expected)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (2, 1), (0, 3), (2, 0), (0, 1)])
def test_leading_axes(lead):
    x = (*arrays(lead), 1.3)
    logps, entropy = token_logprobs(*x[:3], temperature=x[3], chunk=2)
    assert logps.shape == entropy.shape == lead
    if logps.size:
        expected = with_gradients(*x, f=plain)
        assert_close(with_gradients(*x, f=token_logprobs, chunk=2), expected)


def test_the_chunk_chosen_for_you(monkeypatch):
    """A vocabulary that exceeds the limit alone still gives one position at a time."""
    import grpo_jax.logprobs as module

    x = (*arrays((3, 5)), 0.9)
    expected = with_gradients(*x, f=plain)
    for limit in (1, 3 * V * 2, 10**9):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", limit)
        fresh = lambda *a, **k: token_logprobs(*a, **k)  # noqa: E731 a new jit key
        assert_close(with_gradients(*x, f=fresh), expected)


def test_temperature_flattens():
    """Against the closed form: two logits apart by 2 log 3 at temperature 2 are 3:1."""
    hidden, unembed = jnp.ones((1, 1)), jnp.array([[2 * np.log(3.0), 0.0]])
    logps, entropy = token_logprobs(hidden, unembed, jnp.array([0]), temperature=2.0)
    assert float(logps[0]) == pytest.approx(np.log(0.75), rel=1e-6)
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert float(entropy[0]) == pytest.approx(expected, rel=1e-6)


def test_gradients_are_finite_differences(x64):
    """Nothing of jax's own softmax: numpy in float64, central differences."""
    hidden, unembed, targets = (np.asarray(x) for x in arrays((4,)))
    hidden, unembed = hidden.astype(np.float64), unembed.astype(np.float64)

    def total(h, u, t):
        z = h @ u / t
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        logps = np.log(p[np.arange(4), targets])
        return (logps * [1, 2, 3, 4] - (p * np.log(p)).sum(-1) * [1, -1, 2, 0.5]).sum()

    def ours(h, u, t):
        logps, entropy = token_logprobs(h, u, targets, temperature=t, chunk=3)
        return logps @ jnp.arange(1.0, 5) + entropy @ jnp.array([1, -1, 2, 0.5])

    slopes = jax.grad(ours, argnums=(0, 1, 2))(hidden, unembed, 0.8)
    rng = np.random.default_rng(0)
    for i, shape in enumerate((hidden.shape, unembed.shape, ())):
        direction = rng.normal(0, 1, shape)
        point, step = [hidden, unembed, 0.8], 1e-5
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[i] = moved[i] + sign * step * direction
            ends.append(total(*moved))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float((slopes[i] * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_bfloat16_keeps_logits_and_sums_in_float32():
    """bfloat16 in: the outputs are those of the rounded inputs in float32."""
    hidden, unembed, targets = arrays(dtype=jnp.bfloat16)
    x = (hidden, unembed, targets, 1.0)
    (logps, entropy), slopes = with_gradients(*x, f=token_logprobs, chunk=2)
    expected, theirs = with_gradients(*x, f=plain)
    assert logps.dtype == entropy.dtype == jnp.float32
    assert slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
    assert_close((logps, entropy), expected)
    for a, b in zip(slopes, theirs, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert float(jnp.abs(a - b).max() / jnp.abs(b).max()) < 2e-2


def test_float64_switch_changes_nothing(x64):
    """Under x64 the outputs stay float32 and the gradients take the inputs' type."""
    hidden, unembed, targets = arrays()
    x = (hidden, unembed, targets, 0.7)
    outputs, slopes = with_gradients(*x, f=token_logprobs, chunk=3)
    assert_close((outputs, slopes), with_gradients(*x, f=plain))
    double = with_gradients(
        hidden.astype(jnp.float64),
        unembed.astype(jnp.float64),
        targets,
        0.7,
        f=token_logprobs,
    )
    assert outputs[0].dtype == double[0][0].dtype == jnp.float32
    assert double[1][0].dtype == jnp.float64


def test_vmap_and_remat():
    hidden, unembed, targets = arrays((4, 6))
    f = functools.partial(token_logprobs, chunk=4)
    mapped = jax.vmap(f, in_axes=(0, None, 0))(hidden, unembed, targets)
    assert_close(mapped, f(hidden, unembed, targets))
    per_row = jax.vmap(jax.grad(lambda h, y: f(h, unembed, y)[0].sum()))
    whole = jax.grad(lambda h: f(h, unembed, targets)[0].sum())(hidden)
    assert_close(per_row(hidden, targets), whole)
    rematted = jax.grad(lambda h: jax.checkpoint(f)(h, unembed, targets)[0].sum())
    assert_close(rematted(hidden), whole)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Rows over the devices, the unembedding on each: the gradients are the whole's."""
    hidden, unembed, targets = arrays((8, 5))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("data")
    sharded = jax.shard_map(
        functools.partial(token_logprobs, chunk=2),
        mesh=mesh,
        in_specs=(rows, P(), rows),
        out_specs=(rows, rows),
        check_vma=check_vma,
    )

    def total(f, hidden, unembed):
        logps, entropy = f(hidden, unembed, targets)
        return (logps @ jnp.arange(5.0)).sum() + entropy.sum(), (logps, entropy)

    def run(f):
        grad = jax.value_and_grad(functools.partial(total, f), (0, 1), has_aux=True)
        return jax.jit(grad)(hidden, unembed)

    assert_close(run(sharded), run(plain))


def test_large_logits_keep_their_digits():
    """Logits near 1e4 that differ by less than 1, which is float32's last thousandth.

    log_softmax subtracts the largest first; so must we.
    """
    unembed = jnp.eye(V)
    hidden = 1e4 + jnp.round(jax.random.uniform(jax.random.key(0), (6, V)) * 64) / 64
    targets = jnp.arange(6)
    logps, entropy = token_logprobs(hidden, unembed, targets)
    expected = plain(hidden, unembed, targets)
    np.testing.assert_allclose(logps, expected[0], rtol=1e-6)
    last = np.spacing(np.float32(1e4))  # the entropy may lose a few of these
    np.testing.assert_allclose(entropy, expected[1], atol=4 * last)
    ours, theirs = (
        jax.grad(lambda h, f=f: f(h, unembed, targets)[0].sum())(hidden)
        for f in (token_logprobs, plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_are_finite(size):
    hidden = jax.random.normal(jax.random.key(0), (6, V)) * size
    x = (hidden, jnp.eye(V), jnp.arange(6), 1.0)
    outputs, slopes = with_gradients(*x, f=token_logprobs)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((outputs, slopes)))
    assert (outputs[0] <= 0).all()


@pytest.mark.parametrize("chunk", [64, None])
def test_memory_stays_far_below_all_logits(chunk):
    """Compiled, not run: forward and backward hold less than a quarter of [B, T, V]."""
    B, T, width, vocabulary = 8, 1024, 64, 32000

    def total(hidden, unembed, targets):
        logps, entropy = token_logprobs(hidden, unembed, targets, chunk=chunk)
        return (logps + 0.01 * entropy).sum()

    shapes = (
        jax.ShapeDtypeStruct((B, T, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.bfloat16),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < B * T * vocabulary * 4 / 4


def test_a_second_call_does_not_compile(caplog):
    x = arrays((2, 9))
    token_logprobs(*x)
    with jax.log_compiles():
        caplog.clear()
        token_logprobs(*x, temperature=0.5)
    assert not [r for r in caplog.records if "Compiling" in r.message]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("targets", dict(targets=jnp.zeros((3, 6), int))),
        ("unembed", dict(unembed=jnp.zeros((D + 1, V)))),
        ("chunk=0", dict(chunk=0)),
        ("chunk=-1", dict(chunk=-1)),
    ],
)
def test_refuses(message, change):
    hidden, unembed, targets = arrays()
    named = dict(hidden=hidden, unembed=unembed, targets=targets) | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**named)


def test_from_logits():
    hidden, unembed, targets = arrays()
    ours = logprobs_from_logits(hidden @ unembed, targets, temperature=0.7)
    assert_close(ours, plain(hidden, unembed, targets, 0.7))


def test_from_logits_with_tokens_ruled_out():
    """-inf rules a token out: entropy, and both gradients, stay finite."""
    logits = jnp.array([[0.0, 0.0, -jnp.inf, 0.0]])
    logps, entropy = logprobs_from_logits(logits, jnp.array([1]))
    assert float(logps[0]) == pytest.approx(-np.log(3), rel=1e-6)
    assert float(entropy[0]) == pytest.approx(np.log(3), rel=1e-6)
    for i in range(2):
        f = lambda z, i=i: logprobs_from_logits(z, jnp.array([1]))[i][0]  # noqa: E731
        assert jnp.isfinite(jax.grad(f)(logits)).all()
