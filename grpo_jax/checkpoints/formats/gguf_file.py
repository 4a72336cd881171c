"""Reads a GGUF file (version 2 or 3, little-endian): its key-values and its tensors.

The package gguf dequantises the numbers. Its GGUFReader is not used: it trusts every
count in the file, so that one damaged byte can cost minutes or all memory, and it makes
an array of each token (for 49,000 tokens 4 s and 170 MB, here 0.5 s and 10 MB).
"""

from __future__ import annotations

import functools
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grpo_jax.checkpoints.huggingface.safetensors_files import StoredTensor
from grpo_jax.errors import GrpoError, one_line

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_LARGEST = 1 << 27  # most bytes of a header; 200,000 tokens take about 2^23
_MOST = 1 << 22  # most numbers or texts in an array


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Returns the key-values of a GGUF file and its tensors, which are read as float32.

    The tensors must follow one another without a gap.

    Raises:
      GrpoError: the file is missing, damaged or not GGUF, a tensor's quantisation is
        not supported, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise GrpoError(
            f"{file}: the package gguf is needed to read it; pip install "
            "'grpo_jax[gguf]'"
        ) from None
    try:
        with open(file, "rb") as opened:
            return _read_header(file, opened, gguf)
    except GrpoError:
        raise
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise GrpoError(f"{file}: not a whole GGUF file ({reason})") from None


def _take(file: BinaryIO, count: int) -> bytes:
    """Returns the next bytes of a header."""
    raw = file.read(count) if file.tell() + count <= _LARGEST else b""
    if len(raw) < count:
        raise ValueError("its header does not end")
    return raw


def _numbers(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, _take(file, struct.calcsize("<" + code)))


def _text(file: BinaryIO) -> str:
    return _take(file, *_numbers(file, "Q")).decode()


def _value(file: BinaryIO) -> Any:
    (kind,) = _numbers(file, "I")
    if kind == _STRING:
        return _text(file)
    if kind in _SCALARS:
        return _numbers(file, _SCALARS[kind])[0]
    if kind != _ARRAY:
        raise ValueError(f"{kind} is not a type of value")
    kind, count = _numbers(file, "IQ")
    if count > _MOST or kind not in (_STRING, *_SCALARS):
        raise ValueError("an array is too long, or holds neither numbers nor texts")
    if kind == _STRING:
        return [_text(file) for _ in range(count)]
    return list(_numbers(file, f"{count}{_SCALARS[kind]}"))


def _read_header(
    file: Path, opened: BinaryIO, gguf: Any
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if _take(opened, 4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, count, pairs = _numbers(opened, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}, or big-endian; 2 and 3 are read")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = _text(opened)
        if key in values:
            raise ValueError(f"the key {key} is there twice")
        values[key] = _value(opened)
    found: dict[str, tuple[tuple[int, ...], Any, int]] = {}
    for _ in range(count):
        name = _text(opened)
        (axes,) = _numbers(opened, "I")
        if name in found or not 1 <= axes <= 4:
            raise ValueError(f"the tensor {name} is there twice or has {axes} axes")
        *sizes, kind, offset = _numbers(opened, f"{axes}QIQ")
        found[name] = tuple(sizes[::-1]), gguf.GGMLQuantizationType(kind), offset
    alignment = values.get("general.alignment", 32)
    if alignment not in [1 << i for i in range(21)]:
        raise ValueError(f"general.alignment={alignment!r} is not a power of 2")
    start = -(-opened.tell() // alignment) * alignment
    expected, tensors, end, size = 0, {}, 0, file.stat().st_size
    for name, (shape, kind, offset) in found.items():
        packed = gguf.quant_shape_to_byte_shape(shape, kind)
        end = offset + math.prod(packed)
        if offset != expected or 0 in shape or start + end > size:
            raise ValueError(f"the tensor {name} does not lie where it should")
        expected = -(-end // alignment) * alignment
        unpack = functools.partial(gguf.dequantize, qtype=kind)
        try:  # try a block of zeros, to fail before anything is written
            unpack(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8))
        except NotImplementedError:
            raise GrpoError(
                f"{file}: {one_line(name)} is in {kind.name}, which the package gguf "
                "does not unpack; convert from another file of the model"
            ) from None

        def read(index: Any, place=start + offset, packed=packed, unpack=unpack):
            mapped = np.memmap(file, np.uint8, "r", place, packed)
            return np.array(unpack(mapped), np.float32)[index]

        tensors[name] = StoredTensor(file, np.dtype(np.float32), shape, read)
    if size not in (start + end, start + expected):  # else all may be shifted
        raise ValueError(f"{size - start - end} bytes follow its last tensor")
    return values, tensors
