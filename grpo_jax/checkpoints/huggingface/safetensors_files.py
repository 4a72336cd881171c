"""Reads slices of tensors in safetensors files, and writes such files.

Reading a folder gives a `StoredTensor` for each name, without loading numbers; errors
say which file is broken and how. Writing holds one tensor at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import read_json, refuse_lfs_pointer

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or one to write; `stored[index]` reads only that slice."""

    file: Path  # Path() for one that is in no file
    dtype: np.dtype | str  # the file's code as a str, if NumPy has no such type
    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]  # copies the numbers at an index

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the numbers at a NumPy index; raises GrpoError for unknown dtypes."""
        if isinstance(self.dtype, str):
            raise GrpoError(
                f"{self.file}: numbers of type {self.dtype} are not supported; "
                f"{', '.join(DTYPES)} are"
            )
        return self.read(index)

    @property
    def nbytes(self) -> int:
        """The size of its numbers in bytes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file for one read, so that its mapped pages can be freed."""
    try:
        with safetensors.safe_open(file, "np") as opened:
            yield opened
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror or one_line(error)}") from None
    except safetensors.SafetensorError as error:
        raise GrpoError(f"{file}: {_what_is_wrong(file, error)}") from None


def _what_is_wrong(file: Path, error: Exception) -> str:
    with open(file, "rb") as handle:
        head = handle.read(64)
    refuse_lfs_pointer(file, head)
    # A header of 128, 384, … bytes also begins with the two bytes of a pickle.
    header = head[3:9] == b"\0\0\0\0\0{"
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] < b"\6"):
        if not header:
            return (
                "a pickle (torch.save), not safetensors, and not opened; name it "
                "pytorch_model.bin and run python -m grpo_jax.convert"
            )
    size = file.stat().st_size
    reason = one_line(error).removeprefix("Error while deserializing header: ")
    return f"truncated or not safetensors ({reason}; {size} bytes); download it again"


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file, in the order of their data.

    The package safetensors checks that tensors cover the file without gap or overlap.

    Raises:
      GrpoError: the file is truncated, a git-LFS pointer, a pickle, or not safetensors.
    """
    tensors = {}
    with _opened(file) as opened:
        for name in opened.offset_keys():
            part = opened.get_slice(name)
            code, shape = part.get_dtype(), tuple(part.get_shape())
            read = functools.partial(_read_slice, file, name)
            tensors[name] = StoredTensor(file, DTYPES.get(code, code), shape, read)
    return tensors


def _read_slice(file: Path, name: str, index: Any) -> np.ndarray:
    with _opened(file) as opened:
        return opened.get_slice(name)[index]


def read_index(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor by a shard index.

    Raises:
      GrpoError: the index is broken, a file name is not plain, or a file is missing.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise GrpoError(f"{index}: no weight_map; download it again")
    for name, file in where.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.+-]{1,200}", file)
        if not plain or ".." in file:
            raise GrpoError(
                f"{index}: {one_line(name)} is said to be in {one_line(repr(file))}, "
                "which is not a plain file name; do not use this folder"
            )
    for file in sorted(set(where.values())):
        if not (index.parent / file).is_file():
            name = next(name for name in where if where[name] == file)
            raise GrpoError(
                f"{index.parent / file}: this file is missing; it holds "
                f"{one_line(name)} among others; download it again"
            )
    return where


def merge_files(
    files: Iterable[Path], read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Returns the tensors of several files.

    Args:
      files: the files.
      read: returns the tensors of one file.

    Raises:
      GrpoError: a tensor is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read(file).items():
            if name in tensors:
                raise GrpoError(
                    f"{file.parent}: tensor {one_line(name)} is in "
                    f"{tensors[name].file.name} and in {file.name}; remove one"
                )
            tensors[name] = stored
    return tensors


def read_safetensors_folder(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a Hugging Face folder.

    They are in model.safetensors, in the shards of the index, or in *.safetensors.

    Raises:
      GrpoError: there is no safetensors file, a shard is missing, a file name in the
        index is not plain, or a tensor is in two files or not where the index says.
    """
    if (folder / MODEL).exists():
        return read_safetensors(folder / MODEL)
    where = read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    files = sorted({folder / file for file in where.values()})
    files = files or sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        raise GrpoError(
            f"{folder}: only .bin weights, which are pickles; run python -m "
            f"grpo_jax.convert {folder} OUT and load OUT"
        )
    if not files:
        raise GrpoError(f"{folder}: {MODEL} is missing; download it again")
    tensors = merge_files(files, read_safetensors)
    for name, file in where.items():
        if name not in tensors or tensors[name].file.name != file:
            raise GrpoError(
                f"{folder / file}: {one_line(name)} is not in it, as {INDEX} says; "
                "download both again"
            )
    return tensors


def write_folder(
    folder: Path, tensors: Mapping[str, StoredTensor], max_bytes: int = 5_000_000_000
) -> None:
    """Writes model.safetensors, or shards of at most `max_bytes` and their index.

    Args:
      folder: an existing folder.
      tensors: the tensors by name, read one at a time.
      max_bytes: largest size of a shard's numbers; a single larger tensor is not split.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        if shards[-1] and filled + source.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += source.nbytes
    if len(shards) == 1:
        return write_file(folder / MODEL, tensors)
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        where |= dict.fromkeys(names, file)
    total = sum(source.nbytes for source in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(file: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes a safetensors file, reading one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in tensors.items():
        start, end = end, end + source.nbytes
        header[name] = {
            "dtype": CODES[np.dtype(source.dtype)],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw)
        for name, source in tensors.items():
            array = np.ascontiguousarray(source[...])
            if (array.dtype, array.shape) != (source.dtype, source.shape):
                raise AssertionError(f"{name}: {array.dtype}{array.shape}")
            array.reshape(-1).view(np.uint8).tofile(handle)
