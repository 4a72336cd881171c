"""The sampler: what it draws, and that its log-probabilities are the trainer's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation import continuation, kv_cache, sampler
from grpo_jax.generation.continuation import continue_rollouts, continue_tokens
from grpo_jax.generation.rollout_shapes import bucket_length
from grpo_jax.generation.sampler import generate, generate_tokens
from grpo_jax.generation.token_sampling import Sampling, draw_tokens
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.kernels import cpu
from grpo_jax.models.logprobs import token_logprobs

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
ROLL: Any = dict(samples=4, max_new_tokens=24, eos_id=EOS)


@pytest.fixture(params=["one block", "blocks of 4", "kernels", "kernels, 4"])
def blocks(request, monkeypatch):
    """Outputs within a block, and in many, which are used again and again.

    And both with a CPU's kernels, which else are not used where there are 8 devices.
    """
    if request.param.endswith("4"):
        monkeypatch.setattr(kv_cache, "block_size", lambda tokens: 4)
    if request.param.startswith("kernels"):
        use_kernels(monkeypatch)
    compile_anew(monkeypatch)


def use_kernels(monkeypatch):
    if not cpu.library_is_ready():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(sharding, "is_one_device", lambda: True)


def compile_anew(monkeypatch):
    """What was compiled before knows nothing of what is patched."""
    for module, core, names in (
        (sampler, generate_tokens, sampler._STATIC),
        (continuation, continue_tokens, ("model", "sampling", "ends")),
    ):
        fresh = jax.jit(functools.partial(core), static_argnames=names)
        monkeypatch.setattr(module, "_jitted", fresh)


def rows(rollouts):
    rollouts = jax.device_get(rollouts)
    return [
        (r.tolist(), p) for r, p in zip(rollouts.tokens, rollouts.logps, strict=True)
    ]


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_those_of_the_training_forward(
    temperature, window, blocks
):
    """Each prompt and completion alone, without cache or padding, gives the same."""
    model = Decoder(dataclasses.replace(CONFIG, sliding_window=window))
    out = generate(
        model,
        PARAMS,
        PROMPTS,
        key=jax.random.key(3),
        temperature=temperature,
        slots=5,
        **ROLL,
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
            best = model.project_to_vocabulary(PARAMS, hidden)[0, at : at + n].argmax(
                -1
            )
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
    options: Any = dict(
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
    tokens, logps = jax.jit(draw_tokens)(jnp.tile(logits, (n, 1)), keys, 3, 0.8)
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
    tokens, logps = draw_tokens(logits, keys, 0, 1.0)
    assert tokens.tolist() == [299] * 1000 and not logps.any()


def test_buckets_are_few_and_waste_at_most_a_third():
    sizes = {bucket_length(n) for n in range(1, 1025)}
    assert len(sizes) <= 13
    assert all(bucket_length(n) < 1.5 * n for n in range(16, 1025))


def test_an_empty_prompt_is_refused_by_number():
    with pytest.raises(GrpoError, match="prompt 1 is empty"):
        generate(MODEL, PARAMS, [[1], []], key=jax.random.key(0), **ROLL)


def test_results_depend_on_neither_slots_nor_the_queues_order(blocks):
    """Rows and prompts keep their numbers; only who decodes when is different."""
    key = jax.random.key(7)
    alone, three, all_at_once = (
        generate(MODEL, PARAMS, PROMPTS, key=key, slots=w, **ROLL) for w in (1, 3, 12)
    )
    for other in (alone, three):
        assert other.tokens.tolist() == all_at_once.tokens.tolist()
        assert other.finished.tolist() == all_at_once.finished.tolist()
        np.testing.assert_allclose(other.logps, all_at_once.logps, atol=1e-5)
    # Greedy rows depend on their prompt alone: the queue's order only permutes them.
    greedy: Any = dict(ROLL, samples=1, key=key, temperature=0, slots=2)
    forth = rows(generate(MODEL, PARAMS, PROMPTS, **greedy))
    back = rows(generate(MODEL, PARAMS, PROMPTS[::-1], **greedy))[::-1]
    assert [tokens for tokens, _ in forth] == [tokens for tokens, _ in back]


@pytest.mark.parametrize("way", ["XLA", "an accelerator's widths", "kernels"])
def test_many_prompts_at_once_are_each_read_by_their_own_rows(way, monkeypatch):
    """Slots for 13 prompts: several rounds, and several widths towards the end."""
    if way == "an accelerator's widths":
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    if way == "kernels":
        use_kernels(monkeypatch)
    compile_anew(monkeypatch)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 99, 3 + n).tolist() for n in range(13)]
    options: Any = dict(ROLL, samples=10, key=jax.random.key(5))
    many = generate(MODEL, PARAMS, prompts, slots=130, **options)
    few = generate(MODEL, PARAMS, prompts, slots=4, **options)
    assert len(set(map(tuple, many.tokens.tolist()))) > 100
    assert many.tokens.tolist() == few.tokens.tolist()
    np.testing.assert_allclose(many.logps, few.logps, atol=1e-5)


def test_slots_are_occupied_on_ragged_lengths():
    """A queue of 4 × the slots; and with fewer slots at the end, the same tokens."""
    prompts = [*PROMPTS, [9] * 5]
    options: Any = dict(ROLL, samples=16)
    key = jax.random.key(0)
    out = generate(MODEL, PARAMS, prompts, key=key, slots=16, **options)
    assert out.lengths.std() > out.lengths.mean() / 3
    assert 0.9 <= out.occupancy <= 1
    one = generate(MODEL, PARAMS, prompts, key=key, slots=1, **options)
    assert one.occupancy == 1
    assert one.tokens.tolist() == out.tokens.tolist()


def test_what_a_slot_held_before_does_not_reach_the_next_row():
    """A long row first: its keys and values lie beyond where the short one ends."""
    options: Any = dict(
        key=jax.random.key(1), temperature=0, max_new_tokens=24, eos_id=EOS
    )
    after = generate(MODEL, PARAMS, [[11] * 90, [1, 2, 3]], slots=1, **options)
    alone = generate(MODEL, PARAMS, [[1, 2, 3]], slots=1, **options)
    assert after.tokens[1].tolist() == alone.tokens[0].tolist()
    np.testing.assert_allclose(after.logps[1], alone.logps[0], atol=1e-6)


def test_a_row_that_is_nan_spoils_no_other(blocks):
    """Nor the next one in its slot, nor those beside it when they go on."""
    bad = 299  # never drawn below
    params = {**PARAMS, "embed": PARAMS["embed"].at[bad].set(jnp.nan)}
    prompts = [[1, 2, 3], [bad] * 20, [4] * 17, [7, 8]]
    for slots in (1, 2):
        options: Any = dict(ROLL, samples=2, key=jax.random.key(1), slots=slots)
        found = rows(generate(MODEL, params, prompts, **options))
        good = rows(generate(MODEL, PARAMS, prompts, **options))
        assert np.isnan(found[2][1]).any() and np.isnan(found[3][1]).any()
        assert all(bad not in good[i][0] for i in (0, 1, 4, 5, 6, 7))
        for i in (0, 1, 4, 5, 6, 7):
            assert found[i][0] == good[i][0]
            np.testing.assert_allclose(found[i][1], good[i][1], atol=2e-6)
    told: Any = [[9], [9, 9], [bad], None]
    once: Any = dict(ROLL, key=jax.random.key(2))
    del once["samples"]
    more = []
    for weights in (params, PARAMS):
        first = generate(MODEL, weights, prompts, keep=True, **once)
        more.append(rows(continue_rollouts(MODEL, weights, first, told, **once)))
    assert np.isnan(more[0][2][1]).any()
    assert more[0][0][0] == more[1][0][0]
    np.testing.assert_allclose(more[0][0][1], more[1][0][1], atol=2e-6)


def test_another_number_of_prompts_is_no_other_program():
    jitted: Any = sampler._jitted
    options: Any = dict(ROLL, samples=2)

    def count(n):
        generate(MODEL, PARAMS, [[1, 2]] * n, key=jax.random.key(n), **options)
        return jitted._cache_size()

    assert count(7) == count(8)


@pytest.mark.parametrize("window", [None, 6])
def test_continuing_equals_prefilling_everything_anew(window, blocks):
    model = Decoder(dataclasses.replace(CONFIG, sliding_window=window))
    options: Any = dict(
        max_new_tokens=9, temperature=0, eos_id=EOS, key=jax.random.key(0)
    )
    first = generate(model, PARAMS, PROMPTS, keep=True, **options)
    tool = [[30, 31, 32], None, []]
    second = continue_rollouts(model, PARAMS, first, tool, **options)
    again = [[40], None, [41, 42]]
    third = continue_rollouts(model, PARAMS, second, again, **options)
    texts = [list(prompt) for prompt in PROMPTS]
    for turn, given in (
        (first, ([],) * 3),
        (second, tool),
        (third, [[40], None, [41, 42]]),
    ):
        for i, ids in enumerate(given):
            n = int(turn.lengths[i])
            if ids is None:
                assert n == 0 and not turn.mask[i].any()
                continue
            anew = generate(model, PARAMS, [texts[i] + ids], **options)
            at = len(ids)
            assert turn.tokens[i, :at].tolist() == ids
            assert turn.tokens[i, at:n].tolist() == anew.tokens[0, : n - at].tolist()
            assert n - at == anew.lengths[0] and turn.finished[i] == anew.finished[0]
            np.testing.assert_allclose(
                turn.logps[i, at:n], anew.logps[0, : n - at], atol=1e-5
            )
            assert turn.mask[i].tolist() == [
                at <= c < n for c in range(turn.mask.shape[1])
            ]
            assert not turn.logps[i, :at].any()
            texts[i] += turn.tokens[i, :n].tolist()


def test_stop_sequences_end_a_row_and_belong_to_it():
    """What greedy decoding writes is known; cut where the stop sequence first ends."""
    options: Any = dict(
        key=jax.random.key(0), max_new_tokens=24, temperature=0, eos_id=-1
    )
    free = generate(MODEL, PARAMS, [[1, 2, 3], [7, 8]], **options).tokens.tolist()
    stops = [free[0][5:8], [299, 298], free[1][2:3]]
    out = generate(MODEL, PARAMS, [[1, 2, 3], [7, 8]], stop=stops, **options)
    for row, n, whole in zip(
        out.tokens.tolist(), out.lengths.tolist(), free, strict=True
    ):
        ends = [
            i for i in range(1, 25) for s in stops if whole[max(0, i - len(s)) : i] == s
        ]
        assert n == min(ends) and row[:n] == whole[:n] and not any(row[n:])
    assert out.finished.tolist() == [True, True]
    # A prompt that ends with the sequence's beginning does not count.
    begun = [1, 2, free[0][5]]
    again = generate(MODEL, PARAMS, [begun], **options).tokens[0].tolist()
    out = generate(MODEL, PARAMS, [begun], stop=[[begun[-1], again[0]]], **options)
    assert out.lengths[0] > 1


def by_hand(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The filters by sorting, one after the other, each on what the last one left."""
    p = np.exp(np.float64(logits) / temperature)
    p /= p.sum()
    if 0 < top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0
        p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=7),
        dict(top_p=0.6),
        dict(min_p=0.2),
        dict(top_k=40, top_p=0.8, min_p=0.05),
        dict(top_k=1000, top_p=1.0),
        dict(top_p=1e-6),
    ],
    ids=str,
)
def test_filters_are_those_of_a_sorted_distribution(settings):
    n, v, temperature = 20_000, 300, 0.7
    logits = jax.random.normal(jax.random.key(9), (v,)) * 1.5
    sampling = Sampling(temperature=temperature, **settings)
    keys = jax.random.split(jax.random.key(2), n)
    tokens, logps = jax.jit(sampling)(
        jnp.tile(logits, (n, 1)), keys, jnp.zeros(n, jnp.int32)
    )
    p = by_hand(
        logits, temperature, *({"top_k": 0, "top_p": 1, "min_p": 0} | settings).values()
    )
    np.testing.assert_allclose(logps, np.log(p[tokens]), atol=1e-4)  # never one of 0
    counts, kept = np.bincount(tokens, minlength=v), p > 0
    chi = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum()
    degrees = kept.sum() - 1
    assert abs(chi - degrees) <= 5 * np.sqrt(2 * degrees)


def test_a_choice_that_makes_no_sense_is_refused():
    wrong: Any = {"top_p": 0.0, "min_p": 2.0, "top_k": -1, "temperature": -1}
    for name, value in wrong.items():
        with pytest.raises(GrpoError, match=name):
            Sampling(**{name: value})
    with pytest.raises(GrpoError, match="stop sequence is empty"):
        generate(MODEL, PARAMS, PROMPTS, key=jax.random.key(0), stop=[[]], **ROLL)
    out = generate(MODEL, PARAMS, PROMPTS, key=jax.random.key(3), **ROLL)
    with pytest.raises(GrpoError, match="keep=True"):
        continue_rollouts(
            MODEL,
            PARAMS,
            out,
            [[1]] * 12,
            key=jax.random.key(0),
            max_new_tokens=4,
            eos_id=0,
        )


def test_a_narrower_cache_is_close():
    options: Any = dict(
        key=jax.random.key(3), max_new_tokens=6, eos_id=-1, temperature=0
    )
    wide = generate(MODEL, PARAMS, PROMPTS, **options)
    narrow = generate(
        MODEL, PARAMS, PROMPTS, cache_dtype="bfloat16", keep=True, **options
    )
    assert narrow.cache.layers[0][0][0].dtype == jnp.bfloat16
    # Equal as long as the tokens are; the first sees only prompts in bfloat16.
    np.testing.assert_allclose(wide.logps[:, 0], narrow.logps[:, 0], atol=0.05)
    assert (wide.logps[:, 0] != narrow.logps[:, 0]).any()
