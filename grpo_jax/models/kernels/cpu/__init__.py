"""C++ kernels for a CPU: attention, products with few rows, and AMX products.

They compute what XLA does in `decode.few_rows_product`, the attention of
`generation/kv_cache.py`, the loops of `xla.py` and `products.product`. XLA's code is
used where there is no C++ compiler. On a CPU it is slow for two reasons: it computes a
batch of small products on one core, in many small operations; and it packs weights
before it multiplies, which for few rows costs more than the product.

The C++ files in this folder are compiled for this machine when they are first needed,
and cached in $GRPO_JAX_CACHE.

Axes: B rows, D and F width, M rows and N columns of a product, K the axis that it sums
over; in attention as in `generation/kv_cache.py` and `xla.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.files import cache_folder
from grpo_jax.models.kernels.mask import PROMPT, AttentionMask, Pairs

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Pair = tuple[Array, Array]  # keys and values


log = logging.getLogger(__name__)
_SYMBOLS = ("GrpoProduct", "GrpoFewRows", "GrpoDecodeAttention")
_SYMBOLS += ("GrpoBlocksForward", "GrpoBlocksBackward")
_FLAGS = "-std=c++17 -O3 -march=native -fPIC -shared -w -fno-math-errno".split()
_FLAGS += "-fno-trapping-math -fno-signed-zeros -fassociative-math".split()
_ROWS = 16  # the kernel takes a multiple of these


def kernels_fit(*arrays: Any) -> bool:
    """Returns whether the kernels fit arrays: all float32, on one CPU, with a compiler.

    Args:
      arrays: trees of arrays, or of anything with a dtype.
    """
    floats = all(x.dtype == jnp.float32 for x in jax.tree.leaves(arrays))
    return (
        floats
        and sharding.is_one_device()
        and sharding.platform() == "cpu"
        and library_is_ready()
    )


def product(
    a: Float[Array, "M K"] | Float[Array, "K M"],
    b: Float[Array, "N K"] | Float[Array, "K N"],
    a_along: bool,
    b_along: bool,
) -> Float[Array, "M N"]:
    """Returns Σ_k a b in float32, by bfloat16 tiles (AMX).

    Args:
      a: [M, K] if `a_along`, else [K, M].
      b: [N, K] if `b_along`, else [K, N].
      a_along, b_along: whether the factor's last axis is summed over, not its first.
    """
    (m, k), n = a.shape[:: 1 if a_along else -1], b.shape[0 if b_along else 1]
    out = jax.ShapeDtypeStruct((m, n), jnp.float32)
    tiles = 2 * -(-n // 32) * -(-k // 32)  # of b: 16 · 32 numbers in 3 parts each
    memory = jax.ShapeDtypeStruct((tiles * 3072 + 64,), jnp.uint8)
    call = jax.ffi.ffi_call("GrpoProduct", (out, memory), vmap_method="sequential")
    return call(a, b, a_along=a_along, b_along=b_along)[0]


def few_rows(
    x: Float[Array, "B D"], weight: Float[Array, "F D"]
) -> Float[Array, "B F"]:
    """Returns x weightᵀ, for few rows of x."""
    rows = len(x)
    padded = -(-rows // _ROWS) * _ROWS
    x = jnp.pad(x.T, ((0, 0), (0, padded - rows)))
    out = jax.ShapeDtypeStruct((len(weight), padded), x.dtype)
    return jax.ffi.ffi_call("GrpoFewRows", out)(weight, x)[:, :rows].T


def attend(
    q: Float[Array, "W 1 Q H"],
    keys: Float[Array, "W 1 K H"],
    values: Float[Array, "W 1 K H"],
    prefix: Pair,
    blocks: Sequence[Pair],
    cache: Any,
    live: Bool[Array, "W"],
    window: int | None,
) -> tuple[Float[Array, "W 1 Q H"], tuple[Pair, ...]]:
    """Writes a decode step's keys and values, and attends to the prompt and the cache.

    Args:
      q, keys, values: of the step's token in each slot.
      prefix: keys and values of this layer's prompts.
      blocks: keys and values of this layer's blocks of columns; the step writes into
        the last.
      cache: a `generation.kv_cache.Cache`.
      live: True for slots that are decoding; the others get 0.
      window: the sliding window; None: none.

    Returns:
      The attention output, [W, 1, Q, H], and the blocks with the new keys and values.
    """
    columns = [
        x
        for places, block in zip(cache.places, blocks, strict=True)
        for x in (places, *block)
    ]
    operands = (
        *(q[:, 0], keys[:, 0], values[:, 0]),
        cache.turn % cache.block,
        *prefix,
        *(cache.prefixes.lengths, cache.prompt, cache.position, live),
        *columns,
    )
    results = jax.eval_shape(lambda *x: x, q[:, 0], *blocks[-1])
    count = len(operands)
    call = jax.ffi.ffi_call(
        "GrpoDecodeAttention",
        results,
        input_output_aliases={count - 2: 1, count - 1: 2},
    )
    out, *last = call(*operands, window=np.int64(window or 0))
    return out[:, None], (*blocks[:-1], tuple(last))


def _blocks(
    target: str, results: Any, rows: AttentionMask, pairs: Pairs, *arrays: Array
):
    """Calls a block kernel: first its own arrays, then the operands that both take."""
    segments = rows.segments
    if segments is None:  # one segment
        segments = jnp.ones(rows.real.shape, jnp.int32)
    size = rows.real.size // arrays[0].shape[0]
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(
        *arrays,
        *(pairs.row, pairs.queries, pairs.keys, pairs.count),
        *(rows.real, segments, rows.positions.astype(jnp.int32)),
        size=np.int64(size),
        window=np.int64(rows.window or 0),
        prompt=np.int64(PROMPT),
    )


def blocks_forward(
    q: Float[Array, "X K M H"],
    k: Float[Array, "X K s H"],
    v: Float[Array, "X K s H"],
    rows: AttentionMask,
    pairs: Pairs,
) -> tuple[Float[Array, "X K M H"], Float[Array, "X K M 1"]]:
    """Returns the attention output of each block of queries, and log Σ e^score."""
    results = jax.eval_shape(lambda x: (x, x[..., :1]), q)
    return _blocks("GrpoBlocksForward", results, rows, pairs, q, k.swapaxes(2, 3), v)


def blocks_backward(
    q: Float[Array, "X K M H"],
    k: Float[Array, "X K s H"],
    v: Float[Array, "X K s H"],
    rows: AttentionMask,
    pairs: Pairs,
    log_total: Float[Array, "X K M 1"],
    d_out: Float[Array, "X K M H"],
    inner: Float[Array, "X K M 1"],
) -> tuple[Array, Array, Array]:
    """Returns the gradients of q, k and v.

    Args:
      q, k, v, rows, pairs: as in `blocks_forward`.
      log_total: log Σ e^score, from `blocks_forward`.
      d_out: ∂L/∂out.
      inner: Σ_h ∂L/∂out · out.
    """
    results = jax.eval_shape(lambda *x: x, q, k, v)
    arrays = (q, k, k.swapaxes(2, 3), v.swapaxes(2, 3), log_total, d_out, inner)
    return _blocks("GrpoBlocksBackward", results, rows, pairs, *arrays)


def library_is_ready() -> bool:
    """Returns whether the library is loaded and registered; if not, warns once why."""
    return _load_library() is not None


@functools.cache
def has_amx_tiles() -> bool:
    """Returns whether this CPU has bfloat16 tiles that this process may use."""
    if (
        "amx_bf16" not in _cpu_features()
    ):  # checked first, to compile nothing without need
        return False
    library = _load_library()
    return library is not None and library.GrpoTiles() == 1


@functools.cache
def _load_library() -> ctypes.CDLL | None:
    """Compiles, loads and registers the library; None if that fails."""
    try:
        library = ctypes.cdll.LoadLibrary(str(_build_library()))
    except (OSError, GrpoError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        log.warning("cpu_kernels: not compiled (%s); XLA's own code is slower", why)
        return None
    for symbol in _SYMBOLS:
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(symbol, handler, platform="cpu")
    return library


def _build_library() -> Path:
    """Returns the library for this source, compiler, jaxlib and kind of CPU."""
    compiler = os.environ.get("CXX") or next(
        filter(shutil.which, ("c++", "g++", "clang++")), None
    )
    if compiler is None:
        raise OSError("no C++ compiler: no c++, g++ or clang++, and CXX is not set")
    sources = sorted(Path(__file__).parent.glob("*.cc"))
    header = Path(__file__).with_name("tiles.h")
    command = [*compiler.split(), *_FLAGS]
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=True
    )
    code = [file.read_text() for file in (header, *sources)]
    parts = (*code, *command, version.stdout, jaxlib.__version__, _cpu_features())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    file = cache_folder("native") / f"cpu_kernels-{key}.so"
    if not file.exists():
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".so")
        os.close(handle)
        try:
            command += [f"-I{jax.ffi.include_dir()}", *map(str, sources), "-o", part]
            subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    return file


def _cpu_features() -> str:
    """Describes the CPU's features: machines with different CPUs may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kinds = ("model name", "flags", "Features")
    return " ".join(sorted({line for line in lines if line.startswith(kinds)}))
