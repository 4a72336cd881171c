"""token_logprobs against every logit at once in numpy, both ways, and its memory.

Axes: B rows, T positions, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.generation.token_sampling import Sampling
from grpo_jax.models.logprobs import logprobs_from_logits, token_logprobs

D, V = 8, 29


def arrays(lead=(3, 7), dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (*lead, D)).astype(dtype)
    unembed = jax.random.normal(keys[1], (D, V)).astype(dtype)
    return hidden, unembed, jax.random.randint(keys[2], lead, 0, V)


def plain(hidden, unembed, targets, temperature=1.0):
    """Every logit at once: (outputs, gradients) in numpy, float64, by hand.

    The gradients are of Σ w logps + Σ v entropy, with the weights of `weights`.
    """
    h, u = (np.asarray(x, np.float64) for x in (hidden, unembed))
    temperature, hit = float(temperature), np.eye(u.shape[1])[np.asarray(targets)]
    z = h @ u / temperature
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    logps, entropy = (hit * log_p).sum(-1), -(p * log_p).sum(-1)
    w, v = (x[..., None] for x in weights(logps.shape))
    by_z = w * (hit - p) - v * p * (log_p + entropy[..., None])
    by_hidden = by_z @ u.T / temperature
    flat = h.reshape(-1, h.shape[-1]), by_z.reshape(-1, u.shape[1])
    by_unembed = flat[0].T @ flat[1] / temperature
    by_temperature = -(by_z * (h @ u)).sum() / temperature**2
    return (logps, entropy), (by_hidden, by_unembed, by_temperature)


def weights(shape):
    w = np.sin(np.arange(np.prod(shape, dtype=int))).reshape(shape)
    return w, 0.3 - w


@functools.partial(
    jax.jit,
    static_argnames=("f", "chunk"),
    compiler_options={"xla_backend_optimization_level": 0},  # compiles twice as fast
)
def ours(hidden, unembed, targets, temperature=1.0, *, chunk=None, f=token_logprobs):
    """The same (outputs, gradients) by token_logprobs and autodiff."""

    def total(hidden, unembed, temperature):
        logps, entropy = f(
            hidden, unembed, targets, temperature=temperature, chunk=chunk
        )
        w, v = weights(logps.shape)
        return (w * logps + v * entropy).sum(), (logps, entropy)

    grad = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, outputs), gradients = grad(hidden, unembed, temperature)
    return outputs, gradients


def assert_close(ours, theirs, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
def test_chunks_that_divide_or_do_not(chunk):
    x = (*arrays(), 0.7)
    assert_close(ours(*x, chunk=chunk), plain(*x))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4)])
def test_leading_axes(lead):
    x = (*arrays(lead), 1.3)
    outputs, slopes = ours(*x, chunk=2)
    assert outputs[0].shape == outputs[1].shape == lead
    assert_close((outputs, slopes), plain(*x))


@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0), (0, 1)])
def test_no_token_at_all(lead):
    hidden, unembed = jnp.ones((*lead, D)), jnp.ones((D, V))
    (logps, entropy), slopes = ours(hidden, unembed, jnp.zeros(lead, int))
    assert logps.shape == entropy.shape == lead
    assert not slopes[1].any() and not slopes[2].any()


def test_the_chunk_chosen_for_you(monkeypatch):
    """A vocabulary that exceeds the limit alone still gives one position at a time."""
    x = (*arrays((3, 5)), 0.9)
    for limit in (1, 3 * V * 2):
        limits = {"cpu": limit}
        monkeypatch.setattr("grpo_jax.models.kernels.tuning._LOGITS", limits)
        fresh = functools.partial(token_logprobs)  # not in jit's cache yet
        assert_close(ours(*x, f=fresh), plain(*x))


@pytest.mark.parametrize("tile", [1, 3, V - 1, V])
@pytest.mark.parametrize("positions", [1, 2, 100])
def test_tiles_of_the_vocabulary(tile, positions, monkeypatch):
    """For each token, where the last tile reaches back over another, and by chunks."""
    assert V % 3 and V % (V - 1)
    monkeypatch.setattr("grpo_jax.models.kernels.tuning._TILE", {"cpu": tile})
    monkeypatch.setattr(
        "grpo_jax.models.kernels.tuning._LOGITS", {"cpu": tile * positions}
    )
    hidden, unembed, _ = arrays((1, V))
    x = (hidden, unembed, jnp.arange(V)[None], 0.9)
    fresh = functools.partial(token_logprobs)  # not in jit's cache yet
    assert_close(ours(*x, f=fresh), plain(*x))


def test_temperature_flattens():
    """Against the closed form: two logits apart by 2 log 3 at temperature 2 are 3:1."""
    hidden, unembed = jnp.ones((1, 1)), jnp.array([[2 * np.log(3.0), 0.0]])
    logps, entropy = token_logprobs(hidden, unembed, jnp.array([0]), temperature=2.0)
    assert float(logps[0]) == pytest.approx(np.log(0.75), rel=1e-6)
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert float(entropy[0]) == pytest.approx(expected, rel=1e-6)


def test_the_gradients_by_hand_are_finite_differences():
    """So that `plain` is not wrong in the way that the code is wrong."""
    hidden, unembed, targets = (np.asarray(x) for x in arrays((4,)))
    point = [hidden.astype(np.float64), unembed.astype(np.float64), 0.8]
    w, v = weights((4,))

    def total(hidden, unembed, temperature):
        (logps, entropy), _ = plain(hidden, unembed, targets, temperature)
        return w @ logps + v @ entropy

    _, slopes = plain(point[0], point[1], targets, point[2])
    rng, step = np.random.default_rng(0), 1e-6
    for i, slope in enumerate(slopes):
        direction = rng.normal(0, 1, np.shape(slope))
        ends = []
        for sign in (1, -1):
            moved = list(point)
            moved[i] = moved[i] + sign * step * direction
            ends.append(total(*moved))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (slope * direction).sum() == pytest.approx(expected, rel=1e-6)


def test_bfloat16_keeps_logits_and_sums_in_float32():
    """bfloat16 in: the outputs are those of the rounded inputs in float32."""
    x = arrays(dtype=jnp.bfloat16)
    outputs, slopes = ours(*x, chunk=2)
    expected, theirs = plain(*x)
    assert outputs[0].dtype == outputs[1].dtype == jnp.float32
    assert slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
    assert_close(outputs, expected)
    for a, b in zip(slopes, theirs, strict=True):
        assert np.abs(np.asarray(a, np.float64) - b).max() < 2e-2 * np.abs(b).max()


def test_under_x64(x64):
    """The outputs stay float32; the gradients take the inputs' type."""
    hidden, unembed, targets = arrays()
    outputs, slopes = ours(hidden, unembed, targets, 0.7, chunk=3)
    assert_close((outputs, slopes), plain(hidden, unembed, targets, 0.7))
    hidden, unembed = hidden.astype(jnp.float64), unembed.astype(jnp.float64)
    double, slopes = ours(hidden, unembed, targets, 0.7)
    assert outputs[0].dtype == double[0].dtype == jnp.float32
    assert slopes[0].dtype == slopes[1].dtype == jnp.float64


def test_vmap_and_remat():
    hidden, unembed, targets = x = arrays((4, 6))
    (logps, entropy), (by_hidden, _, _) = plain(*x)

    def mapped(hidden, unembed, targets, temperature, chunk):
        one = lambda h, y: token_logprobs(h, unembed, y, chunk=chunk)  # noqa: E731
        return jax.checkpoint(jax.vmap(one))(hidden, targets)

    outputs, slopes = ours(*x, chunk=4, f=mapped)
    assert_close(outputs, (logps, entropy))
    assert_close(slopes[0], by_hidden)


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

    def f(*x, temperature, chunk):
        return sharded(*x)

    outputs, slopes = ours(hidden, unembed, targets, f=f)
    expected, theirs = plain(hidden, unembed, targets)
    assert_close((outputs, slopes[:2]), (expected, theirs[:2]))


@pytest.mark.parametrize("tile", [V, 8], ids=["at once", "in tiles"])
@pytest.mark.parametrize("offset", [0, 1e3, -1e3, 1e4])
def test_an_offset_of_all_logits_costs_no_digits(offset, tile, monkeypatch):
    """In steps that float32 can hold at the offset; the first of D is what adds it."""
    monkeypatch.setattr("grpo_jax.models.kernels.tuning._TILE", {"cpu": tile})

    def grid(seed, shape):
        return jnp.round(jax.random.normal(jax.random.key(seed), shape) * 8) / 8

    hidden = grid(0, (40, D)).at[:, 0].set(1.0)
    unembed = grid(1, (D, V)).at[0].set(offset)
    x = (hidden, unembed, jax.random.randint(jax.random.key(2), (40,), 0, V))
    fresh = functools.partial(token_logprobs)  # not in jit's cache yet
    (logps, entropy), slopes = ours(*x, f=fresh)
    expected, theirs = plain(*x)
    np.testing.assert_allclose(logps, expected[0], rtol=1e-6)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-6)
    np.testing.assert_allclose(slopes[0][:, 1:], theirs[0][:, 1:], atol=2e-6)
    # Σ_v ∂/∂z_v is 0; rounded, and then multiplied by the offset.
    np.testing.assert_allclose(slopes[0][:, 0], 0, atol=1e-6 * max(1, abs(offset)))
    np.testing.assert_allclose(slopes[1], theirs[1], atol=2e-6)
    np.testing.assert_allclose(slopes[2], theirs[2], rtol=2e-6)
    whole = logprobs_from_logits(hidden @ unembed, x[2])
    np.testing.assert_allclose(whole[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1], expected[1], atol=2e-6)
    keys, turns = jax.random.split(jax.random.key(0), 40), jnp.zeros(40, int)
    greedy, logp = Sampling(temperature=0)(hidden @ unembed, keys, turns)
    best, _ = plain(hidden, unembed, greedy)
    np.testing.assert_allclose(logp, best[0], atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_are_finite(size):
    hidden = jax.random.normal(jax.random.key(0), (6, V)) * size
    outputs, slopes = ours(hidden, jnp.eye(V), jnp.arange(6))
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
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < B * T * vocabulary * 4 / 4


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
    outputs = logprobs_from_logits(hidden @ unembed, targets, temperature=0.7)
    assert_close(outputs, plain(hidden, unembed, targets, 0.7)[0])


def test_from_logits_with_tokens_ruled_out():
    """-inf rules a token out: entropy, and both gradients, stay finite."""
    logits = jnp.array([[0.0, 0.0, -jnp.inf, 0.0]])
    logps, entropy = logprobs_from_logits(logits, jnp.array([1]))
    assert float(logps[0]) == pytest.approx(-np.log(3), rel=1e-6)
    assert float(entropy[0]) == pytest.approx(np.log(3), rel=1e-6)
    for i in range(2):
        f = lambda z, i=i: logprobs_from_logits(z, jnp.array([1]))[i][0]  # noqa: E731
        assert jnp.isfinite(jax.grad(f)(logits)).all()
