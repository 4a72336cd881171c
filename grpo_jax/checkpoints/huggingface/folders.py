"""Finds model folders on disk or on the Hugging Face hub, and makes new ones.

Errors say which file is missing and how to get it. New folders appear once complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import file_digest

_READ = ["*.json", "*.safetensors", "*.jinja"]
_WANTED = [*_READ, "LICENSE*"]


def find_folder(
    path: str | os.PathLike[str], revision: str | None = None, *, only: str = ""
) -> Path:
    """Returns the local folder of a model, downloading it from the hub if needed.

    A local folder takes precedence over the hub.

    Args:
      path: a local folder or a hub name ("org/name").
      revision: revision of the hub's repository; ignored for local folders.
      only: download this file only; "" downloads all files that are used.

    Raises:
      GrpoError: there is no such folder, it has no config.json, or the download failed.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise GrpoError(
                f"{folder / 'config.json'}: this file is missing; copy it from the "
                "model's page beside the weights"
            )
        return folder
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(path)) or folder.exists():
        raise GrpoError(
            f"{path}: there is no such folder; put config.json, *.safetensors and "
            "tokenizer.json there, or give a hub name such as org/name"
        )
    at = f" --revision {revision}" if revision else ""
    by_hand = (
        f"download it where there is a network, `hf download {path}{at} --local-dir "
        "DIR`, and give DIR as the model's path"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise GrpoError(
            f"{path}/config.json is missing: there is no such local folder, and the "
            f"package huggingface_hub is not there to fetch it; {by_hand}"
        ) from None
    try:
        found = huggingface_hub.snapshot_download(
            str(path), revision=revision, allow_patterns=[only] if only else _WANTED
        )
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GrpoError(
            f"{path}/config.json is missing: there is no such local folder, and it "
            f"could not be fetched ({reason[:120]}); {by_hand}"
        ) from error
    return find_folder(found)


def agree_on_folder(path: str | os.PathLike[str], revision: str | None = None) -> None:
    """Checks that all processes have the same model files.

    Raises:
      GrpoError: a process has other files than process 0, or finds no folder.
    """
    if processes.process_count() == 1:
        return
    folder = find_folder(path, revision)
    files = [file for pattern in _READ for file in folder.glob(pattern)]
    processes.check_equal(
        str(path), {file.name: file_digest(file, ends=1 << 20) for file in files}
    )


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `folder` if the block succeeds.

    Raises:
      GrpoError: `folder` exists and is not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise GrpoError(f"{folder}: exists and is not empty; choose another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise GrpoError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)
    except OSError as error:
        raise GrpoError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
