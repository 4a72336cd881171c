"""What a run tells: metrics, samples, report.html, TensorBoard, a progress bar.

In: the metrics of a step. Out: one JSON object a line in the work directory, with the
metric names of algorithms people know (TRL's); the same to TensorBoard, and to Weights
& Biases where it is installed and WANDB_PROJECT is set.

A resumed run drops the lines of steps that it does again. Of several processes the
first alone writes.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tqdm

from grpo_jax import hosts, report
from grpo_jax.files import write_whole


class Recorder:
    """Appends to the files of a work directory; use as a context manager.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Recorder(folder) as recorder:
    ...         recorder.write("rl", 3, {"reward": 0.5, "kl": float("nan")})
    ...     print(Path(folder, "metrics.jsonl").read_text().strip())
    {"step": 3, "stage": "rl", "reward": 0.5, "kl": null}
    """

    def __init__(self, workdir: str | os.PathLike[str], config: Any = None):
        self.workdir = Path(workdir)
        self.config = config
        self._next_report = 0.0

    def __enter__(self) -> Recorder:
        if not hosts.first():
            return self
        from tensorboardX import SummaryWriter

        self._metrics = open(self.workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._samples = open(self.workdir / "samples.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.workdir / "tensorboard"))
        self._wandb = self._start_wandb()
        return self

    def __exit__(self, *error: Any) -> None:
        if not hosts.first():
            return
        self._metrics.close()
        self._samples.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _start_wandb(self) -> Any:
        project = os.environ.get("WANDB_PROJECT")
        if not project:
            return None
        try:
            import wandb  # pyrefly: ignore[missing-import]  # the user may have it
        except ImportError:
            print("WANDB_PROJECT is set, but wandb is not installed", file=sys.stderr)
            return None
        run = dict(project=project, dir=str(self.workdir), config=self.config)
        return wandb.init(**run, name=self.workdir.name)

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One line; what is not finite becomes null."""
        if not hosts.first():
            return
        values = {k: _plain(v) for k, v in metrics.items()}
        _line(self._metrics, {"step": step, "stage": stage, **values})
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for name, value in numbers.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{k}": v for k, v in numbers.items()})

    def write_samples(self, stage: str, step: int, samples: Mapping[str, Any]) -> None:
        """One question with its completions, so that a reader sees what is going on."""
        if hosts.first():
            _line(self._samples, {"step": step, "stage": stage, **samples})

    def write_report(self, *, last: bool = False) -> None:
        """report.html anew; before the last one in a fiftieth of the time at most."""
        begin = time.monotonic()
        if hosts.first() and (last or begin >= self._next_report):
            report.update(self.workdir)
            self._next_report = begin + 50 * (time.monotonic() - begin)

    def forget_after(self, stage: str, step: int) -> None:
        """Drop the lines of a stage's steps beyond `step`: they will be done again."""
        if not hosts.first():
            return
        for file in (self._metrics, self._samples):
            file.flush()
            path = Path(file.name)
            kept = [line for line in _lines(path) if not _is_after(line, stage, step)]
            write_whole(path, "".join(kept))
        self._metrics.close()
        self._samples.close()
        self._metrics = open(self.workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._samples = open(self.workdir / "samples.jsonl", "a", encoding="utf-8")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _line(file: Any, values: Mapping[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    file.flush()


def _lines(path: Path) -> Iterable[str]:
    """Whole lines; a last one cut off by a kill is left out."""
    with open(path, encoding="utf-8") as file:
        yield from (line for line in file if line.endswith("\n"))


def _is_after(line: str, stage: str, step: int) -> bool:
    values = json.loads(line)
    return values["stage"] == stage and values["step"] > step


def progress(stage: str, start: int, steps: int, unit: str = "step") -> tqdm.tqdm:
    """A bar with the time left; in a log a line every ten seconds and at the end."""
    screen = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=stage,
        initial=start,
        total=steps,
        unit=unit,
        disable=not hosts.first(),
        dynamic_ncols=screen,
        mininterval=0.2 if screen else 10.0,
        delay=0 if screen else 1e-9,  # no line at 0 %
        file=sys.stderr if screen else _Lines(),
    )


class _Lines(io.StringIO):
    """What tqdm draws over and over in one line, as lines; each count once."""

    count = ""

    def write(self, text: str) -> int:
        shown = text.replace("\x1b[A", "").strip()
        count = shown.partition(" [")[0]  # behind it stand times
        if shown and count != self.count:
            print(shown, file=sys.stderr, flush=True)
            self.count = count
        return len(text)
