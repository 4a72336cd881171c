"""The flags of `python -m grpo_jax.evaluate`."""

from __future__ import annotations

import argparse

from grpo_jax.config_fields import COUNT, LONGEST, ROWS, TOKENS
from grpo_jax.data import registry

# The smallest and largest values of numeric flags, as of the fields of a config.
BOUNDS: dict[str, tuple[float, float]] = {
    "questions": (0, COUNT),
    "samples": (0, ROWS),
    "temperature": (0.01, 100),
    "generations": (1, 1000),
    "max_new_tokens": (1, TOKENS),
    "max_prompt_tokens": (1, TOKENS),
    "batch": (1, ROWS),
    "seed": (0, 2**32 - 1),
    "num_processes": (1, ROWS),
    "process_id": (0, ROWS),
    "wait": (1, LONGEST),
    "heartbeat": (1, LONGEST),
}

# Flags that tell the processes apart; they have no effect on the results.
PROCESSES = ("coordinator", "num_processes", "process_id", "wait", "heartbeat")


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the command's flags, checked; mistakes end the program."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.evaluate",
        description="Evaluates models on sets of questions and compares them. The same "
        "command again goes on where it was stopped.",
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        help="work directories, Hugging Face folders or names, .jsonl of completions",
    )
    known = " ".join(dict.fromkeys(name for name, _ in registry.SOURCES))
    add("--sets", nargs="+", required=True, help=f"{known}, sums/… or .jsonl files")
    add("--out", required=True, help="the folder for completions and results")
    add("--questions", type=int, default=0, help="of each set, the first ones (all)")
    add("--samples", type=int, default=0, help="a question, for pass@k and maj@k (0)")
    add("--temperature", type=float, default=1.0, help="of the samples (1.0)")
    add(
        "--mode",
        nargs="+",
        choices=["cot", "tool"],
        default=["cot"],
        help="chain of thought, or reasoning with programs (cot)",
    )
    add("--generations", type=int, default=2, help="with tool, programs between (2)")
    add(
        "--grader",
        choices=["strict", "paper"],
        default="strict",
        help="paper: also by DeepSeekMath's lenient rule, beside the strict one",
    )
    add("--few-shot", action="store_true", help="worked examples, for base models")
    add("--max-new-tokens", type=int, default=1024, help="of a completion (1024)")
    add("--max-prompt-tokens", type=int, default=2048, help="longer ones count wrong")
    add("--batch", type=int, default=64, help="completions decoded at a time (64)")
    add("--template", choices=["chat", "deepseekmath", "plain"], help="of the prompt")
    add("--instruction", choices=["cot", "tool", "none"], help="after the question")
    add("--data-dir", help="where the sets' original files lie ($GRPO_JAX_DATA)")
    add("--seed", type=int, default=0, help="of the samples (0)")
    add("--coordinator", help="host:port of process 0, where no cluster says it")
    add("--num_processes", type=int, help="how many processes there are")
    add("--process_id", type=int, help="which of them this is, from 0")
    add("--wait", type=int, default=300, help="seconds for all to come (300)")
    add("--heartbeat", type=int, default=100, help="seconds until one is lost (100)")
    flags = parser.parse_args(arguments)
    for name, (least, most) in BOUNDS.items():
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:  # NaN is neither
            flag = f"--{name.replace('_', '-') if name not in PROCESSES else name}"
            parser.error(f"{flag} {value} is not between {least:,} and {most:,}")
    if flags.few_shot and (flags.template or flags.instruction):
        parser.error("--few-shot has no --template and no --instruction")
    if flags.few_shot and flags.mode != ["cot"]:
        parser.error("--few-shot goes with --mode cot alone")
    flags.mode, flags.sets = list(dict.fromkeys(flags.mode)), unique(flags.sets)
    return flags


def unique(names: list[str]) -> list[str]:
    """Returns the names without repetitions, in order."""
    return list(dict.fromkeys(names))
