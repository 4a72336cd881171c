"""Each platform's way against softmax written out, and against what must hold of it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_meshes import mesh_of
from jax.sharding import AbstractMesh

from grpo_jax.distributed import sharding
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.kernels import attention as attention_module
from grpo_jax.models.kernels import cpu, tpu
from grpo_jax.models.kernels.attention import attend, on_each_device
from grpo_jax.models.kernels.gpu import cudnn_attention
from grpo_jax.models.kernels.mask import AttentionMask
from grpo_jax.models.kernels.tpu import splash_attention
from grpo_jax.models.kernels.xla import BLOCK, dense_attention, padded_block_attention
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import PROMPT, pack, unpack

T = 50  # no multiple of a block
WAYS = {
    "blocks": functools.partial(padded_block_attention, size=16),
    "kernels": functools.partial(padded_block_attention, size=16),  # a CPU's
    "splash": functools.partial(splash_attention, interpret=True),
    "cudnn": functools.partial(
        cudnn_attention, implementation="xla"
    ),  # what is asked of it
}


def samples_of(lengths, prompt=0, answers=1) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for n in lengths:
        first = rng.integers(0, 61, prompt).tolist()
        for i in range(answers):
            tokens = first + rng.integers(0, 61, n - prompt + i).tolist()
            mask = [0] * prompt + [1] * (len(tokens) - prompt)
            samples.append(Sample(tokens=tokens, mask=mask, prompt=prompt))
    return samples


def rows_of(case: str, length: int = T) -> AttentionMask:
    if case in ("packed", "shared"):
        shared = case == "shared"
        samples = samples_of([14, 19], prompt=8, answers=4 if shared else 2)
        batch = pack(samples, length=length, rows=2, share_prompts=shared).micro_batch(
            0
        )
        ids = jnp.array(batch.segment_ids)
        assert ((ids >= PROMPT).any() == shared) and (ids == 0).any()
        return AttentionMask(jnp.ones(ids.shape, bool), ids, jnp.array(batch.positions))
    real = np.ones((2, length), bool)
    if case == "left":
        real[0, : length // 3], real[1, : length - 4] = False, False
    if case == "right":
        real[0, length // 3 :], real[1, -5:] = False, False
    positions = np.cumsum(real, 1) - real
    return AttentionMask(jnp.array(real), None, jnp.array(positions))


def sees(rows: AttentionMask, b: int, i: int, j: int) -> bool:
    """Whether query i of row b may look at key j, in words."""
    if i == j:
        return True
    ids = np.zeros(rows.real.shape, int) if rows.segments is None else rows.segments
    mine, theirs = ids[b, i], ids[b, j]
    shared = theirs >= PROMPT and theirs % PROMPT == 0
    own = mine == theirs or (shared and theirs == mine - mine % PROMPT)
    near = rows.positions[b, i] - rows.positions[b, j]
    in_window = rows.window is None or near < rows.window
    return bool(j < i and rows.real[b, j] and own and in_window)


def mask_of(rows: AttentionMask) -> np.ndarray:
    plain = jax.tree.map(np.asarray, rows)
    batch, length = rows.real.shape
    every = range(length)
    return np.array([[[sees(plain, b, i, j) for j in every] for i in every]
                     for b in range(batch)])  # fmt: skip


def written_out(q, k, v, allowed):
    """float64, one head and one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(*q.shape[:3]):
        here = allowed[b, i]
        scores = k[b, here, n // group] @ q[b, i, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights @ v[b, here, n // group] / weights.sum()
    return out


def inputs(length=T, rows=2, heads=4, kv_heads=2, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (rows, length, n, width), dtype)
        for key, n in zip(keys, sizes, strict=True)
    ]


def gradients(f, q, k, v, cotangent):
    """What f gives, and the gradients of its sum with `cotangent`."""

    @jax.jit
    def both(q, k, v):
        out, back = jax.vjp(f, q, k, v)
        return out, back(cotangent)

    return both(q, k, v)


@contextlib.contextmanager
def kernels_in_use():
    """As on a machine of one device; else 8 devices take XLA's own way."""
    if not cpu.library_is_ready():
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "is_one_device", lambda: True)
        yield


def check(way, rows: AttentionMask, arrays) -> None:
    q, k, v, cotangent = arrays
    allowed = mask_of(rows)
    dense = functools.partial(dense_attention, allowed=jnp.array(allowed))
    chosen = kernels_in_use() if way is WAYS["kernels"] else contextlib.nullcontext()
    with chosen:
        out, ours = gradients(lambda q, k, v: way(q, k, v, rows), q, k, v, cotangent)
    np.testing.assert_allclose(out, written_out(q, k, v, allowed), atol=2e-6)
    _, expected = gradients(dense, q, k, v, cotangent)
    for a, b in zip(ours, expected, strict=True):
        assert np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["left", "right", "packed", "shared"])
def test_every_way_gives_the_numbers_of_softmax_and_its_gradients(case, way):
    check(WAYS[way], rows_of(case), inputs())


@pytest.mark.parametrize("where", ["key", "value", "query"])
@pytest.mark.parametrize("way", ["blocks", "kernels", "dense"])
@pytest.mark.parametrize("case", ["packed", "shared", "left"])
def test_a_nan_reaches_nobody_who_may_not_look_at_it(case, way, where):
    """Forward and gradient, to the bit; who may look at it takes NaN."""
    rows, (q, k, v, cotangent) = rows_of(case), inputs()
    allowed, at = mask_of(rows), 20  # of the first row, in a block with others
    spoilt = {"key": (q, k.at[0, at, 0, 3].set(jnp.nan), v)}
    spoilt["value"] = (q, k, v.at[0, at, 0, 5].set(jnp.inf))
    spoilt["query"] = (q.at[0, at, 1].set(jnp.nan), k, v)
    hit = np.zeros(q.shape[:2], bool)  # queries
    hit[0] = allowed[0, :, at] if where != "query" else np.arange(T) == at
    seen = (allowed & hit[..., None]).any(1)  # keys that these may look at
    chosen = kernels_in_use() if way == "kernels" else contextlib.nullcontext()
    dense = functools.partial(dense_attention, allowed=jnp.array(allowed))
    f = dense if way == "dense" else lambda q, k, v: WAYS[way](q, k, v, rows)
    with chosen:
        out, clean = gradients(f, q, k, v, cotangent)
        bad = jnp.where(hit[..., None, None], jnp.nan, cotangent)  # as a loss has it
        for given in (cotangent, bad):
            found, ours = gradients(f, *spoilt[where], given)
            heads = slice(0, 2) if where != "query" else slice(1, 2)
            assert np.isnan(found[hit][:, heads]).all()
            assert not hit.all() and not seen.all()
            np.testing.assert_array_equal(found[~hit], out[~hit])
            np.testing.assert_array_equal(ours[0][~hit], clean[0][~hit])
            for a, b in zip(ours[1:], clean[1:], strict=True):
                np.testing.assert_array_equal(a[~seen], b[~seen])


def test_kernels_take_heads_and_blocks_of_a_models_size(monkeypatch):
    """64 wide, three query heads a key head, blocks of 64, the last not full."""
    monkeypatch.setitem(WAYS, "kernels", padded_block_attention)
    for rows in (rows_of("left", 170), rows_of("shared", 170)):
        for window in (None, 40):
            here = AttentionMask(rows.real, rows.segments, rows.positions, window)
            check(padded_block_attention, here, inputs(170, heads=6, width=64))


def test_kernels_are_called_and_may_be_mapped():
    """Under vmap one row after the other, and the same numbers."""
    rows, (q, k, v, _) = rows_of("packed"), inputs()
    with kernels_in_use():
        f = functools.partial(padded_block_attention, size=16)
        text = str(jax.make_jaxpr(f)(q, k, v, rows))
        whole = f(q, k, v, rows)
        one = jax.tree.map(lambda x: x[:, None], rows)
        mapped = jax.vmap(f)(q[:, None], k[:, None], v[:, None], one)[:, 0]
    assert "GrpoBlocksForward" in text
    np.testing.assert_allclose(whole, mapped, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_window_is_of_positions_not_of_places(way):
    """An output that goes on from a shared prompt stands far from it in the row."""
    rows = rows_of("shared")
    windowed = AttentionMask(rows.real, rows.segments, rows.positions, window=5)
    ids, at = np.asarray(rows.segments), np.asarray(rows.positions)
    far = [
        (b, i, j)
        for b, i, j in np.argwhere(mask_of(windowed))
        if ids[b, i] != ids[b, j] and i - j >= 5 > at[b, i] - at[b, j]
    ]
    assert far  # by places these would not be seen
    check(WAYS[way], windowed, inputs())


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("way", ["blocks", "splash"])
def test_one_key_head_for_all_and_one_each(way, kv_heads):
    check(WAYS[way], rows_of("packed"), inputs(kv_heads=kv_heads))


def test_splash_over_several_blocks_some_of_them_skipped(monkeypatch):
    monkeypatch.setattr(tpu, "TPU_BLOCK", 128)
    samples = samples_of([100, 90, 110], prompt=40, answers=2)
    batch = pack(samples, length=300, rows=2, share_prompts=True).micro_batch(0)
    ids = jnp.array(batch.segment_ids)
    rows = AttentionMask(jnp.ones(ids.shape, bool), ids, jnp.array(batch.positions))
    allowed = mask_of(rows)
    below = allowed[:, 256:, :128]
    assert not below[0].any() or not below[1].any()  # a whole block is of others
    arrays = inputs(300, rows=len(ids), heads=2, kv_heads=1)
    check(WAYS["splash"], rows, arrays)


def test_short_rows_are_the_dense_function_itself():
    q, k, v, _ = inputs(BLOCK, heads=1, kv_heads=1)
    rows = rows_of("right", BLOCK)
    ours = jax.make_jaxpr(padded_block_attention)(q, k, v, rows)
    dense = jax.make_jaxpr(
        lambda q, k, v, rows: dense_attention(q, k, v, rows.allowed())
    )
    assert str(ours) == str(dense(q, k, v, rows))


def test_memory_grows_with_the_row_and_not_with_its_square():
    def growth(way):
        def temporaries(length):
            arrays = jax.eval_shape(lambda: inputs(length, heads=8, kv_heads=8))
            rows = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((2, length), x.dtype), rows_of("packed")
            )

            def step(q, k, v, cotangent, rows):
                _, back = jax.vjp(lambda *a: way(*a, rows), q, k, v)
                return back(cotangent)

            compiled = jax.jit(step).lower(*arrays, rows).compile()
            memory = compiled.memory_analysis()
            assert memory is not None
            return memory.temp_size_in_bytes

        return temporaries(1024) / temporaries(512)

    assert growth(functools.partial(padded_block_attention, size=64)) < 2.3
    assert growth(lambda q, k, v, rows: dense_attention(q, k, v, rows.allowed())) > 3.5


def test_a_long_row_of_shared_prompts_gives_each_output_its_own_logits():
    config = ModelConfig(
        vocab_size=61, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=16
    )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(3))
    samples = samples_of([90], prompt=60, answers=8)
    length = 336  # several blocks
    batch = pack(samples, length=length, share_prompts=True).micro_batch(0)
    assert batch.segment_ids.shape == (1, length)
    assert (batch.segment_ids > 0).sum() > 2 * BLOCK

    @jax.jit
    def logps(tokens, targets, **where):
        logits = model.logits(params, tokens, **where)
        every = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(every, targets[..., None], -1)[..., 0]

    places = dict(positions=batch.positions, segment_ids=batch.segment_ids)
    packed = logps(batch.tokens, batch.targets, **places)
    longest = max(len(s.tokens) for s in samples)
    tokens = np.array([np.resize(s.tokens, longest) for s in samples])
    alone = logps(tokens[:, :-1], tokens[:, 1:])
    for ours, own in zip(
        unpack(packed, samples, share_prompts=True), alone, strict=True
    ):
        np.testing.assert_allclose(ours, own[: len(ours)], atol=2e-5)


@pytest.mark.parametrize(
    "layout, kv_heads, count",
    [((2, 2, 2), 2, 4), ((1, 2, 4), 2, 2), ((4, 2, 1), 2, 2)],
    ids=["all split", "heads whole", "rows whole"],
)
def test_on_a_mesh_each_device_runs_the_kernel_on_its_part(layout, kv_heads, count):
    q, k, v, cotangent = inputs(rows=count, kv_heads=kv_heads)
    one = rows_of("shared")
    rows = jax.tree.map(lambda x: jnp.tile(x, (count // 2, 1)), one)

    def split(q, k, v):
        return on_each_device(WAYS["splash"], q, k, v, rows)

    with jax.set_mesh(sharding.make_mesh(*layout)):
        out, ours = gradients(split, q, k, v, cotangent)
    dense = functools.partial(dense_attention, allowed=rows.allowed())
    alone, expected = gradients(dense, q, k, v, cotangent)
    for a, b in zip((out, *ours), (alone, *expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def program(where: str, mesh: AbstractMesh, dtype, length=256, width=64) -> str:
    """What the platform is given to compile: `attend` forward and backward."""
    q, k, v, cotangent = jax.eval_shape(
        lambda: inputs(length, rows=4, width=width, dtype=dtype)
    )
    rows = jax.eval_shape(lambda: rows_of("right", length))
    rows = jax.tree.map(lambda x: jnp.zeros((4, length), x.dtype), rows)

    def step(q, k, v, cotangent):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, rows), q, k, v)
        return out, back(cotangent)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step).trace(q, k, v, cotangent)
        return traced.lower(lowering_platforms=(where,)).as_text()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_program_for_tpu_is_splashs_three_kernels(sizes):
    mesh = mesh_of("tpu", *sizes)
    for dtype, name in ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
        lines = program("tpu", mesh, dtype).splitlines()
        calls = [line for line in lines if "tpu_custom_call" in line]
        assert len(calls) == 3
        for call in calls:  # with the device's own query heads, of 4
            assert (f"tensor<4x256x64x{name}>" in call) == (sizes[2] == 1)
    assert "tpu_custom_call" not in program("tpu", mesh, jnp.float32, length=100)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_program_for_gpu_is_cudnns_where_it_computes_this(sizes):
    mesh = mesh_of("gpu", *sizes)
    lower = functools.partial(program, "cuda", mesh)
    try:
        assert "__cudnn$fmha" in lower(jnp.bfloat16)
    except RuntimeError as error:  # chosen, on a machine that has none
        assert "cuDNN is not detected" in str(error)
    assert "cudnn" not in lower(jnp.float32)
    assert "cudnn" not in lower(jnp.bfloat16, length=255)
    assert "cudnn" not in lower(jnp.bfloat16, width=12)


def test_no_kernel_where_it_is_not_known_how_arrays_are_spread(caplog):
    """XLA can split what is its own; that it is slow is said once, and the remedy."""
    attention_module.warn_without_kernel.cache_clear()
    unknown = mesh_of("tpu", 4, axes=("own",))
    for _ in range(2):
        assert "tpu_custom_call" not in program("tpu", unknown, jnp.float32)
    (record,) = caplog.records
    assert "8 TPU devices and no mesh" in record.message
    assert "jax.set_mesh(grpo_jax.distributed.sharding.make_mesh(" in record.message
    with jax.sharding.use_abstract_mesh(unknown):
        assert sharding.platform() == "tpu" and not sharding.layout_is_known()
    one = mesh_of("tpu", 1, axes=("own",))
    assert program("tpu", one, jnp.float32).count("tpu_custom_call") >= 3
    assert len(caplog.records) == 1


def test_a_tpu_compiles_the_layers_on_its_mesh():
    """XLA's and Mosaic's own compilers for a TPU, which need none to be there."""
    pytest.importorskip("libtpu", reason="libtpu, TPUs' compiler, is not installed")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = sharding.make_mesh(1, 2, 2, devices=topology.devices)
    config = ModelConfig(
        vocab_size=64, width=128, layers=5, heads=4, kv_heads=2, head_dim=64, ffn=128
    )
    model = Decoder(config, dtype="bfloat16")
    params = sharding.abstract_arrays(
        jax.eval_shape(model.init, jax.random.key(0)), mesh
    )
    place = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32, sharding=place)

    def loss(params, tokens, segment_ids):
        return model.hidden(params, tokens, segment_ids=segment_ids).mean(dtype=float)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(params, ids, ids).compile()
    assert "tpu_custom_call" in str(compiled.as_text())
