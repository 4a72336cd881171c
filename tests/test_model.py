"""The decoder: the logits of transformers, and what must not change them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model import Decoder, ModelConfig, default_positions
from grpo_jax.weights import load_pretrained

GOLDEN = Path(__file__).parent / "golden" / "models"
FAMILIES = [
    "deepseek",
    "linear_rope_biases",
    "llama3_rope",
    "llama_old_keys",
    "mistral",
    "qwen2",
    "qwen3",
]
CONFIG = ModelConfig(
    vocab_size=23, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn=20
)

logits_of = jax.jit(Decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, jax.tree.map(lambda x: x * 2, params)  # logits of order 10


def tokens_of(rows: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(7), (rows, length), 0, CONFIG.vocab_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    model, params = load_pretrained(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens, logits = golden["tokens"], golden["logits"]
    assert np.abs(logits).max() > 4  # so that 1e-4 is a claim

    ours = logits_of(model, params, tokens, mask=np.ones((3, 20), bool))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-4)

    # padding on the left: rows of 20, 16 and 12 tokens
    left = golden["mask_left"]
    ours = np.asarray(logits_of(model, params, tokens, mask=left))
    np.testing.assert_allclose(ours[left], golden["logits_left"][left], atol=1e-4)

    # padding on the right: a causal model's logits for the tokens before it
    right = np.arange(20) < np.array([[20], [13], [5]])
    ours = np.asarray(logits_of(model, params, tokens, mask=right))
    np.testing.assert_allclose(ours[right], logits[right], rtol=0, atol=1e-4)

    # the three sequences (cut to 13, 20, 5 tokens) in one row, then two of padding
    lengths = (13, 20, 5)
    row = np.concatenate([t[:n] for t, n in zip(tokens, lengths, strict=True)])
    row = np.pad(row, (0, 2))[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    ours = logits_of(model, params, row, mask=segments > 0, segment_ids=segments)
    apart = np.concatenate([x[:n] for x, n in zip(logits, lengths, strict=True)])
    np.testing.assert_allclose(ours[0, :38], apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_a_position_depends_on_no_later_one_and_on_all_in_the_window(decoder, window):
    model = Decoder(dataclasses.replace(CONFIG, sliding_window=window, layers=1))
    params = jax.tree.map(lambda x: x, decoder[1])
    params["layers"] = jax.tree.map(lambda x: x[:1], params["layers"])
    tokens = tokens_of(1, 7)

    def hidden(table):  # each position gets its own row of a table of embeddings
        own = params | {"embed": table}
        return model.hidden(own, jnp.arange(7)[None])[0]

    jacobian = jax.jit(jax.jacobian(hidden))(params["embed"][tokens[0]])  # [T, D, T, D]
    seen = np.abs(jacobian).max((1, 3)) > 0
    step = np.arange(7)
    distance = step[:, None] - step
    expected = (distance >= 0) & (distance < (window or 7))
    np.testing.assert_array_equal(seen, expected)


def test_padding_and_what_it_holds_change_nothing(decoder):
    model, params = decoder
    tokens = tokens_of(2, 5)
    alone = logits_of(model, params, tokens)
    for before, after in ((0, 4), (4, 0), (2, 2)):
        pad = ((0, 0), (before, after))
        mask = jnp.pad(jnp.ones((2, 5), int), pad)
        for filler in (0, 22):
            padded = jnp.pad(tokens, pad, constant_values=filler)
            logits = logits_of(model, params, padded, mask=mask)
            logits = logits[:, before : before + 5]
            np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-5)


def test_only_distances_between_positions_matter(decoder):
    model, params = decoder
    tokens = tokens_of(1, 6)
    here = logits_of(model, params, tokens)
    moved = logits_of(model, params, tokens, positions=100 + jnp.arange(6)[None])
    np.testing.assert_allclose(here, moved, rtol=0, atol=1e-4)
    stretched = logits_of(model, params, tokens, positions=3 * jnp.arange(6)[None])
    assert np.abs(here - stretched).max() > 1e-2


def test_packed_sequences_do_not_see_each_other(decoder):
    model, params = decoder
    a, b = tokens_of(2, 6)
    segments = jnp.array([[1] * 6 + [2] * 6])
    packed = logits_of(
        model, params, jnp.concatenate([a, b])[None], segment_ids=segments
    )
    apart = logits_of(model, params, jnp.stack([a, b])).reshape(1, 12, -1)
    np.testing.assert_allclose(packed, apart, rtol=1e-5, atol=1e-5)


def test_default_positions_count_the_real_tokens_of_each_sequence():
    mask = jnp.array([[0, 0, 1, 1, 1, 0, 1]], bool)
    assert default_positions(mask, None).tolist() == [[0, 0, 0, 1, 2, 3, 3]]
    segments = jnp.array([[0, 1, 1, 1, 2, 2, 0]])
    expected = [[0, 0, 1, 2, 0, 1, 0]]
    assert default_positions(segments > 0, segments).tolist() == expected


def test_remat_changes_memory_and_not_the_gradient(decoder):
    _, params = decoder
    tokens = tokens_of(2, 6)

    def loss(params, remat):
        return jnp.mean(logits_of(Decoder(CONFIG, remat=remat), params, tokens) ** 2)

    plain, again = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (0, 1)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        plain,
        again,
    )


def test_tied_embedding_gets_both_gradients():
    model = Decoder(dataclasses.replace(CONFIG, tied=True))
    params = jax.jit(model.init)(jax.random.key(1))
    assert "unembed" not in params
    untied = Decoder(CONFIG)
    both = params | {"unembed": params["embed"]}
    tokens = tokens_of(1, 6)

    def loss(params, model):
        return jnp.mean(jax.nn.log_softmax(logits_of(model, params, tokens))[..., 3])

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    tied_grad, grads = grad(params, model)["embed"], grad(both, untied)
    np.testing.assert_allclose(
        tied_grad, grads["embed"] + grads["unembed"], rtol=1e-5, atol=1e-7
    )


def test_bfloat16_computes_the_same_and_keeps_logits_in_float32():
    model, params = load_pretrained(GOLDEN / "deepseek", dtype="bfloat16")
    golden = np.load(GOLDEN / "deepseek" / "golden.npz")  # of the same bfloat16 weights
    half = logits_of(model, params, golden["tokens"])
    assert half.dtype == jnp.float32 and params["embed"].dtype == jnp.bfloat16
    error = np.sqrt(np.mean((half - golden["logits"]) ** 2)) / np.std(golden["logits"])
    assert 0 < error < 0.03


def test_many_rows_without_any_real_token_stay_finite(decoder):
    model, params = decoder
    mask = jnp.zeros((2, 4), int)
    assert np.isfinite(logits_of(model, params, tokens_of(2, 4), mask=mask)).all()
