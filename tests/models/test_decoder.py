"""The decoder: the logits of transformers, and what must not change them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from xla_flags import OPTIONS

from grpo_jax.checkpoints.huggingface.weights import load_pretrained
from grpo_jax.models.decoder import Decoder, default_positions

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
FAMILIES = [
    "deepseek",
    "linear_rope_biases",
    "llama3_rope",
    "llama_old_keys",
    "mistral",
    "qwen2",
    "qwen3",
]

# These programs run once: five times less time to compile, the same arithmetic.
quick_jit = functools.partial(
    jax.jit,
    compiler_options=OPTIONS,
)
logits_of = quick_jit(Decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def decoder():
    return load_pretrained(GOLDEN / "llama3_rope")


def tokens_of(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 61, (rows, length))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    model, params = load_pretrained(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens, logits = golden["tokens"], golden["logits"]
    assert np.abs(logits).max() > 4  # so that 1e-4 is a claim

    def check(tokens, mask, segments, expected):
        ours = logits_of(model, params, tokens, mask=mask, segment_ids=segments)
        ours = np.asarray(ours)
        np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=1e-4)

    all_of_them, one = np.ones((3, 20), bool), np.ones((3, 20), int)
    check(tokens, all_of_them, one, logits)
    # padding on the left: rows of 20, 16 and 12 tokens
    check(tokens, golden["mask_left"], one, golden["logits_left"])
    # padding on the right: a causal model's logits for the tokens before it
    check(tokens, np.arange(20) < np.array([[20], [13], [5]]), one, logits)
    # packed: a row holds the starts of all three sequences, and padding at its end
    parts = [(0, 8), (1, 7), (2, 3)]
    row, apart = (
        np.concatenate([x[r, :n] for r, n in parts]) for x in (tokens, logits)
    )
    segments = np.repeat([1, 2, 3, 0], [8, 7, 3, 2])
    packed, apart = np.pad(row, (0, 2)), np.pad(apart, ((0, 2), (0, 0)))
    segments, packed, apart = (np.stack([x] * 3) for x in (segments, packed, apart))
    check(packed, segments > 0, segments, apart)


@pytest.mark.parametrize("window", [None, 3])
def test_a_position_depends_on_no_later_one_and_on_all_in_the_window(decoder, window):
    config = dataclasses.replace(decoder[0].config, sliding_window=window, layers=1)
    model = Decoder(config)
    one_layer = jax.tree.map(lambda x: x[:1], decoder[1]["layers"])
    params = decoder[1] | {"layers": one_layer}
    tokens = tokens_of(1, 7)

    def hidden(table):  # each position gets its own row of a table of embeddings
        own = params | {"embed": table}
        return model.hidden(own, jnp.arange(7)[None])[0]

    jacobian = quick_jit(jax.jacobian(hidden))(
        params["embed"][tokens[0]]
    )  # [T, D, T, D]
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
        for filler in (0, 60):
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
    model, params = decoder
    tokens = tokens_of(2, 6)

    def loss(params, remat):
        own = dataclasses.replace(model, remat=remat)
        return jnp.mean(own.logits(params, tokens) ** 2)

    plain, *again = (
        quick_jit(jax.grad(loss), static_argnums=1)(params, r)
        for r in ("none", "ffn", "full")
    )
    for gradients in again:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            plain,
            gradients,
        )


def test_the_tied_embedding_gets_both_gradients():
    tied, params = load_pretrained(GOLDEN / "llama_old_keys")
    assert "unembed" not in params
    untied = Decoder(dataclasses.replace(tied.config, tied=False))
    both = params | {"unembed": params["embed"]}
    tokens = tokens_of(1, 6)

    def loss(params, model):
        return jnp.mean(jax.nn.log_softmax(model.logits(params, tokens))[..., 3])

    grad = quick_jit(jax.grad(loss), static_argnums=1)
    ours, apart = grad(params, tied)["embed"], grad(both, untied)
    expected = apart["embed"] + apart["unembed"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


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
