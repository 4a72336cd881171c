"""Files that are whole: a reader, or the next start, never finds half of one.

In: a path and its text. Out: the file, new; or what was there before, where the disk is
full or the process is killed. And where what can be made again is kept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from grpo_jax.errors import GrpoError


def write_whole(
    file: str | os.PathLike[str], text: str, errors: str = "strict"
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
    fresh.write_text(text, encoding="utf-8", errors=errors)
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
