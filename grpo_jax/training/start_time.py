"""The time at which a run or an evaluation started, kept in its folder's started.json.

Some chat templates write the date into the prompt. They get this time, so that a run
that is resumed or evaluated on a later day has the same prompts.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import read_json, write_json

FILE = "started.json"


def start_time(
    folder: Path, *, keep: bool = False, again: bool = False
) -> datetime.datetime:
    """Returns a folder's start time, the same in all processes; now if it has none.

    Args:
      folder: a work directory, or the folder of an evaluation.
      keep: write the time if the folder has none.
      again: ignore the time that is there, as it belongs to a start that failed.

    Raises:
      GrpoError: started.json is damaged.
    """
    return datetime.datetime.fromisoformat(
        processes.broadcast(lambda: _start(folder / FILE, keep, again))
    )


def _start(file: Path, keep: bool, again: bool) -> str:
    if file.exists() and not again:
        try:
            started = read_json(file)["started"]
            return datetime.datetime.fromisoformat(started).isoformat()
        except (ValueError, TypeError, KeyError):
            raise GrpoError(
                f'{file}: expected {{"started": "2026-01-31T12:00:00"}}, the day that '
                "chat templates show; write it again"
            ) from None
    now = datetime.datetime.now().replace(microsecond=0)
    if keep:
        write_start_time(file.parent, now)
    return now.isoformat()


def write_start_time(folder: Path, started: datetime.datetime) -> None:
    """Writes a folder's start time."""
    write_json(folder / FILE, {"started": started.isoformat()})
