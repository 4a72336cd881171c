"""The entropy bonus and truncated importance sampling of `grpo_loss`.

Axes: B rows, T tokens.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses
from loss_cases import AGGREGATES, batch, case, float_batch, run, same_metrics

from grpo_jax.algorithms.policy_losses import grpo_loss

RATIO = "sampling/importance_sampling_ratio"


def arrays_of(seed):
    arrays, rng = batch(seed), np.random.default_rng(seed + 100)
    arrays["sampler_logps"] = arrays["old_logps"] + rng.normal(0, 0.5, (4, 6))
    arrays["entropy"] = rng.exponential(1.0, (4, 6))
    return arrays


def test_by_hand():
    """ρ = 1, Â = 2; the sampler's ratios 4, 1, 1/2, held at 2; entropies 1, 2, 3."""
    logps = np.log([[0.4, 0.5, 0.3, 0.9]])
    base = dict(logps=logps, advantages=np.array([2.0]), kl_coef=0.0)
    base["mask"] = np.array([[1, 1, 1, 0]])
    off = dict(sampler_logps=logps - np.log([[4, 1, 0.5, 7]]), importance_cap=2.0)
    bonus = dict(entropy=np.array([[1.0, 2.0, 3.0, 99.0]]), entropy_coef=0.5)
    twice = dict(weights=np.array([[3.0, 1.0, 1.0, 5.0]]))
    expected = [
        (off, -2 * (2 + 1 + 0.5) / 3),
        (off | twice, -2 * (6 + 1 + 0.5) / 3),
        (off | dict(importance_cap=10.0), -2 * (4 + 1 + 0.5) / 3),
        (bonus, -2 - 0.5 * 2),
        (bonus | dict(aggregate="token_mean", normalizer=6), -(6 + 0.5 * 6) / 6),
        (bonus | dict(aggregate="constant", max_length=2), -(6 + 0.5 * 6) / 2),
    ]
    results = run([case(base, **named) for named, _ in expected])
    for (named, value), (loss, *_) in zip(expected, results, strict=True):
        assert loss == pytest.approx(value, rel=1e-6), named
    # the ratio of the policy itself is not cut: it carries the gradient, w is constant
    np.testing.assert_allclose(results[0][1], [[-4 / 3, -2 / 3, -1 / 3, 0]], rtol=1e-6)
    metrics = results[0][2]
    assert metrics[f"{RATIO}/min"] == pytest.approx(0.5, rel=1e-6)
    assert metrics[f"{RATIO}/mean"] == pytest.approx(3.5 / 3, rel=1e-6)
    assert metrics[f"{RATIO}/max"] == 2
    assert results[3][2]["entropy"] == 2
    assert results[3][2]["policy_loss"] == -2


def test_reference(x64):
    """Every aggregate and importance, with fractions in the mask and an empty row."""
    arrays = arrays_of(0)
    rng = np.random.default_rng(9)
    arrays["mask"] = arrays["mask"] * rng.choice([0.0, 1.0, 1.0, 0.25], (4, 6))
    arrays["mask"][2] = 0
    numbers = dict(importance_cap=1.3, entropy_coef=0.02, kl_coef=0.1)
    options = [dict(a, **numbers) for a in AGGREGATES]
    options += [dict(numbers, importance="sequence", normalizer=7)]
    options += [dict(numbers, old_logps=None, surrogate="cispo", clip_high=1.1)]
    cases = [case(arrays, **o) for o in options]
    for o, (positional, named), ours in zip(
        options, cases, run(cases, jnp.float64), strict=True
    ):
        loss, gradient, metrics = reference_losses.grpo(*positional, **named)
        np.testing.assert_allclose(ours[0], loss, rtol=1e-11, err_msg=str(o))
        np.testing.assert_allclose(ours[1], gradient, rtol=1e-9, atol=1e-14)
        same_metrics(ours[2], metrics, str(o), rel=1e-9)


def test_the_bonus_reaches_the_entropy_and_the_weights_reach_nothing():
    arrays = {k: jnp.asarray(x) for k, x in arrays_of(1).items()}

    def loss(entropy, sampler_logps):
        positional, named = case(arrays, importance_cap=2.0, entropy_coef=0.3)
        named |= dict(entropy=entropy, sampler_logps=sampler_logps)
        return grpo_loss(*positional, **named)[0]

    by_entropy, by_sampler = jax.grad(loss, argnums=(0, 1))(
        arrays["entropy"], arrays["sampler_logps"]
    )
    mask = np.asarray(arrays["mask"])
    expected = -0.3 * mask / mask.sum(-1, keepdims=True) / 4
    np.testing.assert_allclose(by_entropy, expected, rtol=1e-6)
    assert not by_sampler.any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_is_masked_may_hold_anything(garbage):
    clean = arrays_of(2)
    dirty = {
        k: np.where(clean["mask"], x, garbage) if x.ndim == 2 and k != "mask" else x
        for k, x in clean.items()
    }
    numbers = dict(importance_cap=2.0, entropy_coef=0.1)
    one, other = (jax.tree.leaves(run([case(x, **numbers)])) for x in (clean, dirty))
    for a, b in zip(one, other, strict=True):
        assert np.isfinite(a).all() and a.tobytes() == b.tobytes()


def test_a_batch_without_a_token_is_exactly_0():
    arrays = {k: np.full_like(x, np.nan, float) for k, x in arrays_of(3).items()}
    arrays["mask"] = np.zeros((4, 6), bool)
    [(loss, gradient, metrics)] = run(
        [case(arrays, importance_cap=2.0, entropy_coef=0.1)]
    )
    assert loss == 0 and not gradient.any()
    assert all(value == 0 for value in metrics.values()), metrics


def test_a_huge_gap_to_the_sampler_is_finite():
    arrays = arrays_of(4)
    arrays["sampler_logps"] = arrays["old_logps"] - 1e4
    cases = [case(arrays, importance_cap=c, entropy=None) for c in (2.0, math.inf)]
    capped, uncapped = run(cases)
    assert capped[2][f"{RATIO}/max"] == 2
    assert np.isfinite(uncapped[0]) and np.isfinite(uncapped[1]).all()


def test_parts_sum_to_the_whole():
    arrays, numbers = arrays_of(5), dict(importance_cap=1.5, entropy_coef=0.2)
    cases = [case(arrays, **numbers)]
    for part in (slice(0, 3), slice(3, 4)):
        rows = {k: x[part] for k, x in arrays.items()}
        cases.append(case(rows, normalizer=4, **numbers))
    whole, first, second = run(cases)
    assert first[0] + second[0] == pytest.approx(whole[0], rel=1e-6)


X, A = jnp.zeros((2, 3)), jnp.zeros(2)


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "entropy is None": dict(entropy_coef=0.1),
        "entropy has shape": dict(entropy=jnp.zeros((2, 1))),
        "sampler_logps has shape": dict(sampler_logps=A, importance_cap=2.0),
        "needed together": dict(sampler_logps=X),
        "and importance_cap are": dict(importance_cap=2.0),
    }.items(),
)
def test_refuses(message, options):
    with pytest.raises(ValueError, match=message):
        grpo_loss(X, A, X, ref_logps=X, **options)


def test_entropy_coef_0_needs_no_entropy_and_a_traced_one_does():
    arrays = float_batch(0)
    positional, named = case(arrays)
    for zero in (0, 0.0, np.float32(0)):
        assert "entropy" not in grpo_loss(*positional, **named, entropy_coef=zero)[1]
    with pytest.raises(ValueError, match="entropy is None"):
        jax.jit(lambda c: grpo_loss(*positional, **named, entropy_coef=c)[0])(0.0)
