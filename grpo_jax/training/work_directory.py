"""Whose a work directory is: the config of its run, and where checkpoints come from.

In: a config and a work directory. Out: config.json, written when the first thing is, so
that a start that failed before can be corrected; for a checkpoint, what is saved with
it to tell it from another run's. Both are refused in one line where they differ.

    config.json     the config of the run as it goes on
    accepted.json   what --accept_changes has changed: {"field": [values before]}

A checkpoint has the fields themselves and not a hash of them: a refusal names what
differs, and a field that a later version adds refuses nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, flatten, from_dict, to_json
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.files import write_whole
from grpo_jax.training.config_checks import check_fields

# What the Instruct stage depends on: runs that share it may share its checkpoint.
_SFT = ("seed", "sft_steps", "sft.", "model.", "data.sft", "data.template")
_SFT += ("data.instruction", "optimizer.b1", "optimizer.b2", "optimizer.master")
_SFT += ("optimizer.weight_decay", "optimizer.max_grad_norm")


def is_harmless(name: str) -> bool:
    """Whether a field may change between two starts of the same run."""
    return name.startswith(("mesh.", "checkpoint")) or name in (
        "data.dir",
        "model.hint",
    )


def read_config(workdir: Path) -> Config:
    file = workdir / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GrpoError(f"{file}: no such file; is this a work directory?") from None
    except json.JSONDecodeError as error:
        raise GrpoError(f"{file}: not valid JSON ({error})") from None
    try:
        config = from_dict(values)
        check_fields(config)
    except GrpoError as error:  # of a field that another version had, or had otherwise
        raise GrpoError(f"{file}: {error}; change it there") from None
    return config


class Claim:
    """A run's hold on its work directory.

    Every process of a run makes the same calls; the first alone writes.

    Args:
      accept_changes: go on where config or checkpoints differ; what was accepted once
        is written down and asked for no more.
    """

    def __init__(self, config: Config, workdir: Path, *, accept_changes: bool = False):
        self.config, self.workdir = config, workdir
        self.accept_changes = accept_changes
        self._accepted: dict[str, list[Any]] = {}
        self._written = self._orphaned = False

    def check(self) -> None:
        """Refuses a directory with another config, or that not all processes see.

        Call it where the directory is locked.
        """
        self._accepted, self._orphaned = processes.from_first(self._read)
        if not (self.workdir / ".lock").exists():
            raise GrpoError(
                f"workdir {self.workdir}: process {processes.index()} does not see "
                "what process 0 writes there; choose a folder on a disk that all share"
            )

    def write(self) -> None:
        """Makes the directory this run's, once: before the first thing is written."""
        if not self._written:
            self._written = True
            if processes.first():
                write_whole(self.workdir / "config.json", to_json(self.config))
            self._write_accepted()

    def origin(self, stage: str) -> dict[str, Any]:
        """What is saved with a checkpoint of the stage, as JSON."""
        fields = {n: v for n, v in flatten(self.config).items() if _matters(stage, n)}
        return {"stage": stage, "seed": self.config.seed, "config": fields}

    def objection(self, stage: str, saved: Mapping[str, Any]) -> str:
        """Why a checkpoint is not one of this run's stage; "" where it is.

        saved: its metadata. Those of older versions say less: what is there counts.
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
                f"was saved with another config ({_shown(changed)}); take another "
                "--workdir, or add --accept_changes"
            )
        self._accept(changed)
        return ""

    def _read(self) -> tuple[dict[str, list[Any]], bool]:
        """(what is accepted, whether config.json is missing), once all is right."""
        file = self.workdir / "accepted.json"
        with contextlib.suppress(FileNotFoundError):
            try:
                self._accepted = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise GrpoError(f"{file}: not valid JSON ({error})") from None
            lists = isinstance(self._accepted, dict) and self._accepted.values()
            if lists is False or not all(isinstance(v, list) for v in lists):
                raise GrpoError(f"{file}: not lists of values by field; delete it")
        file = self.workdir / "config.json"
        if not file.exists():
            return self._accepted, True
        before, now = flatten(read_config(self.workdir)), flatten(self.config)
        changed = dict(_changes(before, now))
        if changed and not self.accept_changes:
            raise GrpoError(
                f"{file}: this run was started with another config ({_shown(changed)})"
                "; take another --workdir, or add --accept_changes"
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
        if self._accepted and processes.first():
            text = json.dumps(self._accepted, indent=2, ensure_ascii=False)
            write_whole(self.workdir / "accepted.json", text + "\n")


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(field, (before, now)) of what both have and may not change."""
    for name, value in now.items():
        if name in before and before[name] != value and not is_harmless(name):
            yield name, (before[name], value)


def _matters(stage: str, name: str) -> bool:
    if is_harmless(name) or name == "name":
        return False
    return stage != "sft" or name.startswith(_SFT)


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = ", ".join(f"{k} {a!r} → {b!r}" for k, (a, b) in list(changed.items())[:8])
    return shown + (", …" if len(changed) > 8 else "")
