"""The losses against TRL's, against `reference.py`, by hand, and by their identities.

Axes: B rows, T tokens.
"""

import functools
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from grpo_jax.losses import grpo_loss, sft_loss

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "trl_losses.npz")
ARRAYS = ("old_logps", "ref_logps", "weights", "segment_ids")
AGGREGATES = (
    dict(aggregate="sequence_mean"),
    dict(aggregate="token_mean"),
    dict(aggregate="constant", max_length=9),
)
IMPORTANCE = ("token", "sequence")
SURROGATES = (dict(surrogate="clip"), dict(surrogate="cispo", clip_high=1.3))
KL = ("k1", "k2", "k3", "k3_unbiased")
LN2 = math.log(2)


NUMBERS = ("normalizer", "clip_low", "clip_high", "delta", "kl_coef", "max_length")


# Compiling is what these tests cost: all cases of a call are one program, and numbers
# are traced, so that the same list of cases on other values compiles nothing.
@functools.partial(
    jax.jit,
    static_argnames=("loss", "signature"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _program(table, numbers, *, loss, signature):
    results = []
    for (positional, arrays, options), values in zip(signature, numbers, strict=True):
        arrays = {name: table[i] for name, i in arrays}
        f = functools.partial(loss, **arrays, **values, **dict(options))
        (value, metrics), gradient = jax.value_and_grad(f, has_aux=True)(
            *(table[i] for i in positional)
        )
        results.append((value, gradient, metrics))
    return results


def run(cases, dtype=jnp.float32, loss=grpo_loss):
    """[(positional arrays, keywords)] -> [(loss, gradient, metrics)]."""
    table, places = [], {}

    def place(x):
        if id(x) not in places:
            array = jnp.asarray(x)
            floats = jnp.issubdtype(array.dtype, jnp.floating)
            places[id(x)] = len(table)
            table.append(array.astype(dtype) if floats else array)
        return places[id(x)]

    signature, numbers = [], []
    for positional, keywords in cases:
        keywords = {k: v for k, v in keywords.items() if v is not None}
        arrays = tuple((k, place(keywords.pop(k))) for k in ARRAYS if k in keywords)
        values = {k: float(keywords.pop(k)) for k in NUMBERS if k in keywords}
        if "ref_logps" not in dict(arrays) and values.get("kl_coef") == 0:
            keywords["kl_coef"] = values.pop("kl_coef")  # only a known 0 needs no ref
        options = tuple(sorted(keywords.items()))
        signature.append((tuple(place(x) for x in positional), arrays, options))
        numbers.append(values)
    results = _program(table, numbers, loss=loss, signature=tuple(signature))
    return jax.device_get(results)


def same_metrics(ours, theirs, where, rel=1e-5):
    assert ours.keys() == theirs.keys(), where
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=rel, abs=1e-7), (name, where)


def batch(seed, B=4, T=6, lengths=(6, 4, 1, 3)):
    """Ragged arrays whose ratios reach every branch of the clip."""
    rng = np.random.default_rng(seed)
    logps = -rng.exponential(1.0, (B, T))
    return dict(
        logps=logps,
        advantages=rng.normal(0, 1, B),
        mask=np.arange(T) < np.array(lengths)[:, None],
        old_logps=logps + rng.normal(0, 0.4, (B, T)),
        ref_logps=logps + rng.normal(0, 0.6, (B, T)),
        weights=rng.uniform(0.2, 2.0, (B, T)),
    )


def case(arrays, **keywords):
    """A batch as (positional, keywords); keywords override its arrays."""
    arrays = {**arrays, **keywords}
    positional = [arrays.pop(name) for name in ("logps", "advantages", "mask")]
    return positional, arrays


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
        named |= surrogate | AGGREGATES[i % 3]
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
    expected = [reference.grpo(*positional, **named) for positional, named in cases]
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


# --- identities ------------------------------------------------------------------


def test_on_policy_gradient_is_reinforce_with_the_papers_coefficient():
    """At π_old = π_θ: -1/B 1/|o_i| GC, GC = Â + β(π_ref/π_θ - 1) (appendix A)."""
    arrays = batch(0)
    logps, ref, mask = (arrays[k] for k in ("logps", "ref_logps", "mask"))
    a = arrays["advantages"][:, None]
    shared = dict(weights=None)
    cispo = dict(surrogate="cispo", clip_high=5.0, **shared)
    results = run(
        [
            case(arrays, old_logps=None, kl_coef=0.0, **shared),
            case(arrays, old_logps=logps, kl_coef=0.0, **shared),
            case(arrays, old_logps=None, kl_coef=0.04, **shared),
            case(arrays, old_logps=None, kl_coef=0.0, **cispo),
        ]
    )
    scale = mask / mask.sum(-1, keepdims=True) / 4
    reinforce = -a * scale
    for i in (0, 1, 3):
        np.testing.assert_allclose(results[i][1], reinforce, rtol=1e-6)
    coefficient = a + 0.04 * (np.exp(ref - logps) - 1)
    np.testing.assert_allclose(results[2][1], -coefficient * scale, rtol=2e-6)


GRID = [(a, i, SURROGATES[0]) for a in AGGREGATES for i in IMPORTANCE]
GRID.append((AGGREGATES[0], "token", SURROGATES[1]))


def count(arrays, aggregate):
    """The normaliser: tokens for token_mean, else sequences."""
    tokens = aggregate["aggregate"] == "token_mean"
    return int(arrays["mask"].sum()) if tokens else len(arrays["mask"])


def run_grid(arrays, kl_coef=0.04, **named):
    cases = [dict(**a, importance=i, **s, kl_coef=kl_coef) for a, i, s in GRID]
    return run([case(arrays, **c, **named) for c in cases])


@pytest.fixture(scope="module")
def whole():
    """The loss and gradient of one batch for every aggregate, importance, surrogate."""
    arrays = batch(1)
    return arrays, run_grid(arrays)


def assert_same(ours, loss, gradient, where):
    np.testing.assert_allclose(ours[0], loss, rtol=3e-6, atol=1e-7, err_msg=str(where))
    np.testing.assert_allclose(
        ours[1], gradient, rtol=3e-6, atol=1e-7, err_msg=str(where)
    )


def test_permuted_rows(whole):
    arrays, expected = whole
    order = np.array([2, 0, 3, 1])
    shuffled = {name: x[order] for name, x in arrays.items()}
    for combination, ours, theirs in zip(
        GRID, run_grid(shuffled), expected, strict=True
    ):
        assert_same(ours, theirs[0], theirs[1][order], combination)


def test_sliced_into_single_rows_without_padding(whole):
    """Masking is slicing: the rows alone, cut to their lengths, sum to the batch."""
    arrays, expected = whole
    cases, lengths = [], arrays["mask"].sum(-1)
    for a, i, s in GRID[1::2]:
        for row, n in enumerate(lengths):
            cut = {k: x[row : row + 1] for k, x in arrays.items()}
            cut = {k: x[:, :n] if x.ndim == 2 else x for k, x in cut.items()}
            options = dict(**a, importance=i, **s, normalizer=count(arrays, a))
            cases.append(case(cut, **options))
    results = iter(run(cases))
    for combination, theirs in zip(GRID[1::2], expected[1::2], strict=True):
        parts = [next(results) for _ in lengths]
        gradient = np.zeros((4, 6))
        for row, (n, part) in enumerate(zip(lengths, parts, strict=True)):
            gradient[row, :n] = part[1][0]
        assert_same((sum(p[0] for p in parts), gradient), *theirs[:2], combination)


def test_uneven_micro_batches_sum_to_the_whole(whole):
    arrays, expected = whole
    cases = []
    for a, i, s in GRID:
        for part in (slice(0, 3), slice(3, 4)):
            options = dict(**a, importance=i, **s, normalizer=count(arrays, a))
            cases.append(case({k: x[part] for k, x in arrays.items()}, **options))
    results = iter(run(cases))
    for combination, theirs in zip(GRID, expected, strict=True):
        first, second = next(results), next(results)
        gradient = np.concatenate([first[1], second[1]])
        assert_same((first[0] + second[0], gradient), *theirs[:2], combination)


def test_padding_of_rows_and_tokens_holding_nan(whole):
    """Two rows and three positions of padding; the normaliser leaves the rows out."""
    arrays, expected = whole
    padded = {}
    for name, x in arrays.items():
        widths = [(0, 2), (0, 3)][: x.ndim]
        padded[name] = np.pad(
            x, widths, constant_values=0 if name == "mask" else np.nan
        )
    results = run(
        [
            case(padded, **a, importance=i, **s, normalizer=count(arrays, a))
            for a, i, s in GRID
        ]
    )
    for combination, ours, theirs in zip(GRID, results, expected, strict=True):
        assert_same((ours[0], ours[1][:4, :6]), *theirs[:2], combination)
        assert not ours[1][4:].any() and not ours[1][:, 6:].any()


# Sequences 0 and 2 share the first row, 1 and 3 the second: (row, start) of each.
PLACES = ((0, 0), (1, 0), (0, 6), (1, 4))
NUMBERINGS = {
    "global from 0": ([[0] * 6 + [2, 4], [1] * 4 + [3] * 3 + [4]], True),
    "global from 1, padding 0": ([[1] * 6 + [3, 0], [2] * 4 + [4] * 3 + [0]], True),
    "per row from 1": ([[1] * 6 + [2, 0], [1] * 4 + [2] * 3 + [0]], True),
    "per row from 0, padding -1": ([[0] * 6 + [1, -1], [0] * 4 + [1] * 3 + [-1]], True),
    "not told how many": ([[1] * 6 + [2, 0], [1] * 4 + [2] * 3 + [0]], False),
    "padding continues the last": ([[5] * 6 + [7, 7], [2] * 4 + [9] * 4], False),
}


def pack(arrays, lengths=(6, 4, 1, 3)):
    arrays = dict(arrays)
    arrays["advantages"] = np.broadcast_to(arrays["advantages"][:, None], (4, 6))
    packed = {}
    for name, x in arrays.items():
        rows = np.zeros((2, 8), bool) if name == "mask" else np.full((2, 8), np.nan)
        for i, ((row, start), n) in enumerate(zip(PLACES, lengths, strict=True)):
            rows[row, start : start + n] = x[i, :n]
        packed[name] = rows
    return packed


def unpack(rows, lengths=(6, 4, 1, 3)):
    x = np.zeros((4, 6))
    for i, ((row, start), n) in enumerate(zip(PLACES, lengths, strict=True)):
        x[i, :n] = rows[row, start : start + n]
    return x


def test_packed_rows_equal_unpacked_rows(whole):
    arrays, expected = whole
    packed = pack(arrays)
    for name, (ids, told) in NUMBERINGS.items():
        named = dict(segment_ids=np.array(ids), num_segments=4 if told else None)
        results = run(
            [case(packed, **a, importance=i, **s, **named) for a, i, s in GRID]
        )
        for combination, ours, theirs in zip(GRID, results, expected, strict=True):
            where = (name, combination)
            assert_same((ours[0], unpack(ours[1])), *theirs[:2], where)
            same_metrics(ours[2], theirs[2], where)


def test_packed_parts_sum_to_the_whole(whole):
    """Each packed row alone, with the whole batch's normaliser."""
    arrays, expected = whole
    packed, ids = pack(arrays), np.array(NUMBERINGS["per row from 1"][0])
    parts = []
    for row in (slice(0, 1), slice(1, 2)):
        part = {name: x[row] for name, x in packed.items()} | dict(segment_ids=ids[row])
        options = [dict(**a, importance=i, **s) for a, i, s in GRID]
        for o in options:
            o["normalizer"] = count(arrays, o)
        parts.append(run([case(part, **o) for o in options]))
    for combination, first, second, theirs in zip(GRID, *parts, expected, strict=True):
        gradient = unpack(np.concatenate([first[1], second[1]]))
        assert_same((first[0] + second[0], gradient), *theirs[:2], combination)


def test_an_empty_sequence_counts_in_the_mean_as_0():
    """As a row, as a told segment, and left out by the normaliser."""
    arrays = batch(2, lengths=(6, 4, 1, 0))
    packed = pack(arrays, (6, 4, 1, 0))
    ids = np.array(NUMBERINGS["per row from 1"][0])
    three = {name: x[:3] for name, x in arrays.items()}
    rows, segments, untold, left_out, alone = run(
        [
            case(arrays),
            case(packed, segment_ids=ids, num_segments=4),
            case(packed, segment_ids=ids),
            case(arrays, normalizer=3),
            case(three),
        ]
    )
    assert_same(rows, alone[0] * 3 / 4, np.pad(alone[1], ((0, 1), (0, 0))) * 3 / 4, "")
    np.testing.assert_allclose(segments[0], rows[0], rtol=1e-6)
    np.testing.assert_allclose(untold[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(left_out[0], alone[0], rtol=1e-6)


def test_a_batch_without_a_token_is_exactly_0():
    """Every completion truncated and masked (fault 48): zero, finite, no gradient."""
    arrays = batch(3, lengths=(0, 0, 0, 0))
    arrays = {
        k: x if k == "mask" else np.full_like(x, np.nan) for k, x in arrays.items()
    }
    tokens = arrays | dict(advantages=np.full((4, 6), np.nan))
    ids = np.zeros((4, 6), int)
    results = run([case(arrays, normalizer=0), case(tokens, segment_ids=ids)])
    for loss, gradient, metrics in results + run_grid(arrays):
        assert loss == 0 and not gradient.any()
        assert all(value == 0 for value in metrics.values()), metrics


def test_tied_groups_move_nothing():
    arrays = batch(4) | dict(advantages=np.zeros(4))
    for loss, gradient, _ in run_grid(arrays, kl_coef=0.0):
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38, 199.0])
def test_what_is_masked_may_hold_anything(garbage):
    """The identical loss, gradient and metrics, bit for bit."""
    clean = batch(5)
    clean["advantages"] = np.broadcast_to(clean["advantages"][:, None], (4, 6))
    dirty = {
        k: x if k == "mask" else np.where(clean["mask"], x, garbage)
        for k, x in clean.items()
    }
    ids = np.array([[1, 1, 1, 2, 2, 2]] * 4)
    options = [dict(**a, importance=i, **s) for a, i, s in GRID]
    options += [dict(kl_estimator=k) for k in ("k1", "k2", "k3_unbiased")]
    options += [dict(segment_ids=ids, importance=i, delta=2.0) for i in IMPORTANCE]
    both = []
    for x in (clean, dirty):
        plain = [([x["logps"], x["mask"]], dict(weights=x["weights"]))]
        results = run([case(x, **o) for o in options]) + run(plain, loss=sft_loss)
        both.append(jax.tree.leaves(results))
    for a, b in zip(*both, strict=True):
        assert np.isfinite(a).all()
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_huge_log_ratios_are_finite(size):
    """Fault 53: a token that one policy has all but given up, in either direction."""
    base = batch(0, lengths=(6, 6, 6, 6))
    away = np.where(np.arange(6) % 2, size, 0.0)
    base["old_logps"] = base["ref_logps"] = base["logps"] - away
    base["logps"] = base["logps"] - np.where(np.arange(6) % 3, size, 0.0)
    options = [dict(importance=i, kl_estimator=k) for i in IMPORTANCE for k in KL]
    options += [dict(importance=i, **SURROGATES[1]) for i in IMPORTANCE]
    for sign in (1.0, -1.0):
        cases = [case(base, advantages=sign * np.ones(4), **o) for o in options]
        for o, (loss, gradient, metrics) in zip(options, run(cases), strict=True):
            assert np.isfinite(loss) and np.isfinite(gradient).all(), o
            assert all(np.isfinite(x) for x in metrics.values()), o


def test_a_huge_ratio_still_pulls_the_right_way():
    """With Â < 0 the clip does not bind above: the token must still be pushed down."""
    for size in (10.0, 60.0, 200.0):
        f = functools.partial(grpo_loss, old_logps=jnp.full((1, 1), -size), kl_coef=0.0)
        slope = jax.grad(lambda x, f=f: f(x, -jnp.ones(1), jnp.ones((1, 1)))[0])
        assert float(slope(jnp.zeros((1, 1)))[0, 0]) > 1.0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-30, 0, width=32), min_size=6, max_size=6),
    st.lists(st.floats(-30, 0, width=32), min_size=6, max_size=6),
)
def test_k3_is_never_negative_and_0_where_the_policies_agree(lp, ref):
    for a, b in zip(lp, ref, strict=True):  # one token each: no sum hides a sign
        kl = float(kl_of(a, b))
        assert kl >= 0
        assert kl == 0 if a == b else kl > 0 or abs(a - b) < 1e-4


@jax.jit
def kl_of(lp, ref):
    lp, ref = (jnp.full((1, 1), x, jnp.float32) for x in (lp, ref))
    return grpo_loss(lp, jnp.ones(1), jnp.ones((1, 1)), ref_logps=ref)[1]["kl"]


def test_k3_keeps_its_digits_where_the_policies_are_close():
    """exp(d) - d - 1 is d²/2 near 0; float32's rounding alone is about 1e-7."""
    for d in (1e-5, 1e-4, 1e-3, -1e-3):
        expected = math.expm1(np.float32(d)) - float(np.float32(d))
        assert float(kl_of(0.0, d)) == pytest.approx(expected, rel=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.permutations(range(6)), st.integers(0, 6))
def test_order_and_place_of_tokens_do_not_matter(seed, order, length):
    """A sequence is a bag of tokens: any order, any holes, the same loss."""
    arrays = batch(seed, lengths=(length, 6, 2, 3))
    moved = {k: x[:, list(order)] if x.ndim == 2 else x for k, x in arrays.items()}
    one, other = (bag_program(a) for a in (arrays, moved))
    np.testing.assert_allclose(one[0], other[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(one[1][:, list(order)], other[1], rtol=2e-5, atol=1e-6)


def bag_program(arrays):
    positional, named = case({k: jnp.asarray(x) for k, x in arrays.items()})
    return _bag_program(positional, named)


@jax.jit
def _bag_program(positional, named):
    f = functools.partial(grpo_loss, **named, importance="sequence")
    (loss, _), gradient = jax.value_and_grad(f, has_aux=True)(*positional)
    return loss, gradient


# --- types and transformations ---------------------------------------------------


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
        assert loss == results[0][0]
        np.testing.assert_array_equal(gradient, results[0][1])


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


def float_batch(seed):
    return {
        k: jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32)
        for k, x in batch(seed).items()
    }


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
        assert_same((values[i], slopes[i]), *expected[:2], i)


@pytest.mark.parametrize("packed", [False, True])
def test_shards_sum_to_the_whole(packed):
    """shard_map over rows: with the normaliser the psum of the shards is the loss."""
    arrays = float_batch(8)
    options = dict(importance="sequence")
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
    assert_same(ours, *expected, packed)


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
    assert_same((loss[0], gradient[:, 0]), *expected[:2], "pmap")


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
    expected, _, _ = reference.grpo(*positional, **named)
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
    arguments = dict(logps=X, advantages=A, mask=X, ref_logps=X) | WRONG[message]
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
