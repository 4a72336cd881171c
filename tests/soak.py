"""A long run of very small steps, watched for what grows: `make soak`.

    PYTHONPATH=tests/helpers python tests/soak.py [--steps 2000]

In: a number of RL steps. Out: of each step the processor time, the resident set, the
open files and the programs compiled so far; and whether any of them grows after the
first part, in which all is compiled and filled. Saves and evaluations come often, as
they too may leak.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from small_runs import dotted, small_config, write_questions

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZES: dict[str, Any] = {
    "sft_steps": 8,
    "questions_per_step": 4,
    "max_new_tokens": 6,
    "checkpoint_every": 20,
    "eval.every": 50,
    "eval.questions": 8,
    "eval.samples": 0,
}


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a process is at the end of a step."""

    seconds: float  # of the processors since the moment before: others' load is not it
    resident: int  # bytes
    files: int
    programs: int  # compiled so far
    threads: int


class Watch:
    """Counts what this process compiles; looks at it when asked."""

    def __init__(self) -> None:
        import jax

        self.programs = 0
        self.moments: list[Moment] = []
        self._spent = time.process_time()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **about: Any) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def look(self) -> None:
        before, self._spent = self._spent, time.process_time()
        seconds = self._spent - before
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        files, threads = (len(os.listdir(f"/proc/self/{n}")) for n in ("fd", "task"))
        self.moments.append(Moment(seconds, resident, files, self.programs, threads))


def soak(folder: Path, steps: int, **changes: Any) -> list[Moment]:
    """The moments of a run's RL steps, in this process."""
    from grpo_jax.train import train_run
    from grpo_jax.training.metrics_writer import Recorder

    questions = write_questions(folder / "sums.jsonl")
    data = {"data.train": questions, "data.sft": questions, "data.eval": questions}
    config = small_config(SIZES | data | {"rl_steps": steps} | dotted(changes))
    watch, write = Watch(), Recorder.write

    def watched(self, stage, step, metrics):
        write(self, stage, step, metrics)
        if stage == "rl":
            watch.look()

    Recorder.write = watched  # type: ignore[method-assign]
    try:
        train_run(config, folder / "run")
    finally:
        Recorder.write = write  # type: ignore[method-assign]
    return watch.moments


def growth(moments: list[Moment], warm: int) -> dict[str, tuple[float, float]]:
    """Of what is watched: in the first tenth after `warm` steps, and in the last."""
    rest = moments[warm:]
    tenth = max(1, len(rest) // 10)
    first, last = rest[:tenth], rest[-tenth:]
    return {
        name: (
            statistics.median(getattr(m, name) for m in first),
            statistics.median(getattr(m, name) for m in last),
        )
        for name in ("seconds", "resident", "files", "programs", "threads")
    }


def complaints(
    found: dict[str, tuple[float, float]], *, slower: float = 1.25
) -> list[str]:
    """What has grown: memory by 5 %, the time, threads, or by one file or program."""
    limits = {"seconds": slower, "resident": 1.05, "threads": 1.25}  # pools come and go
    return [
        f"{name}: {before:.6g} → {after:.6g}"
        for name, (before, after) in found.items()
        if after > before * limits.get(name, 1.0)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        moments = soak(Path(folder), flags.steps)
    seconds = time.monotonic() - begin
    for i in range(0, len(moments), max(1, len(moments) // 20)):
        m = moments[i]
        print(
            f"step {i + 1}: {m.resident / 2**20:.1f} MiB, {m.files} files, "
            f"{m.programs} programs, {m.threads} threads, {1000 * m.seconds:.1f} ms"
        )
    found = growth(moments, flags.steps // 10)
    for name, (before, after) in found.items():
        print(f"{name}: {before:.6g} → {after:.6g} ({after / before - 1:+.1%})")
    print(f"{len(moments)} steps in {seconds:.0f} s")
    if grown := complaints(found):
        raise SystemExit(f"grown: {'; '.join(grown)}")


if __name__ == "__main__":
    main()
