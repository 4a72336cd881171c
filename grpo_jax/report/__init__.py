"""Writes report.html of a work directory: one file, for any browser, without a network.

    python -m grpo_jax.report WORKDIR

It reads config.json, results.json, metrics.jsonl and samples.jsonl, those that exist,
and shows the comparison, the curves, and completions token by token: each token's
advantage and how far the policy has moved on it, failures first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grpo_jax.files import write_whole
from grpo_jax.report import run_files
from grpo_jax.report.page import render_page
from grpo_jax.report.sample_groups import prepare_sample_groups

MAX_GROUPS = 60


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes report.html into a work directory, or replaces it; returns its path."""
    folder = Path(workdir)
    groups = run_files.read_sample_groups(folder / "samples.jsonl", MAX_GROUPS)
    html = render_page(
        folder.resolve().name,
        config=run_files.read_json_object(folder / "config.json"),
        results=run_files.read_json_object(folder / "results.json"),
        stages=run_files.read_metric_curves(folder / "metrics.jsonl"),
        findings=run_files.read_findings(folder / "metrics.jsonl"),
        groups=prepare_sample_groups(groups),
    )
    file = folder / "report.html"
    write_whole(file, html, errors="replace")
    return file


def try_write_report(workdir: str | os.PathLike[str]) -> None:
    """Writes report.html; an error is printed as one line and does not end the run."""
    try:
        write_report(workdir)
    except Exception as error:
        what = " ".join(str(error).split())
        print(
            f"report.html: not written ({type(error).__name__}: {what})",
            file=sys.stderr,
        )
