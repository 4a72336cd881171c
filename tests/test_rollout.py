"""The sampler: what it draws, and that its log-probabilities are the trainer's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import GrpoError
from grpo_jax.logprobs import token_logprobs
from grpo_jax.model import Decoder, ModelConfig
from grpo_jax.rollout import bucket, draw, generate, generate_tokens

CONFIG = ModelConfig(
    vocab_size=300,  # more than one block of the inverse CDF, not a multiple of it
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=64,
    qk_norm=True,
)
MODEL = Decoder(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
EOS = (0, 5, 9, *range(100, 106))
PROMPTS = [[1, 2, 3], [4] * 20, [7, 8]]
ROLL = dict(samples=4, max_new_tokens=24, eos_id=EOS)


def rows(rollouts):
    rollouts = jax.device_get(rollouts)
    return [
        (r.tolist(), p) for r, p in zip(rollouts.tokens, rollouts.logps, strict=True)
    ]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_of_the_training_forward(temperature, window):
    """Each prompt and completion alone, without cache or padding, gives the same."""
    model = Decoder(dataclasses.replace(CONFIG, sliding_window=window))
    out = generate(
        model, PARAMS, PROMPTS, key=jax.random.key(3), temperature=temperature, **ROLL
    )
    forward = jax.jit(model.hidden)
    for i in range(12):
        prompt, n = PROMPTS[i // 4], int(out.lengths[i])
        whole = [*prompt, *out.tokens[i, :n].tolist()]
        tokens = jnp.zeros((1, 48), int).at[0, : len(whole)].set(jnp.array(whole))
        hidden = forward(PARAMS, tokens)[:, :-1]
        unembed = model.unembed(PARAMS)
        logps, _ = token_logprobs(
            hidden, unembed, tokens[:, 1:], temperature=temperature or 1.0
        )
        at = len(prompt) - 1
        np.testing.assert_allclose(logps[0, at : at + n], out.logps[i, :n], atol=1e-4)
        if temperature == 0:
            best = model.project(PARAMS, hidden)[0, at : at + n].argmax(-1)
            assert best.tolist() == out.tokens[i, :n].tolist()


def test_eos_belongs_to_the_completion_and_nothing_follows_it():
    out = jax.device_get(
        generate(MODEL, PARAMS, PROMPTS, key=jax.random.key(3), **ROLL)
    )
    assert 0 < out.finished.sum() < 12  # both kinds are seen
    for tokens, logps, mask, n, finished in zip(
        out.tokens, out.logps, out.mask, out.lengths, out.finished, strict=True
    ):
        assert mask.tolist() == [i < n for i in range(24)]
        assert (tokens[n - 1] in EOS) == finished
        assert not set(tokens[: n - 1].tolist()) & set(EOS)
        assert not tokens[n:].any() and not logps[n:].any()
        assert finished or n == 24


def test_eos_as_the_first_token_is_a_completion_of_one():
    everything = tuple(range(300))
    out = generate(
        MODEL,
        PARAMS,
        PROMPTS,
        key=jax.random.key(0),
        max_new_tokens=8,
        eos_id=everything,
    )
    assert out.lengths.tolist() == [1, 1, 1] and bool(out.finished.all())
    assert bool((out.logps[:, 0] < 0).all())  # and it is trained on


def test_a_row_depends_on_neither_padding_nor_the_other_prompts():
    key = jax.random.key(4)
    alone = rows(generate(MODEL, PARAMS, PROMPTS[:1], key=key, **ROLL))
    among = rows(generate(MODEL, PARAMS, [*PROMPTS, [6] * 60], key=key, **ROLL))[:4]
    for (tokens, logps), (others, other_logps) in zip(alone, among, strict=True):
        assert tokens == others
        np.testing.assert_allclose(logps, other_logps, atol=1e-5)


def test_padding_may_stand_on_either_side():
    options = dict(
        key=jax.random.key(5), samples=2, max_new_tokens=12, temperature=1.0, eos_id=EOS
    )
    right = jnp.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    left = jnp.array([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
    a = generate_tokens(
        MODEL, PARAMS, right, jnp.array([[1] * 3 + [0] * 2, [1] * 5]), **options
    )
    b = generate_tokens(
        MODEL, PARAMS, left, jnp.array([[0] * 2 + [1] * 3, [1] * 5]), **options
    )
    assert a.tokens.tolist() == b.tokens.tolist()
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_the_same_key_repeats_and_another_does_not():
    def tokens(seed):
        key = jax.random.key(seed)
        return generate(MODEL, PARAMS, PROMPTS, key=key, **ROLL).tokens.tolist()

    assert tokens(1) == tokens(1) != tokens(2)
    samples = tokens(1)[:4]
    assert len({tuple(row) for row in samples}) == 4  # the group is not four copies


def test_draw_follows_the_distribution():
    """A chi-squared test over a vocabulary of more than one block."""
    n, v = 60_000, 300
    logits = jnp.where(jnp.arange(v) % 3 == 0, -jnp.inf, jnp.sin(jnp.arange(v)) * 2)
    keys = jax.random.split(jax.random.key(0), n)
    tokens, logps = jax.jit(draw)(jnp.tile(logits, (n, 1)), keys, 3, 0.8)
    p = np.asarray(jax.nn.softmax(logits / 0.8), np.float64)
    counts = np.bincount(tokens, minlength=v)
    assert not counts[p == 0].any()  # never a token that is ruled out
    expected = n * p[p > 0]
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    degrees = (p > 0).sum() - 1
    assert abs(chi - degrees) < 4 * np.sqrt(2 * degrees)
    np.testing.assert_allclose(logps, np.log(p[tokens]), atol=1e-5)


def test_a_certain_token_is_always_drawn():
    logits = jnp.full((1000, 300), -1e9).at[:, 299].set(0.0)
    keys = jax.random.split(jax.random.key(1), 1000)
    tokens, logps = draw(logits, keys, 0, 1.0)
    assert tokens.tolist() == [299] * 1000 and not logps.any()


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = {bucket(n) for n in range(1, 1025)}
    assert len(sizes) <= 13
    assert all(bucket(n) < 1.5 * n for n in range(16, 1025))


def test_an_empty_prompt_is_refused_by_number():
    with pytest.raises(GrpoError, match="prompt 1 is empty"):
        generate(MODEL, PARAMS, [[1], []], key=jax.random.key(0), **ROLL)
