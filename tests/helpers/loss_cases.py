"""What the tests of the losses share: random batches, and many cases compiled at once.

Axes: B rows, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithms.policy_losses import grpo_loss

ARRAYS = ("old_logps", "ref_logps", "weights", "segment_ids")
ARRAYS += ("sampler_logps", "entropy")
AGGREGATES: tuple[dict, ...] = (
    dict(aggregate="sequence_mean"),
    dict(aggregate="token_mean"),
    dict(aggregate="constant", max_length=9),
    dict(aggregate="sequence_sum"),
)
IMPORTANCE = ("token", "sequence")
SURROGATES: tuple[dict, ...] = (
    dict(surrogate="clip"),
    dict(surrogate="cispo", clip_high=1.3),
)
KL = ("k1", "k2", "k3", "k3_unbiased")
GRID = [(a, i, SURROGATES[0]) for a in AGGREGATES for i in IMPORTANCE]
GRID.append((AGGREGATES[0], "token", SURROGATES[1]))
NUMBERS = ("normalizer", "clip_low", "clip_high", "delta", "kl_coef", "max_length")
NUMBERS += ("importance_cap", "entropy_coef", "clip", "beta")


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


def float_batch(seed):
    return {
        k: jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32)
        for k, x in batch(seed).items()
    }


def run_grid(arrays, kl_coef=0.04, **named):
    cases = [dict(**a, importance=i, **s, kl_coef=kl_coef) for a, i, s in GRID]
    return run([case(arrays, **c, **named) for c in cases])


def assert_same(ours, expected, where):
    loss, gradient, *_ = expected
    np.testing.assert_allclose(ours[0], loss, rtol=3e-6, atol=1e-7, err_msg=str(where))
    np.testing.assert_allclose(
        ours[1], gradient, rtol=3e-6, atol=1e-7, err_msg=str(where)
    )
