"""The objectives over packed rows agree with the losses over plain arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithms.policy_losses import value_loss
from grpo_jax.algorithms.preference_losses import dpo_loss
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.batch import Sample
from grpo_jax.training.credit import has_gradient
from grpo_jax.training.objectives import (
    dpo_objective,
    grpo_objective,
    ppo_objective,
    sft_objective,
)
from grpo_jax.training.packing import pack, unpack
from grpo_jax.training.train_step import (
    TrainState,
    accumulate_gradients,
    make_scorer,
    make_step,
)

CONFIG = ModelConfig(
    vocab_size=23, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24
)
MODEL = Decoder(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
REFERENCE = MODEL.init(jax.random.key(1))
GRADIENT = jax.jit(accumulate_gradients, static_argnums=0)


def make_samples(n, seed=0, **fields):
    """n samples of 4 to 9 tokens; each field's value is made from (rng, tokens)."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        prompt, answer = rng.integers(1, 4), rng.integers(3, 6)
        tokens = rng.integers(0, 23, prompt + answer).tolist()
        own = {name: make(rng, len(tokens)) for name, make in fields.items()}
        mask = [0] * prompt + [1] * answer
        samples.append(Sample(tokens=tokens, mask=mask, **own))
    return samples


def normal(rng, n):
    return rng.normal(size=n).tolist()


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def masked(sample, name):
    """A field of a sample at its masked tokens."""
    pairs = zip(getattr(sample, name), sample.mask, strict=True)
    return [x for x, m in pairs if m]


def logps_of(params, sample):
    """log π of a sample's masked tokens, without packing: [n]."""
    tokens = jnp.array([sample.tokens])
    log_p = jax.nn.log_softmax(MODEL.logits(params, tokens[:, :-1])[0])
    log_p = jnp.take_along_axis(log_p, tokens[0, 1:, None], -1)[:, 0]
    return log_p[np.flatnonzero(sample.mask) - 1]


def test_rejection_sampling_is_sft_on_the_right_outputs():
    """What is wrong (I(o) = 0) may be left out: only the divisor remembers it."""
    samples = make_samples(6, advantages=lambda rng, n: float(rng.random() < 0.5))
    right = [s for s in samples if s.advantages]
    assert 0 < len(right) < 6
    objective = sft_objective(MODEL)
    whole, _ = GRADIENT(objective, PARAMS, None, pack(samples, length=20))
    kept, metrics = GRADIENT(
        objective, PARAMS, None, pack(right, length=20, of=samples)
    )
    close(whole, kept, atol=1e-6)
    plain = [dataclasses.replace(s, advantages=None) for s in right]
    alone, sft = GRADIENT(objective, PARAMS, None, pack(plain, length=20))
    close(kept, jax.tree.map(lambda g: g * len(right) / 6, alone), atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], sft["loss"] * len(right) / 6, rtol=1e-5)


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean", "constant"])
def test_outputs_that_teach_nothing_may_be_left_out(aggregate):
    """β = 0 and Â = 0: no gradient, and no pass; the loss is divided as before."""
    options = {"aggregate": aggregate, "kl_coef": 0.0}
    if aggregate == "constant":
        options["max_length"] = 9
    samples = make_samples(6, advantages=lambda rng, n: float(rng.integers(-1, 2)))
    kept = [s for s in samples if has_gradient(s)]
    assert 0 < len(kept) < 6
    objective = grpo_objective(MODEL, **options)
    whole, a = GRADIENT(objective, PARAMS, None, pack(samples, length=20))
    part, b = GRADIENT(objective, PARAMS, None, pack(kept, length=20, of=samples))
    close(whole, part, atol=1e-6)
    np.testing.assert_allclose(a["loss"], b["loss"], atol=1e-6)


def test_a_batch_without_samples_changes_nothing():
    samples = make_samples(2, advantages=lambda rng, n: 0.0)
    empty = pack([], length=20, of=samples).with_capacity(2)
    import optax

    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    step = make_step(grpo_objective(MODEL, kl_coef=0.0), optimizer)
    state = TrainState.create(jax.tree.map(jnp.copy, PARAMS), optimizer)
    state, metrics = step(state, None, empty)
    assert float(metrics["update/no_signal"]) == 1.0
    close(state.params, PARAMS, atol=0)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("rows, length", [(1, 20), (2, 45)])
def test_packed_pairs_give_the_loss_of_pairs(normalized, rows, length):
    samples = make_samples(6, logps=normal)
    chosen, rejected = samples[::2], samples[1::2]

    def padded(arrays):
        n = max(len(a) for a in arrays)
        return jnp.stack([jnp.pad(jnp.asarray(a), (0, n - len(a))) for a in arrays])

    def plain(params):
        def side(of):
            logps = padded([logps_of(params, s) for s in of])
            ref = padded([masked(s, "logps") for s in of])
            return logps, ref, padded([[1] * sum(s.mask) for s in of])

        (a, ref_a, m_a), (b, ref_b, m_b) = side(chosen), side(rejected)
        return dpo_loss(
            a, b, ref_a, ref_b, m_a, m_b, beta=0.5, length_normalized=normalized
        )

    (loss, wanted), want = jax.value_and_grad(plain, has_aux=True)(PARAMS)
    objective = dpo_objective(
        MODEL, temperature=1.0, beta=0.5, length_normalized=normalized
    )
    batch = pack(samples, length=length, rows=rows, together=2).with_capacity(4)
    gradients, metrics = GRADIENT(objective, PARAMS, None, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    close(gradients, want, atol=2e-6)
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_ppo_trains_policy_and_critic_each_by_its_own_loss():
    critic = RewardModel(MODEL)
    params = {**PARAMS, "value": critic.init(jax.random.key(2), REFERENCE)}
    samples = make_samples(
        5, advantages=normal, returns=normal, values=normal, logps=normal
    )
    batch = pack(samples, length=20, rows=2).with_capacity(3)
    objective = ppo_objective(MODEL, critic, value_clip=0.2, aggregate="sequence_mean")
    gradients, metrics = GRADIENT(objective, params, None, batch)

    plain = grpo_objective(MODEL, kl_coef=0.0)
    policy, of_policy = GRADIENT(plain, PARAMS, None, batch)
    own = gradients.pop("value")
    close(gradients, policy, atol=1e-6)

    def regression(value):
        def at(s):  # V before each masked token
            scores = critic(value, jnp.array([s.tokens[:-1]]))[0]
            return scores[np.flatnonzero(s.mask) - 1]

        v = jnp.concatenate([at(s) for s in samples])[None]
        old = jnp.array([sum([masked(s, "values") for s in samples], [])])
        returns = jnp.array([sum([masked(s, "returns") for s in samples], [])])
        return value_loss(v, old, returns, jnp.ones_like(v), clip=0.2)

    loss, want = jax.value_and_grad(regression)(params["value"])
    close(own, want, atol=2e-6)
    np.testing.assert_allclose(metrics["value_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], of_policy["loss"] + loss, rtol=1e-5, atol=1e-6
    )


def of_few_prompts(n, seed=0, **fields):
    """Samples of two prompts of 5 and 3 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 23, size).tolist() for size in (5, 3)]
    samples = []
    for i in range(n):
        prompt, answer = prompts[i // 2 % 2], rng.integers(0, 23, 2 + i % 4).tolist()
        tokens = prompt + answer
        own = {name: make(rng, len(tokens)) for name, make in fields.items()}
        mask = [0] * len(prompt) + [1] * len(answer)
        samples.append(Sample(tokens=tokens, mask=mask, prompt=len(prompt), **own))
    return samples


@pytest.mark.parametrize(
    "options",
    [
        dict(aggregate="sequence_mean"),
        dict(aggregate="token_mean"),
        dict(aggregate="constant", max_length=9),
        dict(importance="sequence"),
    ],
    ids=str,
)
def test_a_prompt_computed_once_changes_neither_loss_nor_gradient(options):
    samples = of_few_prompts(8, advantages=lambda rng, n: float(rng.normal()))
    objective = grpo_objective(MODEL, kl_coef=0.1, **options)
    plain = pack(samples, length=16).with_capacity(8)
    shared = pack(samples, length=16, share_prompts=True).with_capacity(8)
    assert (shared.segment_ids > 0).sum() < (plain.segment_ids > 0).sum()
    a, of_plain = GRADIENT(objective, PARAMS, REFERENCE, plain)
    b, of_shared = GRADIENT(objective, PARAMS, REFERENCE, shared)
    close(a, b, atol=1e-6)
    for name, value in of_plain.items():
        np.testing.assert_allclose(of_shared[name], value, rtol=1e-4, atol=1e-6)


def test_pairs_may_share_their_prompt():
    samples = of_few_prompts(8, logps=normal)
    objective = dpo_objective(MODEL, temperature=1.0, beta=0.5, length_normalized=True)
    options = dict(length=24, together=2)
    plain = pack(samples, **options).with_capacity(4)
    shared = pack(samples, **options, share_prompts=True).with_capacity(4)
    a, of_plain = GRADIENT(objective, PARAMS, None, plain)
    b, of_shared = GRADIENT(objective, PARAMS, None, shared)
    close(a, b, atol=1e-6)
    np.testing.assert_allclose(of_plain["loss"], of_shared["loss"], rtol=1e-5)


def test_what_is_scored_comes_back_to_its_sample():
    samples = make_samples(7)
    score = make_scorer(MODEL)
    for rows, length in ((1, 12), (3, 30)):
        batch = pack(samples, length=length, rows=rows).with_capacity(8)
        found = unpack(score(PARAMS, batch), samples)
        for sample, x in zip(samples, found, strict=True):
            n = sum(sample.mask)
            np.testing.assert_allclose(x[-n:], logps_of(PARAMS, sample), atol=2e-5)


def test_extremes_over_micro_batches_are_the_batchs():
    samples = make_samples(4, logps=normal, advantages=lambda rng, n: 1.0)
    objective = grpo_objective(MODEL, kl_coef=0.0, importance_cap=2.0)
    one = pack(samples, length=40)
    many = pack(samples, length=10).with_capacity(6)
    a, b = (GRADIENT(objective, PARAMS, None, x)[1] for x in (one, many))
    for end in ("min", "mean", "max"):
        name = f"sampling/importance_sampling_ratio/{end}"
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
    assert a["sampling/importance_sampling_ratio/max"] <= 2.0
