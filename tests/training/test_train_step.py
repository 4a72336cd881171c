"""The compiled step: its gradient, its guards, and that it compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.training.batch import Sample
from grpo_jax.training.objectives import grpo_objective, sft_objective
from grpo_jax.training.optimizers import make_optimizer
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import (
    TrainState,
    accumulate_gradients,
    make_grpo_step,
    make_scorer,
    make_step,
)

CONFIG = ModelConfig(
    vocab_size=23, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24
)
MODEL = Decoder(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
REFERENCE = MODEL.init(jax.random.key(1))
AGGREGATES = [
    dict(aggregate="sequence_mean"),
    dict(aggregate="token_mean"),
    dict(aggregate="constant", max_length=12),
]


def make_samples(n=7, seed=0, zero=False):
    """Prompts of 1 to 5 tokens; 6 or 9 tokens in all, so that few shapes compile."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        prompt = rng.integers(1, 6)
        answer = (6, 9)[i % 2] - prompt
        tokens = rng.integers(0, 23, prompt + answer).tolist()
        samples.append(
            Sample(
                tokens=tokens,
                mask=[0] * prompt + [1] * answer,
                advantages=0.0 if zero else float(rng.normal()),
            )
        )
    return samples


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def plain_loss(params, samples, temperature, beta, divide):
    """The objective once more: whole logits, no packing, no segments, no chunks."""
    total = 0.0
    for length in (6, 9):
        group = [s for s in samples if len(s.tokens) == length]
        tokens = jnp.array([s.tokens for s in group])

        def logps(p, tokens=tokens):
            log_p = jax.nn.log_softmax(MODEL.logits(p, tokens[:, :-1]) / temperature)
            return jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]

        now, ref = logps(params), logps(REFERENCE)
        for row, sample in enumerate(group):
            first = sample.mask.index(1) - 1
            here, there = now[row, first:], ref[row, first:]
            ratio = jnp.exp(here - jax.lax.stop_gradient(here))
            kl = jnp.exp(there - here) - (there - here) - 1
            per_token = -(ratio * sample.advantages) + beta * kl
            total += per_token.sum() / divide(per_token.size)
    return total


@pytest.mark.parametrize("options", AGGREGATES, ids=lambda o: o["aggregate"])
def test_packed_and_accumulated_gradient_is_the_plain_one(options):
    samples, temperature, beta = make_samples(), 0.7, 0.1
    tokens = sum(sum(s.mask) for s in samples)
    divide = {
        "sequence_mean": lambda n: n * len(samples),
        "token_mean": lambda n: tokens,
        "constant": lambda n: len(samples) * 12,
    }[options["aggregate"]]
    loss, want = jax.jit(
        jax.value_and_grad(lambda p: plain_loss(p, samples, temperature, beta, divide))
    )(PARAMS)
    objective = grpo_objective(MODEL, temperature=temperature, kl_coef=beta, **options)
    for rows, length in ((1, 16), (2, 40)):
        batch = pack(samples, length=length, rows=rows)
        gradients, metrics = jax.jit(accumulate_gradients, static_argnums=0)(
            objective, PARAMS, REFERENCE, batch.with_capacity(8)
        )
        close(gradients, want, atol=2e-6)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_order_of_the_samples_does_not_matter():
    samples = make_samples(6)
    objective = grpo_objective(MODEL, kl_coef=0.1)
    step = jax.jit(accumulate_gradients, static_argnums=0)
    a = step(objective, PARAMS, REFERENCE, pack(samples, length=40, rows=2))
    b = step(objective, PARAMS, REFERENCE, pack(samples[::-1], length=40, rows=2))
    close(a[0], b[0], atol=1e-6)


def test_remat_changes_nothing():
    batch = pack(make_samples(4), length=20, rows=2)
    step = jax.jit(accumulate_gradients, static_argnums=0)
    models = (MODEL, dataclasses.replace(MODEL, remat="full"))
    a, b = (step(sft_objective(m), PARAMS, None, batch)[0] for m in models)
    close(a, b, atol=1e-6)


def logits_model(params, tokens, *, positions, segment_ids):
    return MODEL.logits(params, tokens, positions=positions, segment_ids=segment_ids)


def test_a_model_that_returns_logits_gives_the_same_step():
    batch, optimizer = pack(make_samples(), length=20, rows=2), optax.sgd(0.1)
    states = []
    for apply in (MODEL, logits_model):
        step = make_grpo_step(apply, optimizer, kl_coef=0.1)
        state = TrainState.create(jax.tree.map(jnp.copy, PARAMS), optimizer)
        states.append(step(state, REFERENCE, batch))
    close(states[0][0].params, states[1][0].params, atol=1e-6)
    assert states[0][1].keys() == states[1][1].keys()


def test_an_nnx_module_can_be_trained():
    """A model that is not ours, split into graph and state: the reward goes up."""

    class Bigram(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.out = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, tokens):
            return self.out(self.embed(tokens))

    graph, weights = nnx.split(Bigram(nnx.Rngs(0)))

    def apply(weights, tokens, *, positions, segment_ids):
        return nnx.merge(graph, weights)(tokens)

    optimizer = optax.sgd(1.0)
    step = make_grpo_step(apply, optimizer, kl_coef=0.0)
    batch = pack(
        [
            Sample(tokens=[0, 1], mask=[0, 1], advantages=1.0),
            Sample(tokens=[0, 2], mask=[0, 1], advantages=-1.0),
        ],
        length=4,
    )
    before = jax.nn.softmax(
        apply(weights, jnp.array([[0]]), positions=0, segment_ids=0)
    )
    state = TrainState.create(weights, optimizer)
    for _ in range(3):
        state, _ = step(state, None, batch)
    after = jax.nn.softmax(
        apply(state.params, jnp.array([[0]]), positions=0, segment_ids=0)
    )
    assert after[0, 0, 1] > before[0, 0, 1] and after[0, 0, 2] < before[0, 0, 2]


def fresh(optimizer):
    return TrainState.create(jax.tree.map(jnp.copy, PARAMS), optimizer)


def test_a_non_finite_gradient_leaves_the_state_alone_and_is_counted():
    optimizer, _ = make_optimizer(0.1, steps=10)
    step = make_grpo_step(MODEL, optimizer, kl_coef=0.0)
    good = pack(make_samples(), length=40)
    bad = dataclasses.replace(good, advantages=np.where(good.mask, np.nan, 0.0))
    state, metrics = step(fresh(optimizer), None, good)
    kept = jax.device_get((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, None, bad)
        assert int(state.skipped) == count and metrics["update/nonfinite"] == 1
    close((state.params, state.opt_state), kept, rtol=0)
    state, metrics = step(state, None, good)
    assert int(state.skipped) == 0 and int(state.step) == 4
    assert np.abs(state.params["embed"] - kept[0]["embed"]).max() > 0


@pytest.mark.parametrize("kl_coef, moves", [(0.0, False), (0.1, True)])
def test_groups_without_a_difference_move_nothing_unless_kl_does(kl_coef, moves):
    optimizer, _ = make_optimizer(0.1, steps=10)
    step = make_grpo_step(MODEL, optimizer, kl_coef=kl_coef)
    state, _ = step(fresh(optimizer), REFERENCE, pack(make_samples(), length=40))
    before = jax.device_get((state.params, state.opt_state))
    tied = pack(make_samples(zero=True), length=40)
    state, metrics = step(state, REFERENCE, tied)
    assert metrics["update/no_signal"] == (0 if moves else 1)
    same = [
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves((state.params, state.opt_state)),
            jax.tree.leaves(before),
            strict=True,
        )
    ]
    assert not all(same) if moves else all(same)


@pytest.mark.parametrize(
    "options",
    [
        dict(kl_coef=0.0),
        dict(kl_coef=0.0, surrogate="cispo", clip_high=5.0),
        dict(kl_coef=0.0, entropy_coef=0.1),
        dict(kl_coef=0.1, kl_estimator="k3_unbiased", aggregate="token_mean"),
    ],
    ids=str,
)
def test_the_step_knows_every_term_that_has_a_gradient(options):
    """With all advantages 0 it moves if and only if the loss has a gradient."""
    tied = pack(make_samples(zero=True), length=40)
    gradient = jax.jit(accumulate_gradients, static_argnums=0)
    gradients, _ = gradient(grpo_objective(MODEL, **options), PARAMS, REFERENCE, tied)
    slope = float(optax.tree.norm(gradients))
    optimizer = optax.sgd(0.1)
    step = make_grpo_step(MODEL, optimizer, **options)
    state, metrics = step(fresh(optimizer), REFERENCE, tied)
    moved = jax.tree.map(lambda a, b: a - b, state.params, PARAMS)
    distance = float(optax.tree.norm(moved))
    assert distance == pytest.approx(0.1 * slope, rel=1e-3, abs=0)
    assert metrics["update/no_signal"] == (slope == 0)
    assert (slope > 0) == bool(options["kl_coef"] or "entropy_coef" in options)


def test_one_program_serves_every_filling_of_a_batch():
    optimizer = optax.sgd(0.1)
    step = make_grpo_step(MODEL, optimizer, kl_coef=0.0)
    state = fresh(optimizer)
    for n in (1, 4, 9):
        batch = pack(make_samples(n, seed=n), length=20, rows=2).with_capacity(5)
        state, _ = step(state, None, batch)
    assert step._cache_size() == 1  # pyrefly: ignore[missing-attribute]


def test_several_updates_of_one_rollout_are_held_by_the_clip():
    """μ > 1 with π_old: the first ratio is 1; later ones leave the clip's range."""
    samples = make_samples(8, seed=3)
    batch = pack(samples, length=40, rows=2)
    old = make_scorer(MODEL)(PARAMS, batch)
    batch = dataclasses.replace(batch, old_logps=old)
    optimizer = optax.sgd(3.0)
    step = make_grpo_step(MODEL, optimizer, kl_coef=0.0)
    state, clipped = fresh(optimizer), []
    for _ in range(4):
        state, metrics = step(state, None, batch)
        clipped.append(float(metrics["clip_ratio/region_mean"]))
    assert clipped[0] == 0 and clipped[-1] > 0.2


def test_sft_lowers_the_loss_of_the_answers_and_not_of_the_prompts():
    samples = make_samples(6, seed=5)
    batch = pack(samples, length=40, rows=2)
    optimizer, rate = make_optimizer(3e-2, steps=30, warmup_steps=5, schedule="cosine")
    step = make_step(sft_objective(MODEL), optimizer)
    state, losses = fresh(optimizer), []
    for _ in range(30):
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    logps = make_scorer(MODEL)(
        state.params, dataclasses.replace(batch, mask=batch.segment_ids > 0)
    )
    answers, prompts = batch.mask, (batch.segment_ids > 0) & ~batch.mask
    assert logps[answers].mean() > logps[prompts].mean() + 1
    rates = np.array([rate(s) for s in (0, 5, 30)])
    np.testing.assert_allclose(rates, [5e-3, 3e-2, 0], atol=1e-4)


def test_the_sampler_gap_is_measured():
    samples = [
        dataclasses.replace(s, logps=[0.0] * len(s.tokens)) for s in make_samples()
    ]
    batch = pack(samples, length=40)
    logps = np.asarray(make_scorer(MODEL)(PARAMS, batch))
    batch = dataclasses.replace(batch, sampler_logps=logps + 0.25 * batch.mask)
    step = make_grpo_step(MODEL, optax.sgd(0.0), kl_coef=0.0)
    _, metrics = step(fresh(optax.sgd(0.0)), None, batch)
    for name in ("mean", "max"):
        gap = metrics[f"sampling/sampling_logp_difference/{name}"]
        np.testing.assert_allclose(gap, 0.25, atol=1e-5)
