"""The paradigm's proof: every method's gradient is its coefficient times ∇ log π_θ.

For each row of the paper's table a small policy is differentiated twice: the method's
own loss by autodiff, and equation 5 by hand, with the softmax's ∇ log π and the row's
GC. Axes: B outputs, T tokens, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config
from grpo_jax.training.rl_programs import loss_options

# NumPy arrays go in, which jax takes and its type `Array` does not name.
api: Any = grpo_jax
gradient_coefficient: Any = grpo_jax.gradient_coefficient

B, T, V = 8, 6, 5
NAN = float("nan")


def parameters(seed):
    """Logits of the next token: by the last token, [V, V], and by place, [T, V]."""
    rng = np.random.default_rng(seed)
    return dict(last=rng.normal(0, 1, (V, V)), place=rng.normal(0, 0.5, (T, V)))


def outputs(seed):
    """(tokens, mask): ragged, one with a hole (a tool's tokens), one without any."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, (B, 1))
    mask[0] = [1, 1, 0, 0, 1, 1]
    mask[5] = 0
    return rng.integers(0, V, (B, T)), mask


def log_policy(params, tokens):
    """log π_θ of the tokens, [B, T]."""
    last = jnp.pad(jnp.asarray(tokens)[:, :-1], ((0, 0), (1, 0)))
    logits = params["last"][last] + jnp.asarray(params["place"])[None]
    logps = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logps, jnp.asarray(tokens)[..., None], -1)[..., 0]


def equation_5(params, tokens, mask, gc, count):
    """1/count Σ_i 1/|o_i| Σ_t GC ∇ log π_θ(o_it), a token at a time, no autodiff."""
    gradient = {name: np.zeros(x.shape) for name, x in params.items()}
    for i in range(B):
        for t in range(T):
            if not mask[i, t]:
                continue
            last = tokens[i, t - 1] if t else 0
            logits = params["last"][last] + params["place"][t]
            p = np.exp(logits - logits.max())
            step = -p / p.sum()  # ∂ log π(o) / ∂ logits = onehot(o) - π
            step[tokens[i, t]] += 1
            step *= gc[i, t] / mask[i].sum() / count
            gradient["last"][last] += step
            gradient["place"][t] += step
    return gradient


def process(seed):
    rng = np.random.default_rng(seed)
    ends = rng.random((B, T)) < 0.4
    return api.process_advantages(rng.normal(0, 1, (B, T)), ends, 4)


RNG = np.random.default_rng(7)
RIGHT = RNG.integers(0, 2, B).astype(float)
PER_TOKEN = RNG.normal(0, 1, (B, T))
REWARDS = RNG.normal(0, 1, B)
OFF = dict(old=1)  # π_old another policy, so that ratios leave the clip
REF = dict(ref=2)


def pairs_loss(logps, ref_logps, mask, **options):
    sides = (x[i::2] for x in (logps, ref_logps, mask) for i in (0, 1))
    return api.dpo_loss(*sides, **options)


def right(mask):
    return np.where(mask, RIGHT[:, None], NAN)


# name: (method, which policies, the loss, GC's options)
ROWS = {
    "sft": ("sft", {}, api.sft_loss, {}),
    "rft": (
        "rft",
        {},
        lambda x, m: api.sft_loss(x, m, weights=right(m)),
        dict(advantages=RIGHT),
    ),
    "online_rft": (
        "online_rft",
        {},
        lambda x, m: api.grpo_loss(x, RIGHT, m, kl_coef=0.0),
        dict(advantages=RIGHT),
    ),
    "dpo": (
        "dpo",
        REF,
        lambda x, m, ref_logps: pairs_loss(
            x, ref_logps, m, beta=0.7, length_normalized=True
        ),
        dict(beta=0.7),
    ),
    "dpo of sums": (
        "dpo",
        REF,
        lambda x, m, ref_logps: pairs_loss(x, ref_logps, m, beta=0.3),
        dict(beta=0.3, length_normalized=False),
    ),
    "ppo": (
        "ppo",
        {},
        lambda x, m: api.ppo_loss(x, None, PER_TOKEN, m),
        dict(advantages=PER_TOKEN),
    ),
    "ppo off": (
        "ppo",
        OFF,
        lambda x, m, old_logps: api.ppo_loss(
            x, old_logps, PER_TOKEN, m, clip_low=0.3, clip_high=0.6
        ),
        dict(advantages=PER_TOKEN, clip_low=0.3, clip_high=0.6),
    ),
}


def grpo_rows():
    """Outcome, process and iterative (another π_ref), at π_old = π_θ and away."""
    for name, advantages, ref in (
        ("grpo", lambda: api.group_advantages(jnp.array(REWARDS), 4), 2),
        ("grpo_process", lambda: process(3), 2),
        ("grpo_iterative", lambda: api.group_advantages(jnp.array(REWARDS), 4), 4),
    ):
        for policies in (dict(ref=ref), dict(ref=ref, **OFF)):

            def loss(x, m, advantages=advantages, **policies):
                return api.grpo_loss(x, advantages(), m, kl_coef=0.4, **policies)

            label = f"{name} off" if "old" in policies else name
            yield (
                label,
                (name, policies, loss, dict(advantages=advantages, kl_coef=0.4)),
            )


def relatives():
    """The rows below the paper's, with the options that a run gives their loss."""
    for name, reads_old in (
        ("dapo", True),
        ("dr_grpo", True),
        ("gspo", True),
        ("cispo", True),
        ("rloo", False),
        ("reinforce_pp", True),
    ):
        config = Config(method=name, max_new_tokens=9)
        if name == "gspo":  # its clip is too narrow for these policies
            config.clip_low, config.clip_high = 0.3, 0.4
        options = loss_options(config)
        a = PER_TOKEN if name == "reinforce_pp" else REWARDS - REWARDS.mean()
        mine: dict[str, Any] = dict(advantages=a)
        if name != "rloo":
            mine |= dict(clip_low=options["clip_low"], clip_high=options["clip_high"])
        if name == "dr_grpo":
            mine["max_length"] = 9
        for policies in ({}, OFF) if reads_old else ({},):

            def loss(x, m, a=a, options=options, **policies):
                return api.grpo_loss(x, a, m, **options, **policies)

            yield f"{name} off" if policies else name, (name, policies, loss, mine)


ROWS |= dict(grpo_rows()) | dict(relatives())


def test_every_method_of_the_table_is_proved():
    assert {row.partition(" ")[0] for row in ROWS} == set(METHODS)


@pytest.mark.parametrize("row", ROWS)
def test_autodiff_is_the_coefficient_times_the_gradient_of_log_pi(row, x64):
    method, policies, loss, options = ROWS[row]
    params, (tokens, mask) = parameters(0), outputs(0)
    others = {
        f"{name}_logps": np.where(mask, log_policy(parameters(seed), tokens), NAN)
        for name, seed in policies.items()
    }

    @jax.jit
    def autodiff(params):
        return jax.grad(lambda p: loss(log_policy(p, tokens), mask, **others)[0])(
            params
        )

    options = {k: v() if callable(v) else v for k, v in options.items()}
    logps = np.where(mask, log_policy(params, tokens), NAN)
    gc = gradient_coefficient(method, logps, mask, **others, **options)
    assert gc.dtype == jnp.float64 and not gc[~mask].any()
    count = B / 2 if method == "dpo" else B
    expected = equation_5(params, tokens, mask, np.asarray(gc), count)
    for name, gradient in autodiff(params).items():
        scale = np.abs(expected[name]).max()
        assert scale > 1e-3
        np.testing.assert_allclose(
            -gradient, expected[name], rtol=1e-10, atol=1e-10 * scale
        )


def test_by_hand():
    """One output of two tokens: ρ = 2 and 1/2, π_ref/π_θ = 3 and 1."""
    logps, mask = np.zeros((1, 3)), np.array([[1, 1, 0]])
    old = -np.log([[2, 0.5, 7]])
    ref = np.log([[3, 1, 7]])
    gc = functools.partial(gradient_coefficient, logps=logps, mask=mask)
    up, down = np.ones(1), -np.ones(1)
    cases = [
        (gc("sft"), [1, 1, 0]),
        (gc("rft", advantages=up * 0), [0, 0, 0]),
        (gc("online_rft", advantages=up), [1, 1, 0]),
        (gc("ppo", advantages=up), [1, 1, 0]),
        (gc("ppo", advantages=up, old_logps=old), [0, 0.5, 0]),  # held above 1.2
        (gc("ppo", advantages=up, old_logps=old, clip_high=1.5), [2, 0.5, 0]),
        (gc("ppo", advantages=down, old_logps=old), [-2, 0, 0]),  # held below 0.8
        (gc("ppo", advantages=down, old_logps=old, clip_low=0.6), [-2, -0.5, 0]),
        (gc("grpo", advantages=up, ref_logps=ref, kl_coef=0.1), [1.2, 1, 0]),
        (
            gc("grpo", advantages=up, old_logps=old, ref_logps=ref, kl_coef=0.1),
            [0.2, 0.5, 0],
        ),
        (gc("grpo_process", advantages=np.array([[1.0, 2, NAN]])), [1, 2, 0]),
    ]
    for ours, expected in cases:
        np.testing.assert_allclose(ours, [expected], rtol=1e-6, atol=1e-7)


def test_dpo_by_hand():
    """Δ of means is ln 3 / 2, so β σ(-βΔ) is 2 σ(-ln 3) = 1/2; a pair of none is 0."""
    logps = np.log([[3.0, 1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
    mask = np.array([[1, 1], [1, 0], [1, 1], [0, 0]])
    options = dict(ref_logps=np.zeros((4, 2)), beta=2.0)
    ours = gradient_coefficient("dpo", logps, mask, **options)
    np.testing.assert_allclose(ours, [[0.5] * 2, [-0.5, 0], [0, 0], [0, 0]], rtol=1e-6)
    sums = gradient_coefficient("dpo", logps, mask, length_normalized=False, **options)
    # of sums Δ = ln 3: 2 σ(-2 ln 3) = 1/5, times |o|
    np.testing.assert_allclose(sums, [[0.4] * 2, [-0.2, 0], [0, 0], [0, 0]], rtol=1e-6)


def test_extremes_are_finite(x64):
    """As the losses' own gradients, e^20 is where a ratio stops to grow."""
    far = np.full((1, 2), -1e4)
    gc = gradient_coefficient(
        "grpo",
        far,
        np.ones((1, 2)),
        advantages=np.array([[-1.0, 1.0]]),
        old_logps=2 * far,
        ref_logps=np.zeros((1, 2)),
        kl_coef=1.0,
    )
    # -ρ and π_ref/π_θ are both at the bound; at Â = 1 the clip holds ρ
    np.testing.assert_allclose(gc, [[-1, math.exp(20) - 1]], rtol=1e-6)


def test_near_the_reference_the_coefficient_keeps_its_digits():
    """β (π_ref/π_θ - 1) where the two differ by little, against float64."""
    logps, ref = jnp.full((1, 3), -0.5), jnp.array([[-0.5 + 1e-4, -0.5 - 1e-6, -0.5]])
    options: dict = dict(advantages=jnp.zeros((1, 3)), ref_logps=ref, kl_coef=1.0)
    gc = gradient_coefficient("grpo", logps, jnp.ones((1, 3)), **options)
    difference = np.asarray(ref, np.float64) - np.asarray(logps, np.float64)
    np.testing.assert_allclose(gc, np.expm1(difference), rtol=1e-6)


def test_jit_and_vmap():
    rng = np.random.default_rng(0)
    logps, ref = rng.normal(-1, 1, (2, 3, 4, 5))
    mask = jnp.array(rng.random((3, 4, 5)) < 0.7)
    f = jax.jit(
        jax.vmap(
            lambda x, m, r, b: gradient_coefficient("dpo", x, m, ref_logps=r, beta=b),
            in_axes=(0, 0, 0, None),
        )
    )
    for i, ours in enumerate(f(logps, mask, ref, 0.3)):
        expected = gradient_coefficient(
            "dpo", logps[i], mask[i], ref_logps=ref[i], beta=0.3
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    half = gradient_coefficient("sft", jnp.array(logps[0], jnp.bfloat16), mask[0])
    assert half.dtype == jnp.float32


X, A = jnp.zeros((3, 2)), jnp.zeros(3)


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("method='raft'", "raft", {}),
        ("it has no old_logps", "rloo", dict(advantages=A, old_logps=X)),
        ("dr_grpo divides by it", "dr_grpo", dict(advantages=A)),
        ("ppo needs them", "ppo", {}),
        ("rft needs them", "rft", {}),
        ("dpo needs log", "dpo", {}),
        ("must alternate", "dpo", dict(ref_logps=X)),
        ("ref_logps is None", "grpo", dict(advantages=A, kl_coef=0.1)),
        ("old_logps has shape", "ppo", dict(advantages=A, old_logps=A)),
        ("advantages has shape", "ppo", dict(advantages=X[:2])),
    ],
)
def test_refuses(message, method, options):
    with pytest.raises(ValueError, match=message):
        gradient_coefficient(method, X, X, **options)
