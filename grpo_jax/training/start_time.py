"""When a run started: what the clock of a chat template shows, on every later day too.

In: a work directory, or the folder of an evaluation. Out: the time in its started.json.
Some templates write the date into the prompt; a run that is resumed, or evaluated, the
day after asks with the same prompts.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import write_whole

FILE = "started.json"


def start_time(
    folder: Path, *, keep: bool = False, again: bool = False
) -> datetime.datetime:
    """The folder's start, the same for all processes; without one, now.

    keep: writes it where there is none. again: whatever is there is of a start that
    came to nothing.
    """
    return datetime.datetime.fromisoformat(
        processes.from_first(lambda: _start(folder / FILE, keep, again))
    )


def _start(file: Path, keep: bool, again: bool) -> str:
    if file.exists() and not again:
        try:
            started = json.loads(file.read_bytes())["started"]
            return datetime.datetime.fromisoformat(started).isoformat()
        except (ValueError, TypeError, KeyError, RecursionError):
            raise GrpoError(
                f'{file}: expected {{"started": "2026-01-31T12:00:00"}}, the day that '
                "chat templates show; write it again"
            ) from None
    now = datetime.datetime.now().isoformat(timespec="seconds")
    if keep:
        write_whole(file, json.dumps({"started": now}) + "\n")
    return now
