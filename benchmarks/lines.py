"""What the benchmark commands share: flags, lines of figures, another interpreter."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # grpo_jax, beside it


def show(**figures: Any) -> dict[str, Any]:
    """Prints the figures as one line, numbers to five digits; returns what it says."""
    rounded = {
        k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()
    }
    print(json.dumps(rounded), flush=True)
    return rounded


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of a file's docstring."""
    return argparse.ArgumentParser(description=(description or "").partition("\n")[0])


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for a model and the questions that it gets."""
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder")
    add("--prompts", required=True, help="JSON lines with a question each")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the packed rows of an update."""
    add = parser.add_argument
    add("--row-length", dest="length", type=int, default=2048, help="of a row at most")
    add("--rows", type=int, default=1, help="packed rows in memory at a time")
    insides = {"action": "store_false", "help": "keep all layers' insides"}
    add("--no-remat", dest="remat", **insides)


def read_questions(file: str) -> list[str]:
    """The questions of a file of JSON lines."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines if line.strip()]


def start_interpreter(
    python: str, program: str, *arguments: str
) -> Callable[[Any], dict[str, Any]]:
    """Starts a program in another interpreter, to be asked in turn with this one.

    Returns:
      A function that sends a value as a line of JSON, and returns the object in the
      next line of output that begins with LINE.
    """
    pipe = subprocess.PIPE
    command = [python, "-c", program, *arguments]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin and process.stdout
    sent, lines = process.stdin, process.stdout

    def ask(value: Any) -> dict[str, Any]:
        print(json.dumps(value), file=sent, flush=True)
        line = next((line for line in lines if line.startswith("LINE")), None)
        if line is None:
            sys.exit(f"error: {python} ended; see above")
        return json.loads(line.removeprefix("LINE"))

    return ask
