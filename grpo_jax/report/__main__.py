"""python -m grpo_jax.report WORKDIR …: writes report.html, also of a run under way."""

from __future__ import annotations

import sys
from pathlib import Path

from grpo_jax.arguments import ArgumentParser
from grpo_jax.report import write_report

FILES = ("config.json", "metrics.jsonl", "results.json", "samples.jsonl")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; a mistake ends it with one line."""
    parser = ArgumentParser(
        prog="python -m grpo_jax.report",
        description="Writes report.html into work directories.",
    )
    parser.add_argument("workdir", nargs="+")
    for workdir in parser.parse_args(arguments).workdir:
        if not any((Path(workdir) / name).is_file() for name in FILES):
            sys.exit(
                f"error: {workdir}: no work directory (none of {', '.join(FILES)})"
            )
        try:
            print(write_report(workdir))
        except OSError as error:
            sys.exit(f"error: {workdir}: {error.strerror}")


if __name__ == "__main__":
    main()
