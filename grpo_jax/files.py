"""File helpers: atomic writes, hashes, JSON with limits, and the cache folder.

A file is written completely or not at all, even if the disk is full or the process is
killed. JSON is read with limits on its size and depth.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grpo_jax.errors import GrpoError, one_line

LARGEST = 1 << 27  # bytes of a JSON file; the largest tokenizer.json has 2^25
DEEPEST = 64  # nested lists and objects; code that walks them may recurse


def write_whole(
    file: str | os.PathLike[str], text: str | bytes, errors: str = "strict"
) -> None:
    """Writes a file atomically: to a temporary file, which is then renamed.

    Args:
      file: the file's path.
      text: its content; a str is written in UTF-8.
      errors: how characters that UTF-8 cannot encode are handled.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "a.json", "{}")
    ...     os.listdir(folder)
    ['a.json']
    """
    file = Path(file)
    fresh = file.with_name(file.name + ".tmp")
    whole = text.encode("utf-8", errors) if isinstance(text, str) else text
    try:
        fresh.write_bytes(whole)
    except OSError:  # free the space that the partial file takes on a full disk
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(file)


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Returns a value as JSON in UTF-8 with a line's end.

    A text with a lone surrogate, which UTF-8 cannot encode, makes all of it ASCII.

    >>> to_json({"name": "x"}), to_json(chr(0xD800))
    (b'{"name": "x"}\\n', b'"\\\\ud800"\\n')
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode() + b"\n"


def write_json(file: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, as `write_whole` writes."""
    write_whole(file, to_json(value, indent=2))


def file_digest(file: str | os.PathLike[str], ends: int = 0) -> str:
    """Returns a file's SHA-256 in hexadecimal; "" if there is no such file.

    Args:
      file: the file.
      ends: hash only the size, and the first and the last `ends` bytes, of a file of
        more than 16 times as many; 0 hashes all of any file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a"
    ...     write_whole(file, "abc")
    ...     file_digest(file)[:8], file_digest(folder)
    ('ba7816bf', '')
    """
    if not os.path.isfile(file):
        return ""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if not ends or size <= 16 * ends:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        sha = hashlib.sha256(f"{size} ".encode() + opened.read(ends))
        opened.seek(-ends, os.SEEK_END)
        sha.update(opened.read())
    return sha.hexdigest()


def cache_folder(*parts: str) -> Path:
    """Returns a folder in $GRPO_JAX_CACHE (default ~/.cache/grpo_jax), creating it.

    Raises:
      GrpoError: it cannot be created.
    """
    root = os.environ.get("GRPO_JAX_CACHE") or "~/.cache/grpo_jax"
    path = Path(root, *parts).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GrpoError(
            f"{path}: cannot make the cache folder ({error.strerror}); set "
            "GRPO_JAX_CACHE to a folder that can be written"
        ) from None
    return path


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Returns the value of a JSON text that is nested at most `DEEPEST` deep.

    Args:
      text: the JSON text.
      unique: raise for an object with a repeated key; the json module keeps the last.

    Raises:
      ValueError: the text is not JSON (json.JSONDecodeError), is nested too deep, or
        has a repeated key.

    >>> parse_json("[" * 100 + "]" * 100)
    Traceback (most recent call last):
    ...
    ValueError: lists and objects are nested more than 64 deep
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        _check_depth(value, DEEPEST)
    except RecursionError:
        message = f"lists and objects are nested more than {DEEPEST} deep"
        raise ValueError(message) from None
    return value


def _check_depth(value: Any, left: int) -> None:
    """Raises RecursionError if lists and objects are nested more than `left` deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if not left:
            raise RecursionError
        for item in value:
            _check_depth(item, left - 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{key[:80]!r} is there twice")
        seen[key] = value
    return seen


def read_small_file(file: Path) -> bytes:
    """Returns the bytes of a small file of a model folder.

    Raises:
      GrpoError: there is no such file, or it is a git-LFS pointer or above `LARGEST`.
    """
    try:
        with open(file, "rb") as handle:
            raw = handle.read(LARGEST + 1)
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror}") from None
    refuse_lfs_pointer(file, raw[:64])
    if len(raw) > LARGEST:
        raise GrpoError(f"{file}: more than {LARGEST} bytes; download it again")
    return raw


def read_json(file: Path, remedy: str = "download it again") -> dict[str, Any]:
    """Returns the object in a JSON file of a model folder or a work directory.

    Args:
      file: the file.
      remedy: what the message says to do if the file is damaged.

    Raises:
      GrpoError: as `read_small_file`; or it is not a JSON object, has a repeated key or
        a lone surrogate, or is nested deeper than `DEEPEST`.
    """
    try:
        value = parse_json(read_small_file(file), unique=True)
        json.dumps(value, ensure_ascii=False).encode()
    except GrpoError:
        raise
    except UnicodeEncodeError:
        raise GrpoError(f"{file}: holds a lone surrogate (\\ud8…); remove it") from None
    except ValueError as error:
        reason = one_line(error)
        raise GrpoError(f"{file}: not valid JSON ({reason}); {remedy}") from None
    if not isinstance(value, dict):
        raise GrpoError(f"{file}: not a JSON object; {remedy}")
    return value


def refuse_lfs_pointer(file: Path, head: bytes) -> None:
    """Raises a GrpoError if a file that starts with `head` is a git-LFS pointer."""
    if head.startswith(b"version https://git-lfs"):
        raise GrpoError(
            f"{file}: a git-LFS pointer, not the file itself; run `git lfs pull` in "
            "its folder or download it again"
        )
