"""Files that are whole: a reader, or the next start, never finds half of one.

In: a path and its text. Out: the file, new; or what was there before, where the disk is
full or the process is killed.
"""

from __future__ import annotations

import os
from pathlib import Path


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
