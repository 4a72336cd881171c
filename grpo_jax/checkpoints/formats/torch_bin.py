"""Reads pytorch_model*.bin files without torch, and without running their pickles.

Files are in the zip format of torch.save (torch 1.6 and later). A `StoredTensor` says
where each tensor is in the file; no numbers are read yet. The pickle is not given to
pickle. This module follows only the few opcodes and the seven names that a state dict
of floating-point tensors needs, and refuses all others.
"""

from __future__ import annotations

import functools
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.checkpoints.huggingface.safetensors_files import (
    DTYPES,
    StoredTensor,
    merge_files,
    read_index,
    refuse_lfs_pointer,
)
from grpo_jax.errors import GrpoError, one_line

INDEX = "pytorch_model.bin.index.json"
LARGEST = 1 << 22  # most bytes of data.pkl, which takes about 200 per tensor
_CONSTANTS = (  # opcodes that push their argument
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINFLOAT STRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8"
).split()
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": bool,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_KNOWN: dict[str, Any] = {  # storages are not called: a str here
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": lambda *given: _rebuild_tensor(*given[:4]),
    "torch._utils _rebuild_parameter": lambda data, *_: data,
}
_Storage = tuple[Path, int, np.dtype, int]  # file, offset, dtype, bytes


def _rebuild_tensor(
    storage: _Storage, start: int, shape: Any, strides: Any
) -> StoredTensor:
    file, offset, dtype, size = storage
    if any(type(n) is not int or n < 0 for n in (start, *shape, *strides)):
        raise ValueError("an offset, size or stride is not a whole number above zero")
    if len(shape) > 8 or max(shape, default=0) > 1 << 40:
        raise ValueError("a shape that no weight has")
    pairs = list(zip(shape, strides, strict=True))
    last = start + sum((n - 1) * stride for n, stride in pairs)
    if 0 not in shape and (last + 1) * dtype.itemsize > size:
        raise ValueError("a tensor reaches beyond its storage")
    reach = 1  # in numbers, over the axes with smaller strides
    for stride, n in sorted((stride, n) for n, stride in pairs if n > 1):
        if stride < reach:  # stride 0 is a view by torch's expand
            raise ValueError("two numbers of a tensor lie at one place")
        reach = stride * n
    place, shape, strides = start * dtype.itemsize, tuple(shape), tuple(strides)
    read = functools.partial(_read_strided, file, offset + place, dtype, shape, strides)
    return StoredTensor(file, dtype, shape, read)


def _read_strided(
    file: Path,
    place: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    index: Any,
) -> np.ndarray:
    """Returns a slice of the numbers from byte `place` on; strides are in numbers."""
    if 0 in shape:
        return np.zeros(shape, dtype)[index]
    end = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    flat = np.memmap(file, dtype, "r", place, (end,))
    steps = tuple(stride * dtype.itemsize for stride in strides)
    view = np.lib.stride_tricks.as_strided(flat, shape, steps)
    return np.array(view[index])  # a copy, so that the mapped pages can go


def _unpickle(data: bytes, file: Path, storage: Callable[[Any], _Storage]) -> Any:
    """Returns the state dict of a pickle, and refuses any other pickle.

    pickle.Unpickler is not used: a file could make it take all memory (by a high memo
    index) or overflow the stack (by nested tuples as a key). Keys must be text here.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[Any, Any] = {}

    def above_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    def pop(count: int) -> list[Any]:
        items = stack[-count:]
        del stack[-count:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        pairs: list[Any] = []  # keys and values for the dictionary on the stack
        match opcode.name:
            case "PROTO" if argument not in range(2, 6):
                raise ValueError(f"a pickle of protocol {argument}")
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in _CONSTANTS:
                stack.append(argument)
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "TUPLE" | "LIST":
                items = above_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                items = pop(1) if opcode.name == "APPEND" else above_mark()
                stack[-1].extend(items)
            case "DICT":
                pairs = above_mark()
                stack.append({})
            case "SETITEM":
                pairs = pop(2)
            case "SETITEMS":
                pairs = above_mark()
            case "GLOBAL" | "STACK_GLOBAL":
                name = " ".join(pop(2)) if argument is None else argument
                if name not in _KNOWN:
                    raise GrpoError(
                        f"{file}: its pickle asks for "
                        f"{one_line(name).replace(' ', '.')}, which weights do not "
                        "need; it was not run; do not use this file"
                    )
                stack.append(_KNOWN[name])
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "REDUCE":
                call, arguments = pop(2)
                stack.append(call(*arguments))
            case "BUILD":
                stack.pop()  # a state dict's _metadata: versions of torch's modules
            case name:
                raise ValueError(f"{name} is not of a dictionary of tensors")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                raise GrpoError(
                    f"{file}: not a dictionary of tensors: a key is no text"
                )
            stack[-1][key] = value
    raise ValueError("it has no end")


def read_bin(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file; views and shared storages are resolved.

    Raises:
      GrpoError: the file has another format or is damaged (a CRC is wrong), or its
        pickle holds anything but tensors.
    """
    try:
        with open(file, "rb") as handle:
            head = handle.read(64)
            refuse_lfs_pointer(file, head)
            if head[:1] == b"\x80":
                raise GrpoError(
                    f"{file}: the format of torch.save before 1.6 is not supported; "
                    "load it with torch and save it again"
                )
            with zipfile.ZipFile(handle) as archive:
                data, places = _read_archive(archive, handle, file)

        def storage(pid: Any) -> _Storage:
            kind, code, key, _device, _count = pid
            if kind != "storage" or type(code) is not str or type(key) is not str:
                raise ValueError("a storage without a type or a key")
            if code not in DTYPES or key not in places:
                raise ValueError("a storage that the file does not hold")
            return file, places[key][0], DTYPES[code], places[key][1]

        state = _unpickle(data, file, storage)
    except GrpoError:
        raise
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror or one_line(error)}") from None
    except zipfile.BadZipFile:
        raise GrpoError(
            f"{file}: truncated or not of torch.save; download it again"
        ) from None
    except Exception as error:  # whatever a damaged pickle leads to
        reason = one_line(error) or type(error).__name__
        raise GrpoError(
            f"{file}: broken pickle ({reason}); download it again"
        ) from None
    if not isinstance(state, dict):
        raise GrpoError(f"{file}: not a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, StoredTensor):
            at = one_line(name)
            raise GrpoError(f"{file}: not a dictionary of tensors at {at}")
    return state


def _read_archive(
    archive: zipfile.ZipFile, handle: Any, file: Path
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Returns data.pkl, and the offset and size in bytes of each storage."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise GrpoError(f"{file}: compressed by another program; not supported")
    names = [entry.filename for entry in entries]
    whole = sum(entry.file_size for entry in entries)
    if len(set(names)) < len(names) or whole > file.stat().st_size:
        raise GrpoError(f"{file}: its parts lie on one another; do not use this file")
    damaged = archive.testzip()
    if damaged is not None:
        raise GrpoError(f"{file}: {one_line(damaged)} is damaged; download it again")
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise GrpoError(f"{file}: no data.pkl in it, so not of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    if archive.getinfo(pickles[0]).file_size > LARGEST:
        raise GrpoError(f"{file}: data.pkl is larger than a list of tensors can be")
    if prefix + "byteorder" in names:
        if archive.read(prefix + "byteorder") != b"little":
            raise GrpoError(f"{file}: big-endian numbers are not supported")
    places = {}
    for entry in entries:
        key = entry.filename.removeprefix(prefix + "data/")
        if key == entry.filename:
            continue
        handle.seek(entry.header_offset + 26)  # the local header's two lengths
        lengths = struct.unpack("<HH", handle.read(4))
        places[key] = (entry.header_offset + 30 + sum(lengths), entry.file_size)
    return archive.read(pickles[0]), places


def read_bin_folder(folder: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a folder's pytorch_model*.bin files.

    The files are those of the index, or all of that name if there is no index.

    Raises:
      GrpoError: there is no such file, or one is missing, damaged or not supported.
    """
    index, pattern = folder / INDEX, "pytorch_model*.bin"
    names = set(read_index(index).values()) if index.exists() else set()
    files = sorted(folder / name for name in names) or sorted(folder.glob(pattern))
    if not files:
        raise GrpoError(f"{folder}: no pytorch_model*.bin; is it the right folder?")
    return merge_files(files, read_bin)
