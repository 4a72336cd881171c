"""Products by bfloat16 tiles: against float64, and in models against XLA's.

A CPU without tiles runs this file with `plain_tiles.h` in their place.
"""

import collections
import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.distributed import sharding
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.kernels import cpu, products
from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.plan.flops import count_flops

HERE = pathlib.Path(__file__).parents[2] / "helpers"
PLAIN = "GRPO_JAX_PLAIN_TILES"  # set where they are
if PLAIN in os.environ:
    cpu._cpu_features = lambda: "amx_bf16"


@pytest.fixture
def tiles():
    if not cpu.has_amx_tiles():
        assert PLAIN not in os.environ, "plain_tiles.h was not compiled"
        pytest.skip("this CPU has no bfloat16 tiles")
    with jax.set_mesh(sharding.make_mesh(data=1, devices=jax.devices()[:1])):
        yield


@contextlib.contextmanager
def xlas_own():
    """As if there were no tiles; what was traced with them is traced anew."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_amx_tiles", lambda: False)
        yield
    jax.clear_caches()


def test_with_plain_tiles(tmp_path):
    """The same tests, where a CPU can split numbers but not multiply tiles."""
    cpus = pathlib.Path("/proc/cpuinfo")
    if cpu.has_amx_tiles() or PLAIN in os.environ:
        pytest.skip("the tests beside this one run with tiles")
    able = cpus.is_file() and " avx512bw " in cpus.read_text()
    if not (cpu.library_is_ready() and able):
        pytest.skip("no C++ compiler, or no AVX-512")
    compiler = f"{os.environ.get('CXX', 'c++')} -include {HERE / 'plain_tiles.h'}"
    given = {"CXX": compiler, "GRPO_JAX_CACHE": str(tmp_path), PLAIN: "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed, 2 skipped" in done.stdout  # this one, and the next


def test_without_tiles_nothing_is_compiled_for_a_loss(tmp_path):
    if "amx_bf16" in cpu._cpu_features():
        pytest.skip("this CPU has bfloat16 tiles")
    done = subprocess.run(
        [sys.executable, "-c", LOSS],
        env={**os.environ, "XLA_FLAGS": "", "GRPO_JAX_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("(128,)\n", "")
    assert not list(tmp_path.iterdir())


LOSS = """
import jax.numpy as jnp
from grpo_jax.models.logprobs import token_logprobs
hidden, unembed = jnp.ones((128, 128)), jnp.ones((128, 512))
print(token_logprobs(hidden, unembed, jnp.zeros(128, int))[0].shape)
"""


def factors(m, n, k, a_along, b_along, draw):
    a, b = draw((m, k)), draw((n, k))
    given = a if a_along else a.T.copy(), b if b_along else b.T.copy()
    return a.astype(np.float64), b.astype(np.float64), given


def computed(given, a_along, b_along):
    return jax.jit(products.product, static_argnames=("a_along", "b_along"))(
        *given, a_along=a_along, b_along=b_along
    )


LAYOUTS = pytest.mark.parametrize(
    "a_along, b_along", [(True, True), (True, False), (False, True), (False, False)]
)
# of one square, with edges everywhere, of several blocks of k, of several strips
SIZES = [(128, 128, 128), (161, 130, 145), (137, 150, 2077), (700, 190, 600)]


@LAYOUTS
@pytest.mark.parametrize("m, n, k", SIZES)
def test_whole_numbers_come_out_exactly(tiles, m, n, k, a_along, b_along):
    """Their products and sums fit into 24 bits; those of 10 bits need two parts."""
    rng = np.random.default_rng(m)

    def draw(shape):  # so few of them that no sum is larger than 2²⁴
        some = rng.random(shape) < 16 / k
        return np.where(some, rng.integers(-1023, 1024, shape), 0).astype(np.float32)

    a, b, given = factors(m, n, k, a_along, b_along, draw)
    assert np.abs(a).max() > 512 and (np.abs(a) @ np.abs(b.T)).max() < 2**24
    np.testing.assert_array_equal(computed(given, a_along, b_along), a @ b.T)


@LAYOUTS
def test_a_product_with_the_identity_gives_the_factor_back(tiles, a_along, b_along):
    """To the last bit: a number's three parts are all of it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 160)) * 10.0 ** rng.integers(-20, 20, (256, 160))
    x, one = x.astype(np.float32), np.eye(160, dtype=np.float32)
    a, b = x if a_along else x.T, one
    np.testing.assert_array_equal(computed((a, b), a_along, b_along), x)
    x, one = x[:160], np.eye(160, dtype=np.float32)
    b = x.T if b_along else x
    np.testing.assert_array_equal(computed((one, b), a_along, b_along), x)


@pytest.mark.parametrize("m, n, k", [(256, 192, 576), (192, 256, 1536)])
@pytest.mark.parametrize("spread", [0, 3])  # of magnitudes, in powers of e
def test_a_product_is_as_accurate_as_xlas(tiles, m, n, k, spread):
    rng = np.random.default_rng(k)

    def draw(shape):
        size = np.exp(spread * rng.normal(size=shape))
        return (rng.normal(size=shape) * size).astype(np.float32)

    a, b, given = factors(m, n, k, True, True, draw)
    scale = np.abs(a) @ np.abs(b.T)

    def error():
        return np.abs(computed(given, True, True) - a @ b.T) / scale

    found = error()
    with xlas_own():
        xla = error()
    assert np.sqrt((found**2).mean()) < 1.2 * np.sqrt((xla**2).mean())
    assert found.max() < 2 * xla.max()


@pytest.mark.parametrize("kind", ["normal", "one sign", "wide range"])
def test_the_error_of_long_sums_is_the_documented_one(tiles, kind):
    """4096 terms: up to 2.4 times XLA's error, and small against the terms' sum."""
    rng = np.random.default_rng(0)

    def draw(shape):
        x = rng.normal(size=shape)
        if kind == "wide range":
            x *= np.exp(6 * rng.normal(size=shape))
        return (np.abs(x) if kind == "one sign" else x).astype(np.float32)

    a, b, given = factors(256, 256, 4096, True, True, draw)
    scale = np.abs(a) @ np.abs(b.T)

    def error():
        return np.sqrt((((computed(given, True, True) - a @ b.T) / scale) ** 2).mean())

    found = error()
    with xlas_own():
        xla = error()
    assert found < 3 * xla and found < 5e-7


def test_it_is_the_same_with_any_rows_and_columns_beside(tiles):
    """To the last bit: what a row gives depends on nothing else."""
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((900, 1400), (200, 1400)))
    whole = np.asarray(computed((a, b), True, True))
    for rows in (slice(0, 128), slice(71, 333), slice(772, 900)):
        part = computed((a[rows], b), True, True)
        np.testing.assert_array_equal(part, whole[rows])
    for columns in (slice(0, 128), slice(33, 180)):
        part = computed((a, b[columns]), True, True)
        np.testing.assert_array_equal(part, whole[:, columns])


DIGEST = """
import hashlib, os, jax, numpy as np
from grpo_jax.models.kernels import cpu
from grpo_jax.models.kernels.products import product
if "GRPO_JAX_PLAIN_TILES" in os.environ:
    cpu._cpu_features = lambda: "amx_bf16"
assert cpu.has_amx_tiles()
rng = np.random.default_rng(3)
a, b = (rng.normal(size=s).astype(np.float32) for s in ((140, 1400), (900, 1400)))
for x, y in ((a, b), (b, a)):
    found = np.asarray(jax.jit(product)(x, y))
    assert abs(found - x @ y.T).max() < 1e-3
    print(hashlib.sha256(found.tobytes()).hexdigest())
"""


def test_it_is_the_same_with_any_number_of_threads(tiles):
    def digests(cores):
        return subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "XLA_FLAGS": "", "NPROC": str(cores)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert digests(1) == digests(2) == digests(7)


def test_what_is_not_finite_stays_in_its_row(tiles):
    a, b = np.ones((160, 130), np.float32), np.ones((140, 130), np.float32)
    a[3, 5], a[7, 129], a[150, 0] = np.nan, np.inf, -np.inf
    out = np.asarray(computed((a, b), True, True))
    bad = np.isin(np.arange(160), [3, 7, 150])
    assert not np.isfinite(out[bad]).any()
    np.testing.assert_array_equal(out[~bad], 130)


def test_small_matrices_bfloat16_and_several_devices_are_xlas(tiles):
    def kernels(a, b):
        return str(jax.make_jaxpr(products.linear)(a, b)).count("GrpoProduct")

    a, b = jnp.ones((128, 128)), jnp.ones((128, 128))
    assert kernels(a, b) == 1
    assert kernels(a[:127], b) == kernels(a, b[:127]) == 0
    assert kernels(a[:, :127], b[:, :127]) == 0
    assert kernels(*(x.astype(jnp.bfloat16) for x in (a, b))) == 0
    with jax.set_mesh(sharding.make_mesh(data=2, devices=jax.devices()[:2])):
        assert kernels(a, b) == 0


def test_the_plan_counts_what_they_multiply(tiles):
    a, b = jnp.ones((128, 130)), jnp.ones((150, 130))
    assert count_flops(jax.make_jaxpr(products.linear)(a, b)) == 2 * 128 * 150 * 130
    for along in (True, False):
        given = (a, b) if along else (a.T, b.T)

        def call(a, b, along=along):
            return products.product(a, b, a_along=along, b_along=along)

        assert count_flops(jax.make_jaxpr(call)(*given)) == 2 * 128 * 150 * 130


def test_gradients_are_products(tiles):
    """∂x = g W and ∂W = gᵀ x, in float64."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (192, 150), (160, 150), (192, 160)
    x, weight, g = map(jax.random.normal, keys, sizes)
    y, back = jax.vjp(products.linear, x, weight)
    found = y, *back(g)
    x, weight, g = (np.asarray(each, np.float64) for each in (x, weight, g))
    for ours, a, b in zip(found, (x, g, g.T), (weight.T, weight, x), strict=True):
        assert (np.abs(ours - a @ b) < 2.0**-21 * (np.abs(a) @ np.abs(b))).all()


def test_what_is_frozen_costs_no_product(tiles):
    x, weight = jnp.ones((128, 128)), jnp.ones((160, 128))

    def counted(moving):
        def loss(part):
            return products.linear(*{**both, **part}.values()).sum()

        both = {"x": x, "weight": weight}
        grad = jax.make_jaxpr(jax.grad(loss))({k: both[k] for k in moving})
        return count_flops(grad) / (2 * 128 * 128 * 160)

    assert counted(["x", "weight"]) == 3
    assert counted(["x"]) == counted(["weight"]) == 2


def test_inside_a_shard_map_it_is_xlas(tiles):
    """Whose types say along which axes a value varies; those of kernels do not."""
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    x, weight = jnp.ones((128, 128)), jnp.ones((160, 128))

    @jax.shard_map(mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    def slope(x, weight):
        return jax.grad(lambda x: products.linear(x, weight).sum())(x)

    np.testing.assert_array_equal(slope(x, weight), 160)


CONFIG = ModelConfig(
    vocab_size=300, width=128, layers=2, heads=2, kv_heads=1, head_dim=64, ffn=256
)


def log_likelihood(model, params, tokens):
    def loss(params):
        hidden = model.hidden(params, tokens)
        logps, entropy = token_logprobs(
            hidden[:, :-1], model.unembed(params), tokens[:, 1:]
        )
        return logps.mean() + 0.1 * entropy.mean()

    return loss


@pytest.mark.parametrize("remat", ["none", "matmuls", "ffn", "full"])
def test_a_model_and_its_gradient_are_xlas(tiles, remat):
    """And what `remat` keeps is not multiplied again."""
    model = Decoder(CONFIG, remat=remat)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 129), 0, 300)

    def both():
        return jax.value_and_grad(log_likelihood(model, params, tokens))

    names = collections.Counter(kernels_of(jax.make_jaxpr(both())(params).jaxpr))
    wide = 5  # of a layer's 7; k_proj and v_proj are too narrow
    # Again: all but the last, whose result no gradient needs; q_proj's and o_proj's.
    again = {"full": 4, "ffn": 2}.get(remat, 0)
    of_logits = 4  # forward, again in the backward pass, to h and to the table
    assert names["GrpoProduct"] == wide * 3 + again + of_logits, names
    found = jax.jit(both())(params)
    with xlas_own():
        expected = jax.jit(both())(params)
    for ours, xlas in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = np.abs(xlas).max()
        np.testing.assert_allclose(ours / scale, xlas / scale, rtol=0, atol=3e-6)


def kernels_of(jaxpr):
    """Names of the kernels that a program calls, once for each place."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ffi_call":
            yield equation.params["target_name"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from kernels_of(inner)
