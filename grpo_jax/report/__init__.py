"""report.html of a work directory: one file, for any browser, without a network.

    python -m grpo_jax.report WORKDIR

In: config.json, results.json, metrics.jsonl and samples.jsonl, those that are there.
Out: the comparison, the curves, and completions token by token: what each token was
taught and how far the policy has moved on it, the failures first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grpo_jax.files import write_whole
from grpo_jax.report import run_files
from grpo_jax.report.page import page
from grpo_jax.report.sample_groups import show_groups

GROUPS = 60


def write(workdir: str | os.PathLike[str]) -> Path:
    """Writes report.html into a work directory anew; returns its path."""
    folder = Path(workdir)
    config = run_files.read_object(folder / "config.json")
    results = run_files.read_object(folder / "results.json")
    html = page(
        folder.resolve().name,
        config,
        results,
        run_files.read_curves(folder / "metrics.jsonl"),
        show_groups(run_files.read_groups(folder / "samples.jsonl", GROUPS)),
    )
    file = folder / "report.html"
    write_whole(file, html, errors="replace")
    return file


def update(workdir: str | os.PathLike[str]) -> None:
    """`write` in a run, which no fault of it may end: that is one printed line."""
    try:
        write(workdir)
    except Exception as error:
        what = " ".join(str(error).split())
        print(
            f"report.html: not written ({type(error).__name__}: {what})",
            file=sys.stderr,
        )
