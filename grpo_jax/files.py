"""Files that are whole: a reader, or the next start, never finds half of one.

In: a path and its text. Out: the file, new; or what was there before, where the disk is
full or the process is killed. JSON that is read with a limit on its size and depth. And
where what can be made again is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grpo_jax.errors import GrpoError, one_line

LARGEST = 1 << 27  # bytes of a JSON file; the largest tokenizer.json has 2^25
DEEPEST = 64  # lists and objects in one another; what walks them may recurse


def write_whole(
    file: str | os.PathLike[str], text: str | bytes, errors: str = "strict"
) -> None:
    """All of the text, in a file of its own that then takes the name.

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
    except OSError:  # what a full disk holds of it is in the way of others
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(file)


def digest(file: str | os.PathLike[str], part: int = 1 << 20) -> str:
    """SHA-256 of the content, and of large files of size, first and last `part` bytes.

    An empty text where there is no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a"
    ...     write_whole(file, "abc")
    ...     digest(file)[:8], digest(folder)
    ('ba7816bf', '')
    """
    if not os.path.isfile(file):
        return ""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size <= 16 * part:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        sha = hashlib.sha256(f"{size} ".encode() + opened.read(part))
        opened.seek(-part, os.SEEK_END)
        sha.update(opened.read())
    return sha.hexdigest()


def cache_folder(*parts: str) -> Path:
    """A folder of $GRPO_JAX_CACHE (default ~/.cache/grpo_jax), made if need be."""
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
    """The value of a JSON text, which is nested at most `DEEPEST` deep.

    unique: refuse an object with a repeated key, of which json keeps the last.

    Raises:
      ValueError: not JSON (json.JSONDecodeError, with the place), or out of bounds.

    >>> parse_json("[" * 100 + "]" * 100)
    Traceback (most recent call last):
    ...
    ValueError: lists and objects are nested more than 64 deep
    """
    too_deep = f"lists and objects are nested more than {DEEPEST} deep"
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(too_deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{key[:80]!r} is there twice")
        seen[key] = value
    return seen


def read_whole(file: Path) -> bytes:
    """The bytes of a small file of a model folder.

    Raises:
      GrpoError: no such file, a git-LFS pointer, larger than `LARGEST`.
    """
    try:
        with open(file, "rb") as handle:
            raw = handle.read(LARGEST + 1)
    except OSError as error:
        raise GrpoError(f"{file}: {error.strerror}") from None
    refuse_pointer(file, raw[:64])
    if len(raw) > LARGEST:
        raise GrpoError(f"{file}: more than {LARGEST} bytes; download it again")
    return raw


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
      GrpoError: as `read_whole`, not a JSON object, a repeated key, a lone surrogate,
        nested deeper than `DEEPEST`.
    """
    try:
        value = parse_json(read_whole(file), unique=True)
        json.dumps(value, ensure_ascii=False).encode()
    except GrpoError:
        raise
    except UnicodeEncodeError:
        raise GrpoError(f"{file}: holds a lone surrogate (\\ud8…); remove it") from None
    except ValueError as error:
        told = one_line(error)
        raise GrpoError(f"{file}: not valid JSON ({told}); download it again") from None
    if not isinstance(value, dict):
        raise GrpoError(f"{file}: not a JSON object; download it again")
    return value


def refuse_pointer(file: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise GrpoError(
            f"{file}: a git-LFS pointer, not the file itself; run `git lfs pull` in "
            "its folder or download it again"
        )
