"""The losses' values: against TRL's, the reference, by hand; what is refused.

Axes: B rows, T tokens.
"""

import itertools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses
from loss_cases import (
    AGGREGATES,
    ARRAYS,
    IMPORTANCE,
    KL,
    SURROGATES,
    batch,
    case,
    run,
    same_metrics,
)

from grpo_jax.algorithms.policy_losses import grpo_loss, sft_loss

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_losses.npz")
LN2 = math.log(2)


# --- TRL 1.16 --------------------------------------------------------------------


def trl_case(options):
    aggregate = dict(
        grpo="sequence_mean",
        bnpo="token_mean",
        dapo="token_mean",
        dr_grpo="constant",
        cispo="token_mean",
    )
    named = dict(
        kl_coef=options["beta"],
        aggregate=aggregate[options["loss_type"]],
        importance=options["importance_sampling_level"],
        clip_low=options.get("epsilon_low", 0.2),
        clip_high=options.get("epsilon_high", 0.2),
        delta=options.get("delta"),
    )
    if options["loss_type"] == "dr_grpo":
        named["max_length"] = int(GOLDEN["max_length"])
    if options["loss_type"] == "cispo":
        named["surrogate"] = "cispo"
    if options.get("num_items"):
        named["normalizer"] = int(GOLDEN["num_items"])
    if options.get("use_bias_correction_kl"):
        named["kl_estimator"] = "k3_unbiased"
    if options["beta"]:
        named["ref_logps"] = GOLDEN["ref_logps"]
    if options.get("old"):
        named["old_logps"] = GOLDEN["old_logps"]
    if options.get("weights"):
        named["weights"] = GOLDEN["weights"]
    mask = GOLDEN["mask"] * (GOLDEN["tool_mask"] if options.get("tool_mask") else 1)
    which = "token_advantages" if options.get("token_advantages") else "advantages"
    return [GOLDEN["logps"], GOLDEN[which], mask], named


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_trl(dtype, tolerance):
    every = 1 if dtype == "float64" else 3  # the same code: a third is enough
    options = json.loads(str(GOLDEN["cases"]))[::every]
    theirs = json.loads(str(GOLDEN["metrics"]))[::every]
    losses, gradients = GOLDEN["loss"][::every], GOLDEN["gradient"][::every]
    with jax.enable_x64(dtype == "float64"):
        ours = run([trl_case(o) for o in options], dtype)
    for i, (loss, gradient, metrics) in enumerate(ours):
        where = str(options[i])
        assert loss.dtype == gradient.dtype == dtype
        np.testing.assert_allclose(
            loss, losses[i], rtol=tolerance, atol=tolerance, err_msg=where
        )
        np.testing.assert_allclose(
            gradient,
            gradients[i],
            rtol=tolerance,
            atol=tolerance / 10,
            err_msg=where,
        )
        # TRL counts clips of sequence-level ratios by sequence, we by token
        for name, value in theirs[i].items():
            if name == "kl" or options[i]["importance_sampling_level"] == "token":
                assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), where


# --- the second implementation, for every combination ------------------------------


@pytest.mark.parametrize("draw", range(5))
def test_reference(x64, draw):
    """Every estimator, importance and surrogate; every aggregate with each of them."""
    rng = np.random.default_rng(draw)
    arrays = batch(draw, lengths=(6, 4, 0, 3))
    arrays["mask"] = arrays["mask"] * rng.choice([0.0, 1.0, 1.0, 0.25], (4, 6))
    arrays["advantages"] = rng.normal(0, 1, (4, 6))
    cases = []
    grid = itertools.product(KL, IMPORTANCE, SURROGATES)
    for i, (estimator, importance, surrogate) in enumerate(grid):
        named = dict(kl_estimator=estimator, importance=importance)
        named |= surrogate | AGGREGATES[i % 4]
        named |= dict(kl_coef=rng.uniform(0, 1), normalizer=rng.integers(1, 9))
        if surrogate["surrogate"] == "clip":
            named |= dict(clip_low=0.1 * draw, clip_high=0.28, delta=1.2 + draw / 3)
        else:
            named |= dict(clip_high=0.8 + draw / 3)
        cases.append(case(arrays, **named))
    plain = arrays | dict(advantages=arrays["advantages"][:, 0], weights=None)
    for aggregate, importance in itertools.product(AGGREGATES, IMPORTANCE):
        named = dict(aggregate, importance=importance)
        cases.append(case(plain, **named, clip_low=0.1, clip_high=0.3))
    cases.append(case(plain, old_logps=None))
    expected = [
        reference_losses.grpo(*positional, **named) for positional, named in cases
    ]
    for (_, keywords), ours, theirs in zip(
        cases, run(cases, jnp.float64), expected, strict=True
    ):
        where = str({k: v for k, v in keywords.items() if k not in ARRAYS})
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-11, err_msg=where)
        np.testing.assert_allclose(
            ours[1], theirs[1], rtol=1e-9, atol=1e-14, err_msg=where
        )
        same_metrics(ours[2], theirs[2], where, rel=1e-9)


# --- by hand ---------------------------------------------------------------------

# Row 1: ρ = 1.25, 1, 0.5 and Â = 1. Row 2: ρ = 0.5, 2 and Â = -1; its third is padding.
_LOGPS = np.log([[0.5, 0.25, 0.2], [0.1, 0.4, 0.9]])
HAND = dict(
    logps=_LOGPS,
    advantages=np.array([1.0, -1.0]),
    mask=np.array([[1, 1, 1], [1, 1, 0]]),
    old_logps=_LOGPS - np.log([[1.25, 1.0, 0.5], [0.5, 2.0, 7.0]]),
)
# π_ref/π_θ = 2, 1, 1/2 and 1/2, 4
HAND_REF = dict(ref_logps=_LOGPS + np.log([[2, 1, 0.5], [0.5, 4, 7]]))
# -min(ρÂ, clip(ρ)Â): row 1 -1.2, -1, -0.5; row 2 0.8, 2
HAND_POLICY = (-2.7 / 3 + 2.8 / 2) / 2
HAND_WEIGHTS = np.array([[0.5, 1.0, 2.0], [1.0, 0.25, 9.0]])
BY_HAND = [
    (dict(kl_coef=0.0), HAND_POLICY),
    (dict(kl_coef=0.0, aggregate="token_mean"), (-2.7 + 2.8) / 5),
    (
        dict(kl_coef=0.0, aggregate="constant", max_length=4),
        (-2.7 + 2.8) / (2 * 4),
    ),
    (dict(kl_coef=0.0, aggregate="sequence_sum"), (-2.7 + 2.8) / 2),
    (dict(kl_coef=0.0, delta=1.5), (-2.7 / 3 + 2.3 / 2) / 2),
    (dict(kl_coef=0.0, clip_high=0.3), (-2.75 / 3 + 2.8 / 2) / 2),
    (dict(kl_coef=0.0, clip_low=0.6, clip_high=0.2), (-2.7 / 3 + 2.5 / 2) / 2),
    (dict(kl_coef=0.0, normalizer=8), (-2.7 / 3 + 2.8 / 2) / 8),
    (dict(kl_coef=0.0, normalizer=8, aggregate="token_mean"), (-2.7 + 2.8) / 8),
    (
        dict(kl_coef=0.0, normalizer=8, aggregate="constant", max_length=4),
        (-2.7 + 2.8) / (8 * 4),
    ),
    (dict(kl_coef=0.0, weights=HAND_WEIGHTS), (-2.6 / 3 + 1.3 / 2) / 2),
    # ρ_1 = (1.25 · 1 · 0.5)^(1/3), ρ_2 = (0.5 · 2)^(1/2) = 1
    (dict(kl_coef=0.0, importance="sequence"), (-(0.625 ** (1 / 3)) + 1) / 2),
    (
        dict(kl_coef=0.0, surrogate="cispo", clip_high=1.2),
        (
            -(1.2 * math.log(0.5) + math.log(0.25) + 0.5 * math.log(0.2)) / 3
            + (0.5 * math.log(0.1) + 1.2 * math.log(0.4)) / 2
        )
        / 2,
    ),
    (
        dict(kl_coef=1.0, kl_estimator="k1", **HAND_REF),
        HAND_POLICY + (0 + (LN2 - 2 * LN2) / 2) / 2,
    ),
    (
        dict(kl_coef=1.0, kl_estimator="k2", **HAND_REF),
        HAND_POLICY + (LN2**2 / 3 + 2.5 * LN2**2 / 2) / 2,
    ),
    (
        dict(kl_coef=1.0, kl_estimator="k3", **HAND_REF),
        HAND_POLICY + (0.5 / 3 + (2.5 - LN2) / 2) / 2,
    ),
    (
        dict(kl_coef=0.5, kl_estimator="k3_unbiased", **HAND_REF),
        HAND_POLICY + 0.5 * ((1 - 0.75 * LN2) / 3 + (5.75 - 3.5 * LN2) / 2) / 2,
    ),
]


def test_by_hand():
    results = run([case(HAND, **keywords) for keywords, _ in BY_HAND])
    for (keywords, expected), (loss, _, metrics) in zip(BY_HAND, results, strict=True):
        assert loss == pytest.approx(expected, rel=2e-6, abs=1e-7), keywords
        assert metrics["num_tokens"] == 5
    _, _, metrics = results[0]
    # of five tokens: ρ = 1.25 with Â > 0 is held above, ρ = 0.5 with Â < 0 below
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 5)
    _, _, metrics = results[-2]  # k3, the mean over tokens
    assert metrics["kl"] == pytest.approx((0.5 + 2.5 - LN2) / 5)
    assert metrics["policy_loss"] == pytest.approx(HAND_POLICY)


def test_gradient_by_hand():
    """Only tokens inside the clip move: 1 and 1/2 of row 1, and ρ = 2 of row 2."""
    [(_, gradient, _)] = run([case(HAND, kl_coef=0.0)])
    expected = [[0, -1 / 6, -0.5 / 6], [0, 2 / 4, 0]]
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


# --- refusals --------------------------------------------------------------------

X, A = jnp.zeros((2, 3)), jnp.zeros(2)
WRONG = {
    "kl_estimator='k4'": dict(kl_estimator="k4"),
    "aggregate='mean'": dict(aggregate="mean"),
    "importance='row'": dict(importance="row"),
    "surrogate='ppo'": dict(surrogate="ppo"),
    "ref_logps is None": dict(ref_logps=None),
    "needs max_length": dict(aggregate="constant"),
    "needs clip_high": dict(surrogate="cispo"),
    "logps has shape": dict(logps=jnp.zeros(3)),
    "mask has shape": dict(mask=jnp.ones((2, 1))),
    "old_logps has shape": dict(old_logps=jnp.zeros((2, 4))),
    "ref_logps has shape": dict(ref_logps=jnp.zeros((1, 3))),
    "weights has shape": dict(weights=jnp.zeros((2, 1))),
    "segment_ids has shape": dict(segment_ids=jnp.zeros(3, int)),
    "advantages has shape": dict(advantages=jnp.zeros((2, 1))),
    "need advantages of shape": dict(segment_ids=jnp.zeros((2, 3), int)),
}


@pytest.mark.parametrize("message", WRONG)
def test_grpo_refuses(message):
    arguments: dict[str, Any] = dict(logps=X, advantages=A, mask=X, ref_logps=X)
    arguments |= WRONG[message]
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        grpo_loss(**arguments)


def test_a_traced_kl_coef_needs_the_reference():
    with pytest.raises(ValueError, match="ref_logps is None"):
        jax.jit(lambda b: grpo_loss(X, A, X, kl_coef=b)[0])(0.0)


def test_kl_coef_0_needs_no_reference():
    for zero in (0, 0.0, np.float32(0), jnp.zeros(())):
        loss, metrics = grpo_loss(X, A, X, kl_coef=zero)
        assert float(loss) == 0 and "kl" not in metrics


# --- SFT -------------------------------------------------------------------------


def test_sft_by_hand():
    logps = np.log([[0.5, 0.25, 0.9], [0.125, 0.7, 0.7]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    packed = dict(segment_ids=np.array([[0, 1, 2], [0, 0, 0]]))
    weights = np.array([[2.0, 0.0, 9.0], [1.0, 9.0, 9.0]])
    expected = [
        (dict(), (1.5 * LN2 + 3 * LN2) / 2),
        (dict(aggregate="token_mean"), 6 * LN2 / 3),
        (dict(aggregate="token_mean", normalizer=12), 6 * LN2 / 12),
        (dict(normalizer=5), 4.5 * LN2 / 5),
        (dict(weights=weights), (1.0 * LN2 + 3 * LN2) / 2),
        (packed, (1 + 2 + 3) * LN2 / 3),
        (dict(num_segments=4, **packed), (1 + 2 + 3) * LN2 / 4),
    ]
    results = run([([logps, mask], named) for named, _ in expected], loss=sft_loss)
    for (named, value), (loss, _, metrics) in zip(expected, results, strict=True):
        assert loss == pytest.approx(value, rel=1e-6), named
        assert metrics["num_tokens"] == 3
    assert results[0][2]["nll"] == pytest.approx(2 * LN2)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean"])
def test_sft_is_grpo_with_coefficient_1(aggregate):
    """The unified paradigm (5.2): GC = 1 is the on-policy gradient at Â = 1."""
    arrays = batch(13)
    plain = [arrays["logps"], arrays["mask"]]
    [sft] = run([(plain, dict(aggregate=aggregate))], loss=sft_loss)
    ones = dict(arrays, advantages=np.ones(4), old_logps=None, weights=None)
    [grpo] = run([case(ones, kl_coef=0.0, aggregate=aggregate)])
    np.testing.assert_allclose(sft[1], grpo[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("message", "arguments"),
    {
        "aggregate": dict(aggregate="mean"),
        "constant": dict(aggregate="constant"),
        "mask has shape": dict(mask=jnp.ones((2, 1))),
        "weights has shape": dict(weights=jnp.ones((1, 3))),
        "logps has shape": dict(logps=jnp.zeros(3)),
    }.items(),
)
def test_sft_refuses(message, arguments):
    with pytest.raises(ValueError, match=message):
        sft_loss(**(dict(logps=X, mask=X) | arguments))
