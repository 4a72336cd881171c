"""PPO's two losses: TRL's values and gradients, by hand, packed, split, garbage.

Axes: B rows, T tokens.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import assert_same, batch, case, run

import grpo_jax

# NumPy arrays go in, which jax takes and its type `Array` does not name.
api: Any = grpo_jax
grpo_loss, ppo_loss, value_loss = api.grpo_loss, api.ppo_loss, api.value_loss
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_dpo_ppo.npz")


def value(*arrays, clipped=True, **options):  # `run` passes no None on
    options |= {} if clipped else dict(clip=None)
    return value_loss(*arrays, **options), {}


def values_of(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (4, 6))
    old, returns = values + rng.normal(0, 0.3, (2, 4, 6))
    return [values, old, returns, np.arange(6) < np.array([[6], [4], [1], [3]])]


def test_trl(x64):
    """Means over all tokens: aggregate="token_mean"."""
    names = ("logps", "old_logps", "advantages", "mask")
    policy = [GOLDEN[name] for name in names]
    values = [GOLDEN[k] for k in ("values", "old_values", "returns", "mask")]
    for i, clip in enumerate(GOLDEN["clips"]):
        for arrays, loss, options, name in (
            (policy, ppo_loss, dict(clip_low=clip, aggregate="token_mean"), "policy"),
            (values, value, dict(clip=clip), "value"),
        ):
            [ours] = run([(arrays, options)], jnp.float64, loss)
            assert ours[0].dtype == np.float64
            np.testing.assert_allclose(ours[0], GOLDEN[name][i], rtol=1e-12)
            np.testing.assert_allclose(
                ours[1], GOLDEN[f"{name}_gradient"][i], rtol=1e-10, atol=1e-15
            )


def test_policy_is_grpo_without_kl():
    """The paper's objective is a mean over outputs; every option of GRPO's holds."""
    arrays = batch(0)
    positional, named = case(arrays, ref_logps=None)
    options = [dict(), dict(clip_high=0.5, delta=1.3, normalizer=9.0)]
    ours = [
        ppo_loss(positional[0], arrays["old_logps"], *positional[1:], **o)
        for o in (dict(o, weights=arrays["weights"]) for o in options)
    ]
    for o, (loss, metrics) in zip(options, ours, strict=True):
        expected, theirs = grpo_loss(*positional, **named, **o, kl_coef=0.0)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
        assert metrics.keys() == theirs.keys()
    default, _ = ppo_loss(positional[0], arrays["old_logps"], *positional[1:])
    rows = [
        ppo_loss(*(x[i : i + 1] for x in (positional[0], arrays["old_logps"])), *rest)
        for i, rest in enumerate(
            (positional[1][i : i + 1], positional[2][i : i + 1]) for i in range(4)
        )
    ]
    mean = np.mean([float(loss) for loss, _ in rows])
    assert float(default) == pytest.approx(mean, rel=1e-6)


# V = 1, 0, 3 with V_old = 0 and R = 2, 0.5, 1: clipped at 0.2 to 0.2, 0, 0.2
HAND = [np.array([[1.0, 0.0, 3.0, 9.0]]), np.zeros((1, 4))]
HAND += [np.array([[2.0, 0.5, 1.0, 7.0]]), np.array([[1, 1, 1, 0]])]


def test_value_by_hand():
    cases = [
        (dict(clip=0.2), (1.8**2 + 0.25 + 4) / 6, [0, -0.5 / 3, 2 / 3, 0]),
        (dict(clipped=False), (1 + 0.25 + 4) / 6, [-1 / 3, -0.5 / 3, 2 / 3, 0]),
        (dict(clip=0.2, normalizer=6.0), (1.8**2 + 0.25 + 4) / 12, None),
    ]
    for options, loss, gradient in cases:
        [ours] = run([(HAND, options)], loss=value)
        assert ours[0] == pytest.approx(loss, rel=1e-6), options
        if gradient:
            np.testing.assert_allclose(ours[1], [gradient], rtol=1e-5, atol=1e-7)
    assert float(value_loss(HAND[0], None, *HAND[2:], clip=None)) == pytest.approx(
        5.25 / 6
    )


def test_value_packed_and_split():
    """Rows split, and the same sequences packed two a row, sum to the whole."""
    arrays = values_of(1)
    counts = dict(token_mean=14.0, sequence_mean=4.0)
    # rows 0 and 2 share a packed row, and 1 and 3: 6 + 1 and 4 + 3 tokens
    packed = [np.full((2, 7), np.nan) for _ in arrays[:3]]
    packed += [np.ones((2, 7), int)]
    places = ((0, 0), (1, 0), (0, 6), (1, 4))
    for x, y in zip(packed[:3], arrays[:3], strict=True):
        for i, (row, start) in enumerate(places):
            n = int(arrays[3][i].sum())
            x[row, start : start + n] = y[i, :n]
    ids = np.array([[0] * 6 + [1], [0] * 4 + [1] * 3])
    cases, parts = [], (slice(0, 1), slice(1, 4))
    for a, clipped in (("token_mean", True), ("sequence_mean", False)):
        cases.append((arrays, dict(aggregate=a, clipped=clipped)))
        options = dict(aggregate=a, clipped=clipped, normalizer=counts[a])
        cases += [([x[part] for x in arrays], options) for part in parts]
        cases.append((packed, dict(aggregate=a, clipped=clipped, segment_ids=ids)))
        for i in range(2):
            row = [x[i : i + 1] for x in packed]
            cases.append((row, dict(options, segment_ids=ids[i : i + 1])))
    results = iter(run(cases, loss=value))
    for _ in counts:
        whole, first, second, together, top, bottom = (next(results) for _ in range(6))
        gradient = np.concatenate([first[1], second[1]])
        assert_same((first[0] + second[0], gradient), whole, "split")
        assert together[0] == pytest.approx(whole[0], rel=1e-6)
        assert top[0] + bottom[0] == pytest.approx(whole[0], rel=1e-6)
        unpacked = np.zeros((4, 6))
        for i, (row, start) in enumerate(places):
            n = int(arrays[3][i].sum())
            unpacked[i, :n] = together[1][row, start : start + n]
        np.testing.assert_allclose(unpacked, whole[1], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
def test_value_of_what_is_masked_may_be_anything(garbage):
    clean = values_of(2)
    dirty = [np.where(clean[3], x, garbage) for x in clean[:3]] + clean[3:]
    one, other = (jax.tree.leaves(run([(x, {})], loss=value)) for x in (clean, dirty))
    for a, b in zip(one, other, strict=True):
        assert np.isfinite(a).all() and a.tobytes() == b.tobytes()
    nothing = [*dirty[:3], np.zeros((4, 6))]
    [(loss, gradient, _)] = run([(nothing, {})], loss=value)
    assert loss == 0 and not gradient.any()


def test_value_constants_and_types():
    arrays = [jnp.array(x) for x in values_of(3)]
    slopes = jax.grad(
        lambda old, returns: value_loss(arrays[0], old, returns, arrays[3]), (0, 1)
    )(*arrays[1:3])
    assert not any(x.any() for x in slopes)
    half = value_loss(*(x.astype(jnp.bfloat16) for x in arrays[:3]), arrays[3])
    assert half.dtype == jnp.float32
    mapped = jax.vmap(lambda *x: value_loss(*x, clip=0.1))(
        *(x[:, None] for x in arrays)
    )
    rows = [value_loss(*(x[i : i + 1] for x in arrays), clip=0.1) for i in range(4)]
    np.testing.assert_allclose(mapped, rows, rtol=1e-6)


X = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("message", "change", "options"),
    [
        ("values has shape", {0: X[0]}, {}),
        ("old_values has shape", {1: X[:1]}, {}),
        ("returns has shape", {2: X[:, :1]}, {}),
        ("mask has shape", {3: X[0]}, {}),
        ("old_values is None", {1: None}, {}),
        ("aggregate='constant'", {}, dict(aggregate="constant")),
        ("pass segment_ids", {}, dict(num_segments=2)),
    ],
)
def test_value_refuses(message, change, options):
    arrays = [change.get(i, X) for i in range(4)]
    with pytest.raises(ValueError, match=message):
        value_loss(*arrays, **options)
