"""Writes a run's metrics, samples and report.

Metrics go to metrics.jsonl in the work directory, one JSON object a line, under TRL's
names; to TensorBoard; and to Weights & Biases if it is installed and WANDB_PROJECT is
set. A resumed run first drops the lines of steps that it will repeat. Damaged lines are
moved to a file of their own. If there are several processes, only the first writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax import report
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import parse_json, to_json, write_whole

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class Recorder:
    """Appends to the files of a work directory; use as a context manager.

    Args:
      workdir: an existing folder. Nothing is written in it before the first line.
      config: the run's config, for Weights & Biases.
      claim: called by every process before anything is written; `begin` is this
        function, to be called before other files are written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Recorder(folder) as recorder:
    ...         recorder.write("rl", 3, {"reward": 0.5, "kl": float("nan")})
    ...     print(Path(folder, "metrics.jsonl").read_text().strip())
    {"step": 3, "stage": "rl", "reward": 0.5, "kl": null}
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: Any = None,
        claim: Callable[[], None] = lambda: None,
    ):
        self.workdir = Path(workdir)
        self.config = config
        self.begin = claim
        self._tensorboard: _TensorBoardFile | None = None
        self._wandb: Any = None
        self._stages: set[str] = set()  # stages whose step metric W&B knows
        self._next_report = 0.0

    def __enter__(self) -> Recorder:
        if processes.is_first_process() and (
            project := os.environ.get("WANDB_PROJECT")
        ):
            self._wandb = _start_wandb(project, self.workdir, self.config)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=int(error[0] is not None))
            except Exception as problem:  # it must not hide what ended the run
                what = " ".join(str(problem).split())
                print(f"Weights & Biases: {what}", file=sys.stderr)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Returns the metrics of a stage that are written, on process 0."""
        file = self.workdir / METRICS
        if not processes.is_first_process() or not file.exists():
            return []
        with open(file, encoding="utf-8") as lines:
            found = map(parse_json, lines)
            return [row for row in found if row["stage"] == stage]

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes a step's metrics; a number that is not finite becomes null."""
        self.begin()
        if not processes.is_first_process():
            return
        values = json_values(metrics)
        row = {"step": step, "stage": stage, **values}
        _append(self.workdir / METRICS, to_json(row))
        numbers = {
            f"{stage}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float)
        }
        if self._tensorboard is None:
            self._tensorboard = _TensorBoardFile(self.workdir / "tensorboard")
        self._tensorboard.write(step, numbers)
        if self._wandb is not None:
            if stage not in self._stages:  # W&B's own count of steps never goes back
                self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._stages.add(stage)
            self._wandb.log({f"{stage}/step": step, **numbers})

    def write_samples(self, stage: str, step: int, samples: Mapping[str, Any]) -> None:
        """Writes one question with its completions, for a person to read."""
        self.begin()
        if processes.is_first_process():
            row = {"step": step, "stage": stage, **samples}
            _append(self.workdir / SAMPLES, to_json(row))

    def write_report(self, *, last: bool = False) -> None:
        """Writes report.html again, or skips it to spend at most 2 % of the run on it.

        Args:
          last: write it in any case.
        """
        begin = time.monotonic()
        if processes.is_first_process() and (last or begin >= self._next_report):
            report.try_write_report(self.workdir)
            self._next_report = begin + 50 * (time.monotonic() - begin)

    def forget_after(self, stage: str, step: int) -> None:
        """Drops the lines of a stage's steps after `step`, which will be repeated.

        A last line that a kill cut off is dropped too. Lines that cannot be read are
        moved to FILE.damaged, with a message.

        Raises:
          GrpoError: a file cannot be written.
        """
        for name in (METRICS, SAMPLES) if processes.is_first_process() else ():
            file = self.workdir / name
            with _explain_write_errors(file):
                if file.exists():
                    _forget_after(file, stage, step)


def _forget_after(file: Path, stage: str, step: int) -> None:
    kept, damaged = [], {}
    whole = file.read_bytes()
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        where = _stage_and_step(line)
        if where is None:
            damaged[str(number)] = line
        elif where[0] != stage or where[1] <= step:
            kept.append(line)
    if damaged:
        aside = file.with_name(f"{file.name}.damaged")
        with open(aside, "ab") as lines:
            lines.write(b"".join(line + b"\n" for line in damaged.values()))
        shown = ", ".join([*damaged][:6]) + ", …" * (len(damaged) > 6)
        print(
            f"{file}:{shown}: not as a run writes it; moved to {aside.name}",
            file=sys.stderr,
        )
    rest = b"".join(line + b"\n" for line in kept)
    if rest != whole:
        write_whole(file, rest)


def _stage_and_step(line: bytes) -> tuple[str, int] | None:
    """Returns a line's stage and step; None if it is no metric or sample."""
    try:
        values = parse_json(line.decode("utf-8"))
    except ValueError:
        return None
    match values:
        case {"stage": str() as stage, "step": int() as step} if type(step) is int:
            return stage, step
    return None


@contextlib.contextmanager
def _explain_write_errors(file: Path) -> Iterator[None]:
    """Raises a GrpoError for an OSError while a file is written."""
    try:
        yield
    except OSError as error:
        raise GrpoError(
            f"{file}: cannot be written ({error.strerror}); the last checkpoint "
            "stands. Make room there; the same command goes on from it"
        ) from error


def json_values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics as JSON has them; a number that is not finite becomes None."""
    return {name: _json_value(value) for name, value in metrics.items()}


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _append(file: Path, content: bytes) -> None:
    with _explain_write_errors(file):
        file.parent.mkdir(exist_ok=True)
        with open(file, "ab") as end:
            end.write(content)


class _TensorBoardFile:
    """TensorBoard's event file, written in the caller's thread.

    SummaryWriter writes in a thread behind a short queue. If a full disk ends that
    thread, the run would wait forever to put the next number into the queue.
    """

    def __init__(self, folder: Path):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self.file = folder / f"{name}.{uuid.uuid4().hex[:8]}"
        self._append_event(file_version="brain.Event:2")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes all numbers of a step as one event."""
        from tensorboardX.summary import scalar

        scalars = [scalar(*item).value for item in numbers.items()]
        values = list(itertools.chain(*scalars))
        self._append_event(step=step, summary={"value": values})

    def _append_event(self, **event: Any) -> None:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        data = vars(event_pb2)["Event"](wall_time=time.time(), **event)
        data = data.SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
        _append(self.file, size + sums[0] + data + sums[1])


def _start_wandb(project: str, workdir: Path, config: Any) -> Any:
    """Returns the W&B run, the same one after a resume; None without the package."""
    try:
        import wandb  # pyrefly: ignore[missing-import]  # the user may have it
    except ImportError:
        print("WANDB_PROJECT is set, but wandb is not installed", file=sys.stderr)
        return None
    file = workdir / "wandb_id"
    with _explain_write_errors(file):
        number = os.environ.get("WANDB_RUN_ID", "")
        if not number and file.exists():
            number = file.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[\w.-]+", number):
            number = uuid.uuid4().hex[:8]
        write_whole(file, number)
        try:
            return wandb.init(
                project=project,
                dir=str(workdir),
                name=workdir.resolve().name,
                id=number,
                resume="allow",
                config=dataclasses.asdict(config) if config is not None else None,
                allow_val_change=True,
            )
        except (wandb.Error, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise GrpoError(
                f"Weights & Biases did not start ({reason}); set WANDB_MODE=offline, "
                "or leave WANDB_PROJECT out"
            ) from None
