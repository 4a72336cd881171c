"""Reads what a run has written into its work directory.

The run may be done, under way or dead: what is missing, cut off or damaged is left out,
and nothing raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.report.safe_text import finite_number

Curve = tuple[list[float], list[float]]  # steps, values
LARGEST_VALUE = 1e30  # of a curve; a diverged run goes beyond


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the file's JSON object; {} if there is none."""
    try:
        return _parse_object(file.read_bytes())
    except OSError:
        return {}


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metric_curves(file: Path) -> dict[str, dict[str, Curve]]:
    """metrics.jsonl as stage → metric → (steps, values), in the order of the file."""
    stages: dict[str, dict[str, Curve]] = {}
    for line in _lines(file):
        row = _parse_object(line)
        stage, step = row.pop("stage", None), finite_number(row.pop("step", None))
        if not isinstance(stage, str) or step is None or abs(step) > LARGEST_VALUE:
            continue
        curves = stages.setdefault(stage, {})
        for name, value in row.items():
            if (y := finite_number(value)) is not None and abs(y) < LARGEST_VALUE:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(y)
    return stages


def read_findings(file: Path) -> list[str]:
    """Returns the findings of `training/diagnosis.py`, with stage and step."""
    rows = [_parse_object(line) for line in _lines(file)]
    return [
        f"{row.get('stage')} step {row.get('step')}: {row['diagnosis']}"
        for row in rows
        if isinstance(row.get("diagnosis"), str)
    ]


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as lines:
            yield from lines
    except OSError:
        return


def read_sample_groups(file: Path, max_groups: int) -> list[dict[str, Any]]:
    """Returns groups of samples.jsonl, evenly spread over the file, with the last one.

    Args:
      file: samples.jsonl; it may be missing.
      max_groups: how many groups to return at most; at least 2.

    Returns:
      The objects of the lines that have a list of completions.
    """
    last = sum(line.endswith(b"\n") for line in _lines(file)) - 1
    places = {last * i // (max_groups - 1) for i in range(max_groups)}
    lines = (line for i, line in enumerate(_lines(file)) if i in places)
    groups = map(_parse_object, lines)
    return [g for g in groups if isinstance(g.get("completions"), list)]
