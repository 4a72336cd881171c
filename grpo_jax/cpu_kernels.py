"""A turn of the sampler on a CPU, in C++: its matrix products and its attention.

In: arrays of a turn. Out: what `model.few_rows` and `cache.seeing` give, which do the
same on accelerators, and where there is no C++ compiler.

XLA's CPU code reads a turn's keys and values on one core and in many small operations,
and packs weights before it multiplies, which for few rows costs more than to multiply.
cpu_kernels.cc is compiled when it is first needed, for this machine, and kept in
$GRPO_JAX_CACHE.

Axes: B rows, D and F width; W, Q, H as in `cache.py`.
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

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Bool, Float

from grpo_jax import sharding
from grpo_jax.cache import Cache, Pair
from grpo_jax.errors import GrpoError
from grpo_jax.files import cache_folder

log = logging.getLogger(__name__)
_SYMBOLS = ("GrpoFewRows", "GrpoDecodeAttention")
_FLAGS = "-std=c++17 -O3 -march=native -fPIC -shared -w -fno-math-errno".split()
_FLAGS += "-fno-trapping-math -fno-signed-zeros -fassociative-math".split()
_ROWS = 16  # a multiple of these at a time


def fits(cache: Cache, dtype: str) -> bool:
    """Whether they can be used here: one CPU, all in float32, and a compiler."""
    stored = {x.dtype.name for x in jax.tree.leaves((cache.layers, cache.prefixes))}
    floats = stored - {"int32"} == {"float32"} and dtype == "float32"
    return floats and sharding.alone() and sharding.platform() == "cpu" and ready()


def few_rows(
    weight: Float[Array, "F D"], x: Float[Array, "B D"], **_
) -> Float[Array, "B F"]:
    """x times weight transposed."""
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
    cache: Cache,
    live: Bool[Array, "W"],
    window: int | None,
) -> tuple[Float[Array, "W 1 Q H"], tuple[Pair, ...]]:
    """Softmax over the prompts and the columns of each live slot; 0 for the others.

    And the blocks with the keys and values of this turn, which the live slots see.
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


@functools.cache
def ready() -> bool:
    """The library is there and XLA knows it; says once why it is not."""
    try:
        library = ctypes.cdll.LoadLibrary(str(_built()))
    except (OSError, GrpoError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or str(error)
        log.warning(
            "cpu_kernels.cc: not compiled (%s); XLA's own code samples more slowly",
            why.strip().splitlines()[0],
        )
        return False
    for symbol in _SYMBOLS:
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(symbol, handler, platform="cpu")
    return True


def _built() -> Path:
    """The library for this source, compiler, jaxlib and kind of CPU."""
    compiler = os.environ.get("CXX") or next(
        filter(shutil.which, ("c++", "g++", "clang++")), None
    )
    if compiler is None:
        raise OSError("no C++ compiler: no c++, g++ or clang++, and CXX is not set")
    source = Path(__file__).with_suffix(".cc")
    command = [*compiler.split(), *_FLAGS, f"-I{jax.ffi.include_dir()}", str(source)]
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=True
    )
    parts = (source.read_text(), *command, version.stdout, jaxlib.__version__, _cpu())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    file = cache_folder("native") / f"cpu_kernels-{key}.so"
    if not file.exists():
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".so")
        os.close(handle)
        try:
            subprocess.run(
                [*command, "-o", part], capture_output=True, text=True, check=True
            )
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    return file


def _cpu() -> str:
    """What the compiler may use of this CPU; a home folder serves different ones."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kinds = ("model name", "flags", "Features")
    return " ".join(sorted({line for line in lines if line.startswith(kinds)}))
