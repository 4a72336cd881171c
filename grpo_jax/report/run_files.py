"""What a work directory holds, as far as it can be read.

In: a work directory, of a run that is done, goes on or died. Out: plain values; what is
missing, cut off or damaged is left out and never raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.report.safe_text import number

Curve = tuple[list[float], list[float]]  # steps, values
MOST = 1e30  # what is drawn of a diverged run
WHOLE = 8_000_000  # bytes of samples that are read through


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        return _object(file.read_bytes())
    except OSError:
        return {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_curves(file: Path) -> dict[str, dict[str, Curve]]:
    """metrics.jsonl as stage → metric → (steps, values), in the order of the file."""
    stages: dict[str, dict[str, Curve]] = {}
    for line in _lines(file):
        row = _object(line)
        stage, step = row.pop("stage", None), number(row.pop("step", None))
        if not isinstance(stage, str) or step is None or abs(step) > MOST:
            continue
        curves = stages.setdefault(stage, {})
        for name, value in row.items():
            if (y := number(value)) is not None and abs(y) < MOST:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(y)
    return stages


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as lines:
            yield from lines
    except OSError:
        return


def read_groups(file: Path, most: int) -> list[dict[str, Any]]:
    """At most so many groups of samples.jsonl, from all of it, the last one among them.

    Of a large file only those are read.
    """
    try:
        size = file.stat().st_size
    except OSError:
        return []
    if size <= WHOLE:
        lines = list(_lines(file))
        n = len(lines)
        if n > most:
            lines = [lines[(n - 1) * i // (most - 1)] for i in range(most)]
    else:
        lines = list(_spread(file, size, most))
    groups = map(_object, lines)
    return [g for g in groups if isinstance(g.get("completions"), list)]


def _spread(file: Path, size: int, most: int) -> Iterator[bytes]:
    """Lines that follow evenly spaced places of a file, and its last whole one."""
    with open(file, "rb") as lines:
        found = -1
        for i in range(most - 1):
            lines.seek(size * i // (most - 1))
            if i:
                lines.readline()
            if lines.tell() > found:
                found = lines.tell()
                yield lines.readline()
        last = b""
        for line in lines:
            last = line if line.endswith(b"\n") else last
        if last:
            yield last
