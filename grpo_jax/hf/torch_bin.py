"""pytorch_model*.bin without torch, and without running what a pickle may hold.

In: a file written by torch.save in its zip format (torch 1.6 and later). Out: {name:
Stored}: where each tensor lies in the file, nothing read yet. The unpickler knows the
seven names that a state dict of floating-point tensors needs; any other ends it.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from grpo_jax.errors import GrpoError
from grpo_jax.hf.tensors import DTYPES, Stored, merge, read_index, refuse_pointer

INDEX = "pytorch_model.bin.index.json"
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
}


class _RebuildTensor:
    """Stands for torch's function; without attributes that a pickle could set."""

    __slots__ = ()

    def __call__(
        self, storage: Any, start: int, shape: Any, strides: Any, *_: Any
    ) -> Stored:
        file, offset, code, size = storage
        numbers = (start, *shape, *strides)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a negative offset, size or stride")
        pairs = list(zip(shape, strides, strict=True))
        last = start + sum((n - 1) * stride for n, stride in pairs)
        item = DTYPES[code].itemsize
        if 0 not in shape and (last + 1) * item > size:
            raise ValueError("a tensor reaches beyond its storage")
        return Stored(
            file, offset + start * item, DTYPES[code], tuple(shape), tuple(strides)
        )


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): code for name, code in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, file: Path, places: dict[str, tuple[int, int]]):
        super().__init__(io.BytesIO(data))
        self._file = file
        self._places = places

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise GrpoError(
                f"{self._file}: its pickle asks for {module}.{name}, which weights do "
                "not need; it was not run; do not use this file"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, code, key, _device, _count = pid
        if kind != "storage" or code not in DTYPES or key not in self._places:
            raise ValueError(f"no storage {key!r}")
        return self._file, self._places[key][0], code, self._places[key][1]


def read_bin(file: Path) -> dict[str, Stored]:
    """The tensors of one file; views and shared storages come as what they view.

    Raises:
      GrpoError: another format, damaged (a CRC is wrong), or a pickle that holds
        anything but tensors.
    """
    try:
        with open(file, "rb") as handle:
            head = handle.read(64)
            refuse_pointer(file, head)
            if head[:1] == b"\x80":
                raise GrpoError(
                    f"{file}: the format of torch.save before 1.6 is not supported; "
                    "load it with torch and save it again"
                )
            with zipfile.ZipFile(handle) as archive:
                data, places = _open(archive, handle, file)
        state = _Unpickler(data, file, places).load()
    except GrpoError:
        raise
    except zipfile.BadZipFile:
        raise GrpoError(
            f"{file}: truncated or not of torch.save; download it again"
        ) from None
    except Exception as error:  # whatever a damaged pickle leads to
        raise GrpoError(f"{file}: broken pickle ({error}); download it again") from None
    tensors = state if isinstance(state, dict) else {"": None}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise GrpoError(f"{file}: not a dictionary of tensors at {str(name)[:80]}")
    return dict(tensors)


def _open(
    archive: zipfile.ZipFile, handle: Any, file: Path
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """data.pkl, and (offset, bytes) of each storage in the file."""
    damaged = archive.testzip()
    if damaged is not None:
        raise GrpoError(f"{file}: {damaged} is damaged; download it again")
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise GrpoError(f"{file}: no data.pkl in it, so not of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    if archive.getinfo(pickles[0]).file_size > 1 << 28:
        raise GrpoError(f"{file}: data.pkl is larger than a list of tensors can be")
    if prefix + "byteorder" in archive.namelist():
        if archive.read(prefix + "byteorder") != b"little":
            raise GrpoError(f"{file}: big-endian numbers are not supported")
    places = {}
    for entry in archive.infolist():
        key = entry.filename.removeprefix(prefix + "data/")
        if key == entry.filename:
            continue
        if entry.compress_type != zipfile.ZIP_STORED:
            raise GrpoError(f"{file}: compressed by another program; not supported")
        handle.seek(entry.header_offset + 26)  # the local header's two lengths
        lengths = struct.unpack("<HH", handle.read(4))
        places[key] = (entry.header_offset + 30 + sum(lengths), entry.file_size)
    return archive.read(pickles[0]), places


def read_bin_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's pytorch_model*.bin files, by index or by name."""
    if (folder / INDEX).exists():
        names = sorted(set(read_index(folder / INDEX).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise GrpoError(f"{folder}: no pytorch_model*.bin; is it the right folder?")
    return merge(files, read_bin)
