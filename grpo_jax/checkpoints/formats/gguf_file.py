"""Reads a GGUF file (version 2 or 3, little-endian): its key-values and its tensors.

The package gguf dequantises the numbers. Its header reader is not used, because it
trusts every count in the file: one damaged byte can cost minutes or all memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.checkpoints.huggingface.safetensors_files import Stored
from grpo_jax.errors import GrpoError, one_line

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_LARGEST = 1 << 27  # most bytes of a header; 200,000 tokens take about 2^23
_MOST = 1 << 22  # most numbers or texts in an array


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The key-values and the tensors of a GGUF file; tensors are read as float32."""

    values: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(file: Path) -> GgufFile:
    """Reads the header of a GGUF file, whose tensors must follow without a gap.

    Raises:
      GrpoError: the file is missing, damaged or not GGUF, a tensor's quantisation is
        not supported, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise GrpoError(
            f"{file}: the package gguf is needed to read it; pip install gguf"
        ) from None
    try:
        data = np.memmap(file, np.uint8, "r")
        return _read(file, data, gguf)
    except GrpoError:
        raise
    except (OSError, ValueError) as error:
        told = one_line(error)
        raise GrpoError(f"{file}: not a whole GGUF file ({told})") from None


class _Cursor:
    """Reads a header from front to back; refuses to read beyond its end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > min(len(self.data), _LARGEST):
            raise ValueError("its header does not end")
        raw = self.data[self.at : end].tobytes()
        self.at = end
        return raw

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        return self._of_kind(self.number("I"))

    def _of_kind(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"{kind} is not a type of value")
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST or kind == _ARRAY:
            raise ValueError("an array is too long or holds arrays")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self._of_kind(kind) for _ in range(count)]


def _read(file: Path, data: np.ndarray, gguf: Any) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, or big-endian; 2 and 3 are read")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in values:
            raise ValueError(f"the key {key} is there twice")
        values[key] = cursor.value()
    found: dict[str, tuple[tuple[int, ...], Any, int]] = {}
    for _ in range(count):
        name = cursor.text()
        axes = cursor.number("I")
        if name in found or not 1 <= axes <= 4:
            raise ValueError(f"the tensor {name} is there twice or has {axes} axes")
        sizes = tuple(cursor.number("Q") for _ in range(axes))
        kind = gguf.GGMLQuantizationType(cursor.number("I"))
        found[name] = sizes[::-1], kind, cursor.number("Q")
    alignment = values.get("general.alignment", 32)
    if alignment not in [1 << i for i in range(21)]:
        raise ValueError(f"general.alignment={alignment!r} is not a power of 2")
    start = -(-cursor.at // alignment) * alignment
    expected, tensors = 0, {}
    for name, (shape, kind, offset) in found.items():
        numbers, size = gguf.GGML_QUANT_SIZES[kind]  # numbers and bytes of a block
        rows, rest = divmod(shape[-1], numbers)
        stored = (*shape[:-1], rows * size)
        end = start + offset + math.prod(stored)
        if rest or offset != expected or end > len(data):
            raise ValueError(f"the tensor {name} does not lie where it should")
        expected = -(-(offset + math.prod(stored)) // alignment) * alignment
        try:  # try a block of zeros, to fail before anything is written
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            raise GrpoError(
                f"{file}: {one_line(name)} is in {kind.name}, which the package gguf "
                "does not unpack; convert from another file of the model"
            ) from None
        unpack = functools.partial(gguf.dequantize, qtype=kind)
        read = functools.partial(_unpacked, file, start + offset, stored, unpack)
        tensors[name] = Stored(file, np.dtype(np.float32), shape, read)
    return GgufFile(values, tensors)


def _unpacked(
    file: Path,
    place: int,
    stored: tuple[int, ...],
    unpack: Callable[[np.ndarray], np.ndarray],
    index: Any,
) -> np.ndarray:
    """Returns a slice of a tensor whose rows of packed bytes begin at `place`."""
    if 0 in stored:
        raise GrpoError(f"{file}: a tensor without numbers is not of a model")
    packed = np.memmap(file, np.uint8, "r", place, stored)
    return np.array(unpack(packed), np.float32)[index]
