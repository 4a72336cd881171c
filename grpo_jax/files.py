"""Files that are whole: a reader, or the next start, never finds half of one.

In: a path and its text. Out: the file, new; or what was there before, where the disk is
full or the process is killed. And where what can be made again is kept.
"""

from __future__ import annotations

import os
from pathlib import Path

from grpo_jax.errors import GrpoError


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
