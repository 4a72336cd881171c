"""The sampler's kernels for CPUs: against NumPy, and against XLA's own way."""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.distributed import sharding
from grpo_jax.generation import cache_attention
from grpo_jax.generation import kv_cache as of_cache
from grpo_jax.generation.sampler import generate, generate_tokens_on_mesh
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.kernels import cpu
from grpo_jax.models.kernels.mask import AttentionMask
from grpo_jax.models.kernels.xla import block_attention
from grpo_jax.plan.flops import count_flops


@pytest.fixture(autouse=True)
def compiled():
    if not cpu.library_is_ready():
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("rows", [1, 16, 33, 80, 130])
@pytest.mark.parametrize("out, width", [(1, 3), (12, 64), (50, 576), (1537, 40)])
def test_products_are_numpys(rows, out, width):
    rng = np.random.default_rng(rows * out)
    weight = rng.normal(size=(out, width)).astype(np.float32)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    found = jax.jit(cpu.few_rows)(x, weight)
    np.testing.assert_allclose(
        found, x.astype(np.float64) @ weight.T.astype(np.float64), atol=2e-7 * width
    )


def a_cache(rng, *, slots, prompts, size, block, others, heads, width):
    """Slots that wrote different numbers of columns, in a circle, with a few dead."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    lengths = rng.integers(0, size + 1, prompts)
    prompt = rng.integers(0, prompts, slots)
    prefixes = of_cache.Prefixes(
        jnp.asarray(lengths, jnp.int32),
        ((normal(prompts, heads, width, size), normal(prompts, heads, size, width)),),
    )
    count = others + 1
    turn = int(rng.integers(count * block, 3 * count * block))
    # What turn each column was written in: the last block is that of this turn.
    first = turn // block * block
    at = [first - (others - i) * block + np.arange(block) for i in range(others)]
    at = np.stack([*at, first + np.arange(block)])  # [X + 1, B]
    number = at[:-1, 0] // block
    at[:-1] = at[np.argsort(number % max(others, 1), kind="stable")]
    wrote = rng.integers(1, others * block + 2, slots)  # this turn's column included
    began = turn + 1 - wrote
    own = (at[:, None] >= began[:, None]) & (at[:, None] <= turn)  # [X + 1, W, B]
    places = np.where(own, lengths[prompt][:, None] + at[:, None] - began[:, None], -1)
    return of_cache.Cache(
        turn=jnp.int32(turn),
        token=jnp.zeros(slots, jnp.int32),
        position=jnp.asarray(lengths[prompt] + wrote - 1, jnp.int32),
        began=jnp.asarray(began, jnp.int32),
        prompt=jnp.asarray(prompt, jnp.int32),
        places=tuple(jnp.asarray(x, jnp.int32) for x in places),
        layers=(
            tuple(
                (
                    normal(slots, heads, width, block),
                    normal(slots, heads, block, width),
                )
                for _ in range(count)
            ),
        ),
        prefixes=prefixes,
    )


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    "shape",
    [
        dict(slots=21, prompts=2, size=24, block=4, others=3, heads=2, width=8),
        dict(slots=40, prompts=3, size=160, block=32, others=2, heads=3, width=64),
        dict(slots=5, prompts=9, size=1, block=64, others=0, heads=1, width=20),
        dict(slots=1, prompts=1, size=300, block=128, others=1, heads=2, width=128),
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
@pytest.mark.parametrize("groups", [1, 3, 7])
def test_attention_is_numpys_and_xlas(shape, window, groups):
    rng = np.random.default_rng(groups)
    cache = a_cache(rng, **shape)
    slots, heads, width = shape["slots"], shape["heads"], shape["width"]
    q = jnp.asarray(rng.normal(size=(slots, 1, heads * groups, width)), jnp.float32)
    live = jnp.asarray(rng.random(slots) < 0.8).at[0].set(True)
    prefix, blocks = cache.prefixes.layers[0], cache.layers[0]

    # This turn's column is yet to be written.
    column = cache.turn % cache.block
    keys, values = blocks[-1]
    new = keys[..., column][:, None], values[:, :, column][:, None]
    before = (
        *blocks[:-1],
        (keys.at[..., column].set(7.0), values.at[:, :, column].set(7.0)),
    )
    given = (before, cache, live)
    kept = jax.device_get(jax.tree.leaves(jax.tree.map(jnp.copy, given)))
    call = jax.jit(functools.partial(cpu.attend, window=window))
    found, after = call(q, *new, prefix, *given)
    assert not found[~live].any()
    for x, y, was in zip(after[-1], blocks[-1], before[-1], strict=True):
        assert jnp.array_equal(x[live], y[live])
        assert jnp.array_equal(x[~live], was[~live])
    for x, y in zip(jax.tree.leaves(given), kept, strict=True):
        assert np.array_equal(x, y)  # what was given is not written into
    plan = cache_attention.group_slots_by_prompt(cache, live, 4)
    parts = cache_attention.attend_to_prompts(
        q.reshape(slots, heads, groups, width),
        prefix,
        cache.prefixes.lengths,
        cache.position,
        plan,
        window,
    )
    reads = cache_attention.blocks_to_read(cache, live)
    other = cache_attention.attend_to_blocks(q, parts, blocks, cache, window, reads)
    np.testing.assert_allclose(found[live], other[live], atol=2e-5)

    for slot in np.flatnonzero(live):
        of, position = int(cache.prompt[slot]), int(cache.position[slot])
        keys, values, at = [], [], []
        length = int(cache.prefixes.lengths[of])
        keys.append(prefix[0][of][..., :length])  # [K, H, S]
        values.append(prefix[1][of][:, :length])
        at += range(length)
        for places, block in zip(cache.places, blocks, strict=True):
            mine = np.flatnonzero(places[slot] >= 0)
            keys.append(block[0][slot][..., mine])
            values.append(block[1][slot][:, mine])
            at += places[slot][mine].tolist()
        assert sorted(at) == list(range(position + 1))  # the test's cache is one
        seen = position - np.array(at) < (window or 10**9)
        scores = np.einsum(
            "KGH,KHS->KGS",
            np.float64(q[slot, 0]).reshape(heads, groups, width),
            np.concatenate(keys, -1)[..., seen],
        )
        scores = np.exp(scores / np.sqrt(width))
        scores /= scores.sum(-1, keepdims=True)
        taken = np.einsum("KGS,KSH->KGH", scores, np.concatenate(values, 1)[:, seen])
        np.testing.assert_allclose(
            found[slot, 0], taken.reshape(heads * groups, width), atol=3e-6
        )


def test_great_and_equal_scores_are_weighed_as_they_are():
    """Scores of hundreds, which e^x alone could not hold, and ties."""
    shape: Any = dict(slots=1, prompts=1, size=8, block=32, others=0, heads=1, width=16)
    cache = a_cache(np.random.default_rng(0), **shape)
    keys = jnp.zeros((1, 1, 16, 32)).at[..., 0].set(100.0)
    values = jnp.zeros((1, 1, 32, 16)).at[0, 0, :2].set(jnp.array([[1.0], [5.0]]))
    places = (jnp.full((1, 32), -1).at[0, 0].set(0).at[0, 1].set(1),)
    cache = dataclasses.replace(
        cache,
        turn=jnp.int32(1),
        places=places,
        position=jnp.array([1]),
        prefixes=dataclasses.replace(cache.prefixes, lengths=jnp.array([0])),
    )
    q, live = jnp.ones((1, 1, 1, 16)), jnp.array([True])
    for wanted, second in ((1.0, 0.0), (3.0, 100.0), (5.0, 200.0)):
        block = (keys.at[..., 1].set(second), values)
        k, v = (x.reshape(1, 1, 1, 16) for x in (block[0][..., 1], block[1][:, :, 1]))
        out, _ = cpu.attend(
            q, k, v, cache.prefixes.layers[0], (block,), cache, live, None
        )
        np.testing.assert_allclose(out, wanted, rtol=1e-6)


CONFIG = ModelConfig(
    vocab_size=60, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64
)


def test_devices_that_sample_side_by_side_have_a_kernel_each():
    """In a shard_map every device calls it for its slots, on one pool of threads."""
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0))
    options: Any = dict(key=jax.random.key(1), samples=6, max_new_tokens=12, eos_id=3)
    prompts = np.arange(24).reshape(8, 3) + 4

    def run(params, tokens):
        return generate_tokens_on_mesh(
            model, params, tokens, jnp.ones_like(tokens, bool), **options
        )

    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(params, prompts).as_text()
        spread = jax.jit(run)(params, prompts)
    assert "GrpoFewRows" in text and "GrpoDecodeAttention" in text
    # Eight devices and no mesh: XLA's own way.
    alone = generate(model, params, prompts.tolist(), **options)
    for i in range(6):
        assert spread.tokens[i].tolist() == alone.tokens[i].tolist()
    np.testing.assert_allclose(spread.logps[:6], alone.logps[:6], atol=1e-5)


def test_it_is_for_one_cpu_and_float32():
    cache = a_cache(
        np.random.default_rng(0),
        slots=2,
        prompts=1,
        size=8,
        block=32,
        others=0,
        heads=1,
        width=8,
    )
    arrays = cache.layers, cache.prefixes.layers
    assert not cpu.kernels_fit(arrays)  # eight devices
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert cpu.kernels_fit(arrays)
        narrow = arrays[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays[1])
        assert not cpu.kernels_fit(narrow)
    mesh = sharding.make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert not cpu.kernels_fit(arrays)


SAMPLE = """
import jax
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.config import ModelConfig
from grpo_jax.generation.sampler import generate
model = Decoder(ModelConfig(vocab_size=60, width=32, layers=2, heads=4, kv_heads=2,
                            head_dim=8, ffn=64))
params = model.init(jax.random.key(0))
for n in (2, 3):
    out = generate(model, params, [[4, 5, 6]], key=jax.random.key(1), samples=n,
                   max_new_tokens=12, eos_id=3)
print(out.tokens.tolist())
"""


def sampled(**environment):
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_without_a_compiler_xla_samples_the_same_and_it_is_said_once(tmp_path):
    cache = {"GRPO_JAX_CACHE": str(tmp_path)}
    with_kernels, said = sampled(**cache)
    assert not said and len(list((tmp_path / "native").iterdir())) == 1
    for why, given in (
        ("No such file", {"CXX": "no-such-compiler"}),
        ("returned non-zero", {"CXX": "false"}),
        ("cannot make the cache folder", {"GRPO_JAX_CACHE": "/proc/none"}),
    ):
        without, said = sampled(**{**cache, **given})
        assert without == with_kernels
        assert why in said and said.count("\n") == 1, said
    assert len(list((tmp_path / "native").iterdir())) == 1  # nothing half made


def test_what_was_compiled_is_used_again(tmp_path):
    cache = {"GRPO_JAX_CACHE": str(tmp_path)}
    sampled(**cache)
    (file,) = (tmp_path / "native").iterdir()
    before = file.stat().st_mtime_ns
    sampled(**cache)
    assert file.stat().st_mtime_ns == before


def test_the_plan_counts_what_they_multiply():
    """AttentionMask are filled up to 16; attention as if every column were seen."""
    products = jax.make_jaxpr(cpu.few_rows)(jnp.ones((5, 8)), jnp.ones((12, 8)))
    assert count_flops(products) == 2 * 12 * 8 * 16
    shape: Any = dict(slots=2, prompts=1, size=8, block=32, others=1, heads=1, width=8)
    cache = a_cache(np.random.default_rng(0), **shape)
    heads = jnp.ones((2, 1, 3, 8)), *[jnp.ones((2, 1, 1, 8))] * 2
    given = cache.prefixes.layers[0], cache.layers[0], cache, jnp.ones(2, bool)
    call = functools.partial(cpu.attend, window=None)
    assert count_flops(jax.make_jaxpr(call)(*heads, *given)) == 4 * 2 * 3 * 8 * (8 + 64)
    q, k, v = jnp.ones((1, 32, 6, 8)), *[jnp.ones((1, 32, 2, 8))] * 2
    rows = AttentionMask(jnp.ones((1, 32), bool), None, jnp.arange(32)[None])
    attention = functools.partial(block_attention, rows=rows, size=16)

    def both(q, k, v):
        out, back = jax.vjp(attention, q, k, v)
        return back(out)

    with jax.set_mesh(sharding.make_mesh(data=1, devices=jax.devices()[:1])):
        jaxpr = jax.make_jaxpr(both)(q, k, v)
    assert count_flops(jaxpr, {"pairs": 3}) == 3 * 7 * 2 * 2 * (3 * 16) * 16 * 8
