"""In bfloat16 a CPU samples, goes on, scores and updates, near to float32.

XLA chooses the layouts of a program's products, and may then have no code for them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.generation.continuation import continue_rollouts
from grpo_jax.generation.sampler import generate
from grpo_jax.models import lora
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.kernels.products import einsum
from grpo_jax.models.value_head import RewardModel
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import pack, unpack
from grpo_jax.training.train_step import TrainState, make_grpo_step, make_scorer

PROMPTS = [[1, 2, 3], list(range(4, 54)), [7, 8]]


def models(**changes):
    """The same model in bfloat16 and in float32."""
    given: Any = dict(vocab_size=61, width=32, layers=2, heads=4, kv_heads=2)
    given |= dict(head_dim=8, ffn=64, tied=True) | changes
    config = ModelConfig(**given)
    return Decoder(config, dtype="bfloat16"), Decoder(config)


def weights(model):
    params = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)


def logps_of(model, params, samples):
    """Each token's log-probability, as the trainer's reference pass gives it."""
    batch = pack(samples, length=128)
    return unpack(make_scorer(model)(params, batch), samples)


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 6}, {"kv_heads": 4, "tied": False}], ids=str
)
def test_what_is_sampled_and_continued_is_what_the_trainer_scores(changes):
    half, whole = models(**changes)
    params = weights(half)
    options: dict = dict(max_new_tokens=9, eos_id=0)
    out = generate(
        half, params, PROMPTS, key=jax.random.key(1), samples=2, keep=True, **options
    )
    told = [[9, 8], None, [5], [6] * 20, [], [3]]
    more = continue_rollouts(half, params, out, told, key=jax.random.key(2), **options)
    samples, sampled = [], []
    for i, ids in enumerate(told):
        first, second = (x.tokens[i, : x.lengths[i]].tolist() for x in (out, more))
        kept = [out.logps[i, : out.lengths[i]], more.logps[i, : more.lengths[i]]]
        own = [True] * len(first) + more.mask[i, : more.lengths[i]].tolist()
        prompt = PROMPTS[i // 2]
        mask = [0] * len(prompt) + [int(x) for x in own]
        samples.append(Sample(tokens=[*prompt, *first, *second], mask=mask))
        sampled.append(np.concatenate(kept)[own])
        assert (len(second) > len(ids)) if ids is not None else not second
    for model, near in ((half, 0.06), (whole, 0.06)):
        for sample, ours, theirs in zip(
            samples, sampled, logps_of(model, params, samples), strict=True
        ):
            theirs = theirs[np.array(sample.mask[1:], bool)]
            np.testing.assert_allclose(ours, theirs, atol=near)


@pytest.mark.parametrize("tokens, rank", [(20, 0), (150, 2)])
def test_an_update_is_near_to_float32s(tokens, rank):
    """Attention at once and in blocks; all parameters, or adapters alone."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            tokens=rng.integers(0, 61, tokens).tolist(),
            mask=[0] * 4 + [1] * (tokens - 4),
            advantages=advantage,
        )
        for advantage in (1.0, -0.5, 2.0)
    ]
    batch = pack(samples, length=tokens, rows=2)
    found = []
    for model in models():
        adapters = lora.Lora(rank=rank)
        model = Decoder(model.config, dtype=model.dtype, remat="ffn", lora=adapters)
        params, reference = weights(model), weights(model)
        reference["norm"] *= 1.2
        if rank:  # the base is π_ref
            params = lora.begin_stage(adapters, params, jax.random.key(3))
            reference = None
        optimizer = optax.sgd(0.1)
        step = make_grpo_step(model, optimizer, kl_coef=0.1)
        state = TrainState.create(params, optimizer)
        before = jax.device_get(state.params)
        state, metrics = step(state, reference, batch)
        moved = jax.tree.map(lambda a, b: np.float32(a - b), state.params, before)
        found.append((metrics, moved))
    (ours, half), (theirs, whole) = found
    assert ours["grad_norm"] > 0 and ours["update/nonfinite"] == 0
    for name in ("entropy", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0.03)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b)


def test_a_reward_models_scores_and_merged_adapters():
    half, whole = models()
    params = {**weights(half), "head": jnp.ones(32), "head_bias": jnp.zeros(())}
    tokens = jnp.arange(24).reshape(2, 12)
    ours, theirs = (jax.jit(RewardModel(m))(params, tokens) for m in (half, whole))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=0.3)
    assert np.abs(theirs).max() > 1
    a, b = jnp.full((2, 8), 0.5, "bfloat16"), jnp.full((6, 2), 0.25, "bfloat16")
    merged = jax.jit(lora.merge_matrix, static_argnums=0)(
        lora.Lora(rank=2, alpha=4.0), jnp.zeros((6, 8), "bfloat16"), a, b
    )
    np.testing.assert_array_equal(np.float32(merged), 2 * 2 * 0.5 * 0.25)


def test_products_have_float32_sums():
    """256 + 1 is 256 in bfloat16."""
    ones, many = jnp.ones((1, 300), "bfloat16"), jnp.ones((300, 4), "bfloat16")
    found = jax.jit(einsum, static_argnums=0)("MK,KN->MN", ones, many)
    assert found.dtype == jnp.float32 and found.tolist() == [[300.0] * 4]


def test_slots_change_some_rows_by_rounding_alone():
    """Few; the same key with the same slots gives the same rows, and so in float32
    with any. Where a row first differs its draw was a near one: the log-probabilities
    before it agree."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 61, n).tolist() for n in rng.integers(3, 20, 8)]
    for model in models():
        params = weights(model)

        def draw(slots, model=model, params=params):
            out = generate(
                model,
                params,
                prompts,
                key=jax.random.key(1),
                samples=4,
                max_new_tokens=16,
                eos_id=0,
                slots=slots,
            )
            return np.asarray(out.tokens), np.asarray(out.logps)

        (whole, logps), (few, others) = draw(32), draw(5)
        np.testing.assert_array_equal(draw(5)[0], few)
        share = (whole == few).all(1).mean()
        assert share == 1 if model.dtype == "float32" else share > 0.6
        same = np.cumprod(whole == few, axis=1).astype(bool)
        np.testing.assert_allclose(logps[same], others[same], atol=0.06)
