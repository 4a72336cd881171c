"""The flags of `python -m grpo_jax.evaluate`."""

from __future__ import annotations

import argparse

from grpo_jax.arguments import PROCESS_FLAGS, ArgumentParser
from grpo_jax.config_fields import COUNT, ROWS, TOKENS
from grpo_jax.data import registry

# Flag → (default, least, most, help); the bounds are those of the config's fields.
NUMBERS = {
    "questions": (0, 0, COUNT, "of each set, the first ones; 0 is all"),
    "samples": (0, 0, ROWS, "a question, for pass@k and maj@k"),
    "temperature": (1.0, 0.01, 100, "of the samples"),
    "generations": (2, 1, 1000, "of an answer by programs, which run in between"),
    "max_new_tokens": (1024, 1, TOKENS, "of a completion"),
    "max_prompt_tokens": (2048, 1, TOKENS, "longer ones count as wrong"),
    "batch": (64, 1, ROWS, "completions decoded at a time"),
    "seed": (0, 0, 2**32 - 1, "of the samples"),
}
CHOICES = {
    "grader": (
        ("strict", "paper"),
        "paper: also by DeepSeekMath's lenient rule, beside the strict one",
    ),
    "template": ((None, "chat", "deepseekmath", "plain"), "of the prompt"),
    "instruction": ((None, "cot", "tool", "none"), "after the question"),
}


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the command's flags, checked; mistakes end the program.

    Args:
      arguments: the flags, or None for those of the process.
    """
    parser = ArgumentParser(
        prog="python -m grpo_jax.evaluate",
        usage="python -m grpo_jax.evaluate --models A [B …] --sets SET [SET …] "
        "--out DIR [flags]",
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
    add(
        "--mode",
        nargs="+",
        choices=["cot", "tool"],
        help="chain of thought, or reasoning with programs (cot)",
    )
    add("--few_shot", action="store_true", help="worked examples, for base models")
    add("--data_dir", help="where the sets' original files lie ($GRPO_JAX_DATA)")
    for name, (choices, text) in CHOICES.items():
        known = [choice for choice in choices if choice]
        add(f"--{name}", choices=known, default=choices[0], help=text)
    numbers = NUMBERS | PROCESS_FLAGS
    text_only = numbers.pop("coordinator")
    add("--coordinator", help=text_only[-1])
    for name, (default, *_, text) in numbers.items():
        kind = float if isinstance(default, float) else int
        add(f"--{name}", type=kind, default=default, help=text)
    flags = parser.parse_args(arguments)
    flags.mode = without_repeats(flags.mode or ["cot"])
    flags.sets = without_repeats(flags.sets)
    for name, (_, least, most, _) in numbers.items():
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:  # NaN is neither
            parser.error(f"--{name} {value} is not between {least:,} and {most:,}")
    if flags.few_shot and (flags.template or flags.instruction):
        parser.error("--few_shot has no --template and no --instruction")
    if flags.few_shot and flags.mode != ["cot"]:
        parser.error("--few_shot goes with --mode cot alone")
    return flags


def without_repeats(names: list[str]) -> list[str]:
    """Returns the names without repetitions, in order."""
    return list(dict.fromkeys(names))
