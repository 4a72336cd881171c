"""Ties a work directory and its checkpoints to the config of their run.

    config.json     the config of the run, as of its last start
    accepted.json   what --accept_changes has changed: {"field": [earlier values]}

config.json is written together with the run's first output, so that a config can still
be corrected after a start that failed. Checkpoints store the config's fields rather
than a hash: an error can name what differs, and a field that a later version adds does
not invalidate old checkpoints.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, flatten_config, from_dict
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import read_json, write_json
from grpo_jax.training.config_checks import check_fields
from grpo_jax.training.start_time import write_start_time

# The fields that the Instruct stage depends on. Runs that agree on them may share its
# checkpoint.
_SFT = ("seed", "sft_steps", "sft.", "model.", "data.sft", "data.template")
_SFT += ("data.instruction", "optimizer.b1", "optimizer.b2", "optimizer.master")
_SFT += ("optimizer.weight_decay", "optimizer.max_grad_norm")


def is_harmless(name: str) -> bool:
    """Returns whether a field may change between two starts of the same run."""
    return name.startswith(("mesh.", "checkpoint", "data.dir", "model.hint"))


def read_config(workdir: Path) -> Config:
    """Returns the config of a work directory.

    Raises:
      GrpoError: there is no config.json, or it is not a valid config.
    """
    file = workdir / "config.json"
    if not file.exists():
        raise GrpoError(f"{file}: no such file; is this a work directory?")
    values = read_json(file, "put back what the run wrote there")
    try:
        config = from_dict(values)
        check_fields(config)
    except GrpoError as error:  # such as a field of another version
        raise GrpoError(f"{file}: {error}; change it there") from None
    return config


class WorkDirectoryClaim:
    """A run's claim to its work directory.

    Every process of a run makes the same calls; only the first one writes.

    Args:
      config: the config of the run.
      workdir: the work directory.
      started: when the run started, which is written with the config.
      accept_changes: continue although config or checkpoints differ. Accepted changes
        are written down, so that later starts need no flag.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        started: datetime.datetime | None = None,
        *,
        accept_changes: bool = False,
    ):
        self.config, self.workdir, self.started = config, workdir, started
        self.accept_changes = accept_changes
        self._accepted: dict[str, list[Any]] = {}
        self._written = self._orphaned = False

    def check(self) -> None:
        """Checks that the directory has the same config, and that all processes see it.

        The directory must be locked by the caller.

        Raises:
          GrpoError: one of the two does not hold.
        """
        self._accepted, self._orphaned = processes.broadcast(self._read)
        if not (self.workdir / ".lock").exists():
            raise GrpoError(
                f"workdir {self.workdir}: process {processes.process_index()} does not "
                "see what process 0 writes there; choose a folder on a disk that all "
                "share"
            )

    def write(self) -> None:
        """Makes the directory this run's; call it before anything else is written."""
        if not self._written:
            self._written = True
            if processes.is_first_process():
                if self.started is not None:
                    write_start_time(self.workdir, self.started)
                values = dataclasses.asdict(self.config)
                write_json(self.workdir / "config.json", values)
            self._write_accepted()

    def origin(self, stage: str) -> dict[str, Any]:
        """Returns the JSON values that are saved with a checkpoint of a stage."""
        fields = {
            n: v
            for n, v in flatten_config(self.config).items()
            if _affects_stage(stage, n)
        }
        return {"stage": stage, "seed": self.config.seed, "config": fields}

    def objection(self, stage: str, saved: Mapping[str, Any]) -> str:
        """Returns why a checkpoint does not belong to this run's stage; "" if it does.

        Args:
          stage: the stage that would resume from it.
          saved: the checkpoint's metadata. Older versions saved fewer fields; only
            those that are there are compared.
        """
        if saved.get("stage", stage) != stage:
            return (
                f"is of the stage {saved['stage']!r}, not of {stage!r}; move it away, "
                "or take another --workdir"
            )
        before = saved.get("config")
        if before is None:
            before = {"seed": saved["seed"]} if "seed" in saved else {}
            if self._orphaned and not self.accept_changes:
                return (
                    "does not say of which config it is, and config.json is gone; put "
                    "it back, or add --accept_changes"
                )
        changed = {
            name: (old, new)
            for name, (old, new) in _changes(before, self.origin(stage)["config"])
            if old not in self._accepted.get(name, ())
        }
        if changed and not self.accept_changes:
            return (
                f"was saved with another config ({_format_changes(changed)}); take "
                "another --workdir, or add --accept_changes"
            )
        self._accept(changed)
        return ""

    def _read(self) -> tuple[dict[str, list[Any]], bool]:
        """Returns (accepted changes, whether config.json is missing), or raises."""
        file = self.workdir / "accepted.json"
        if file.exists():
            self._accepted = read_json(file, "delete it")
            if not all(isinstance(v, list) for v in self._accepted.values()):
                raise GrpoError(f"{file}: not lists of values by field; delete it")
        file = self.workdir / "config.json"
        if not file.exists():
            return self._accepted, True
        before = flatten_config(read_config(self.workdir))
        changed = dict(_changes(before, flatten_config(self.config)))
        if changed and not self.accept_changes:
            raise GrpoError(
                f"{file}: this run was started with another config "
                f"({_format_changes(changed)}); take another --workdir, or add "
                "--accept_changes"
            )
        self._accept(changed)
        return self._accepted, False

    def _accept(self, changed: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (old, _) in changed.items():
            values = self._accepted.setdefault(name, [])
            values += [old] * (old not in values)
        if changed and self._written:
            self._write_accepted()

    def _write_accepted(self) -> None:
        if self._accepted and processes.is_first_process():
            write_json(self.workdir / "accepted.json", self._accepted)


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields (field, (before, now)) for each changed field that must not change."""
    for name, value in now.items():
        if name in before and before[name] != value and not is_harmless(name):
            yield name, (before[name], value)


def _affects_stage(stage: str, name: str) -> bool:
    if is_harmless(name) or name == "name":
        return False
    return stage != "sft" or name.startswith(_SFT)


def _format_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = ", ".join(f"{k} {a!r} → {b!r}" for k, (a, b) in list(changed.items())[:8])
    return shown + (", …" if len(changed) > 8 else "")
