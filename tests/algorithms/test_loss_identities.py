"""What must not change a loss, and what must be exactly 0, finite or the paper's.

Padding, order, slicing, splitting, packing; NaN behind the mask; huge ratios.
Axes: B rows, T tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    GRID,
    IMPORTANCE,
    KL,
    SURROGATES,
    assert_same,
    batch,
    case,
    run,
    run_grid,
    same_metrics,
)

from grpo_jax.algorithms.policy_losses import grpo_loss, sft_loss


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


def count(arrays, aggregate):
    """The normaliser: tokens for token_mean, else sequences."""
    tokens = aggregate["aggregate"] == "token_mean"
    return int(arrays["mask"].sum()) if tokens else len(arrays["mask"])


@pytest.fixture(scope="module")
def whole():
    """The loss and gradient of one batch for every aggregate, importance, surrogate."""
    arrays = batch(1)
    return arrays, run_grid(arrays)


def test_permuted_rows(whole):
    arrays, expected = whole
    order = np.array([2, 0, 3, 1])
    shuffled = {name: x[order] for name, x in arrays.items()}
    for combination, ours, theirs in zip(
        GRID, run_grid(shuffled), expected, strict=True
    ):
        assert_same(ours, (theirs[0], theirs[1][order]), combination)


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
        assert_same((sum(p[0] for p in parts), gradient), theirs, combination)


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
        assert_same((first[0] + second[0], gradient), theirs, combination)


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
        assert_same((ours[0], ours[1][:4, :6]), theirs, combination)
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
            assert_same((ours[0], unpack(ours[1])), theirs, where)
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
        assert_same((first[0] + second[0], gradient), theirs, combination)


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
    gradient = np.pad(alone[1], ((0, 1), (0, 0))) * 3 / 4
    assert_same(rows, (alone[0] * 3 / 4, gradient), "empty")
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
