"""Tensors in files: where each one lies, slices of it, and writing them back.

In: a Hugging Face folder. Out: {name: Stored}, each readable in slices, or one line
that says which file is broken and how. Writing streams one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import GrpoError

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
class Stored:
    """A tensor in a file; `stored[index]` reads that slice and nothing else."""

    file: Path
    offset: int  # bytes
    dtype: np.dtype | str  # a str where no NumPy type is known for the file's code
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # in elements; None: C order

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(self.dtype, str):
            raise GrpoError(
                f"{self.file}: numbers of type {self.dtype} are not supported; "
                f"{', '.join(DTYPES)} are"
            )
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[index]
        if self.strides is None:
            view = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        else:
            pairs = zip(self.shape, self.strides, strict=True)
            end = 1 + sum((size - 1) * stride for size, stride in pairs)
            flat = np.memmap(self.file, self.dtype, "r", self.offset, (end,))
            steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
            view = np.lib.stride_tricks.as_strided(flat, self.shape, steps)
        return np.array(view[index])  # a copy, so that the mapped pages can go


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor to write: its kind now, its numbers when `read` is called."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a repeated key is refused, not silently dropped."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = {}
        for key, value in pairs:
            if key in seen:
                raise GrpoError(f"{file}: {key} is there twice; download it again")
            seen[key] = value
        return seen

    try:
        raw = file.read_bytes()
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror}") from None
    refuse_pointer(file, raw[:64])
    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GrpoError(f"{file}: not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise GrpoError(f"{file}: not a JSON object; download it again")
    return value


def refuse_pointer(file: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise GrpoError(
            f"{file}: a git-LFS pointer, not the file itself; run `git lfs pull` in "
            "its folder or download it again"
        )


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, checked against its length.

    Raises:
      GrpoError: truncated, a git-LFS pointer, a pickle, or not safetensors at all.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            head = handle.read(64)
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
            refuse_pointer(file, head)
            if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] < b"\6"):
                raise GrpoError(
                    f"{file}: a pickle (torch.save), not safetensors, and not opened; "
                    "name it pytorch_model.bin and run python -m grpo_jax.convert"
                )
            handle.seek(8)
            raw = handle.read(length) if length <= min(size, 1 << 28) else b""
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror}") from None
    broken = GrpoError(
        f"{file}: truncated or not safetensors ({size} bytes); download it again"
    )
    if not length or (len(raw) < length and head[8:9] != b"{") or raw[:1] != b"{":
        raise broken
    try:
        header = json.loads(raw, object_pairs_hook=list)
        entries = [(name, dict(entry)) for name, entry in header]
        tensors: dict[str, Stored] = {}
        for name, entry in entries:
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            code, shape = entry["dtype"], tuple(entry["shape"])
            if name in tensors:
                raise GrpoError(f"{file}: tensor {name} is there twice")
            dtype = DTYPES.get(code, code)
            if 8 + length + end > size or not 0 <= start <= end:
                raise broken
            if not isinstance(dtype, str):
                if end - start != dtype.itemsize * int(np.prod(shape, dtype=object)):
                    raise broken
            tensors[name] = Stored(file, 8 + length + start, dtype, shape)
    except (ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, GrpoError) else broken from None
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, by a shard index, every file there beside it."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise GrpoError(f"{index}: no weight_map; download it again")
    for name, file in where.items():
        if not re.fullmatch(r"[\w.+-]+", str(file)) or ".." in file:
            raise GrpoError(
                f"{index}: {name} is said to be in {file!r}, which is not a plain file "
                "name; do not use this folder"
            )
        if not (index.parent / file).exists():
            raise GrpoError(
                f"{index.parent / file}: this file is missing; it holds {name} among "
                "others; download it again"
            )
    return where


def merge(
    files: Iterable[Path], read: Callable[[Path], dict[str, Stored]]
) -> dict[str, Stored]:
    """The tensors of several files; one that is in two of them is refused."""
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read(file).items():
            if name in tensors:
                raise GrpoError(
                    f"{file.parent}: tensor {name} is in {tensors[name].file.name} and "
                    f"in {file.name}; remove one"
                )
            tensors[name] = stored
    return tensors


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder: model.safetensors, or the index's shards.

    Raises:
      GrpoError: no safetensors, a missing shard, a file name in the index that leaves
        the folder, a tensor in two files or not where the index says.
    """
    if (folder / MODEL).exists():
        return read_header(folder / MODEL)
    if (folder / INDEX).exists():
        where = read_index(folder / INDEX)
        files = [folder / file for file in sorted(set(where.values()))]
    else:
        where, files = {}, sorted(folder.glob("*.safetensors"))
        if not files and sorted(folder.glob("*.bin")):
            raise GrpoError(
                f"{folder}: only .bin weights, which are pickles; run python -m "
                f"grpo_jax.convert {folder} OUT and load OUT"
            )
        if not files:
            raise GrpoError(f"{folder}: {MODEL} is missing; download it again")
    tensors = merge(files, read_header)
    for name, file in where.items():
        if name not in tensors or tensors[name].file.name != file:
            raise GrpoError(f"{folder / file}: {name} is not in it, as {INDEX} says")
    return tensors


def write_folder(
    folder: Path, tensors: Mapping[str, Source], max_bytes: int = 5_000_000_000
) -> None:
    """model.safetensors, or several shards of at most `max_bytes` and their index."""
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


def write_file(file: Path, tensors: Mapping[str, Source]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in tensors.items():
        start, end = end, end + source.nbytes
        header[name] = {
            "dtype": CODES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw)
        for name, source in tensors.items():
            array = np.ascontiguousarray(source.read())
            if (array.dtype, array.shape) != (source.dtype, source.shape):
                raise AssertionError(f"{name}: {array.dtype}{array.shape}")
            array.reshape(-1).view(np.uint8).tofile(handle)
