"""The evaluation command: models answer sets of questions and are compared.

    python -m grpo_jax.evaluate --models A [B …] --sets gsm8k math cmath --out DIR

A model is a work directory of train.py, a Hugging Face folder or hub name, or a .jsonl
file of completions made elsewhere (`evaluation/completion_files.py`). DIR gets every
completion, and results.json, results.md and report.html with the comparison, paired
tests, and published figures, marked as such.

The same command resumes where it was stopped; no question is asked twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.arguments import PROCESS_FLAGS
from grpo_jax.checkpoints.huggingface.folders import agree_on_folder, find_folder
from grpo_jax.data import datasets, few_shot_prompts, registry
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError, Preempted, errors_as_one_line
from grpo_jax.evaluation import (
    completion_files,
    generate_answers,
    metrics,
    published_figures,
)
from grpo_jax.evaluation.comparison import (
    Measured,
    Result,
    Scores,
    add_scores,
    measure_name,
    measure_set,
)
from grpo_jax.evaluation.completion_files import Group, Key
from grpo_jax.evaluation.flags import parse_flags, without_repeats
from grpo_jax.evaluation.generate_answers import AnswerSettings
from grpo_jax.files import file_digest, write_json, write_whole
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.report import try_write_report
from grpo_jax.report.comparison import (
    comparison_remarks,
    comparison_tables,
    published_tables,
)
from grpo_jax.report.tables import to_markdown
from grpo_jax.training.run import load_run
from grpo_jax.training.run_comparison import trained_on
from grpo_jax.training.start_time import start_time
from grpo_jax.training.work_directory import read_config

# set → its questions and their completions, of a file
Given = dict[str, tuple[list[Example], dict[Key, Group]]]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with `arguments`, by default those of the process."""
    flags = parse_flags(arguments)
    *address, wait, heartbeat = (getattr(flags, name) for name in PROCESS_FLAGS)
    stopped = False
    with (
        errors_as_one_line(),
        processes.connect_processes(*address, wait=wait, heartbeat=heartbeat),
    ):
        try:
            run_with_messages(flags)
        except Preempted as error:
            stopped = True
            processes.print_once(f"{error}; the same command goes on from there")
    if stopped:
        sys.exit(143)  # the exit code of a process that SIGTERM ended


def run_with_messages(flags: argparse.Namespace) -> None:
    """Calls `run_command` and prints its report.

    Errors that a user can act on end the program with one line.
    """
    from grpo_jax.distributed.folder_lock import lock_folder
    from grpo_jax.train import set_up_process

    set_up_process()
    disk = (
        "what was answered before is kept. Make room there; the same command goes on "
        "from it"
    )
    memory = (
        "what was answered is kept, and belongs to these settings. Lower --batch "
        f"({flags.batch}) or --max_new_tokens ({flags.max_new_tokens}), with another "
        "--out, or use more devices"
    )
    try:
        with errors_as_one_line(flags.out, disk=disk, memory=memory):
            processes.check_equal("flags", flags_without(flags, PROCESS_FLAGS))
            with lock_folder(flags.out):
                report = run_command(flags)
                try:
                    processes.print_once(report)
                except BrokenPipeError:  # `| head` closed it; the report is on disk
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        stopped = "stopped; the same command goes on from here"
        if processes.process_count() > 1:  # its exit message reaches the others
            sys.exit(stopped)
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


def flags_without(flags: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Returns the flags as a dictionary, without the named ones."""
    return {name: value for name, value in vars(flags).items() if name not in names}


def run_command(flags: argparse.Namespace) -> str:
    """Measures every model on every set, and writes results and report.

    Returns:
      The Markdown of results.md.

    Raises:
      GrpoError: a model or a set cannot be used.
    """
    out = Path(flags.out)
    results: Result = {"models": model_labels(flags.models), "sets": {}}
    given = check_inputs(flags)
    others = ("models", "sets", "out", "data_dir", *PROCESS_FLAGS)
    results["settings"] = flags_without(flags, others)
    trained = trained_sets(flags.models)
    for name in flags.sets:
        row = results["sets"].setdefault(name, {})
        if not registry.is_file(name) or name in trained:
            row["in_domain"] = registry.is_in_domain(name, trained)
    modes = ["few_shot"] if flags.few_shot else flags.mode
    results["published"] = published_figures.figures_for_json(flags.sets, modes)
    found: Scores = {}
    for path, label in zip(flags.models, results["models"], strict=True):
        scores = score_file(path, given[path], flags) if path in given else None
        for name, measured in scores or evaluate_model(path, label, flags):
            row = results["sets"][name]
            row[label] = row.get(label, {}) | measured.result
            add_scores(found, name, label, measured)
            results["paired"] = metrics.compare_pairs(found)
            if processes.is_first_process():
                write_json(out / "results.json", results)
    published = published_tables(flags.sets, modes).items()
    report = "\n\n".join(
        part
        for part in (
            *map(to_markdown, comparison_tables(results)),
            "\n".join(f"- {remark}" for remark in comparison_remarks(results)),
            *(f"{title}:\n\n{to_markdown(table)}" for title, table in published),
        )
        if part
    )
    if processes.is_first_process():
        write_whole(out / "results.md", report + "\n")
        try_write_report(out)
    return report


def model_labels(models: list[str]) -> list[str]:
    """Returns short names of the models: the last parts of their paths, if unique.

    Raises:
      GrpoError: a model is named twice.

    >>> model_labels(["runs/a", "hub/b"]), model_labels(["1/a", "2/a"])
    (['a', 'b'], ['1/a', '2/a'])
    """
    if len(set(models)) < len(models):
        raise GrpoError("--models: the same model twice; a comparison needs two")
    short = [Path(m).name.removesuffix(".jsonl") or m for m in models]
    reserved = "in_domain" in short  # a key beside the models' in results.json
    return short if len(set(short)) == len(short) and not reserved else models


def check_inputs(flags: argparse.Namespace) -> dict[str, Given]:
    """Checks all sets and models before the first one is loaded.

    Returns:
      The completions of each file of them.

    Raises:
      GrpoError: one of them cannot be used, which would else show hours later.
    """
    every, given = {}, {}
    for name in flags.sets:
        rows = datasets.load_dataset(
            name, "test", data_dir=flags.data_dir, require=("answer",)
        )
        every[name] = list(rows)
        processes.check_equal(f"set {name}", {"rows": rows.digest})
        if flags.few_shot:
            few_shot_prompts.add_few_shot_prompt(
                name, Example("?"), data_dir=flags.data_dir
            )
    for path in flags.models:
        if path.endswith(".jsonl"):
            if not Path(path).is_file():
                raise GrpoError(f"--models: {path}: no such file of completions")
            read = completion_files.read_completions(
                Path(path), every, questions=flags.questions
            )
            given[path] = {name: (every[name], read[name]) for name in read}
            processes.check_equal(path, {"completions": file_digest(path)})
            continue
        if is_workdir(path):
            read_config(Path(path))
        else:
            find_folder(path, only="config.json")
            agree_on_folder(path)
        for mode in flags.mode:
            generate_answers.find_mode(AnswerSettings(mode=mode))
    return given


def trained_sets(models: list[str]) -> list[str]:
    """Returns the sets that count as in-domain.

    They are those of the first work directory's RL stage, else the paper's.
    """
    for path in models:
        if is_workdir(path):
            return trained_on(read_config(Path(path)))
    return list(registry.PAPER)


def is_workdir(path: str) -> bool:
    """Returns whether a model of --models is the work directory of a run."""
    return (Path(path) / "checkpoints").is_dir()


def score_file(
    path: str, given: Given, flags: argparse.Namespace
) -> Iterator[tuple[str, Measured]]:
    """Yields (set, its scores) of a file of completions, in the modes of the flags.

    Raises:
      GrpoError: the file has none of the modes.
    """
    for name, (examples, groups) in given.items():
        examples = examples[: flags.questions or None]
        found = {
            measure_name(mode, kind): metrics.score_completions(
                examples,
                group.completions,
                temperature=group.temperature,
                grader=flags.grader,
                programs=mode == "tool",
            )
            for (mode, kind), group in groups.items()
            if mode in flags.mode
        }
        if not found:
            has = ", ".join(without_repeats([mode for mode, _ in groups]))
            raise GrpoError(f"{path}: set {name}: only {has} completions; add --mode")
        yield name, Measured(len(examples), found)


def evaluate_model(
    path: str, label: str, flags: argparse.Namespace
) -> Iterator[tuple[str, Measured]]:
    """Yields (set, its scores) while a model answers every set in every mode."""
    model, params, tokenizer, template, instruction = load_model(path)
    if not is_workdir(path):
        tokenizer.now = start_time(Path(flags.out), keep=True)
    folder = Path(flags.out, "completions", re.sub(r"[^A-Za-z0-9_.+-]+", "_", label))
    fields = {field.name for field in dataclasses.fields(AnswerSettings)}
    given = {name: value for name, value in vars(flags).items() if name in fields}
    given["template"] = flags.template or template
    pairs = list(itertools.product(flags.sets, flags.mode))
    for place, (name, mode) in enumerate(pairs, 1):
        usual = mode if instruction != "none" else "none"
        given |= {"mode": mode, "instruction": flags.instruction or usual}
        measured = measure_set(
            model,
            params,
            tokenizer,
            name,
            AnswerSettings(**given),
            label=f"{label} [{place}/{len(pairs)}]",
            folder=folder,
        )
        yield name, measured


def load_model(path: str) -> tuple[Decoder, Params, Tokenizer, str, str]:
    """Loads a model.

    Returns:
      (decoder, parameters, tokenizer, template, instruction), with the template and
      instruction that the model was trained on.
    """
    if is_workdir(path):
        model, params, tokenizer = load_run(path)
        data = read_config(Path(path)).data
        return model, params, tokenizer, data.template, data.instruction
    from grpo_jax.checkpoints.huggingface import weights
    from grpo_jax.distributed import sharding

    mesh = sharding.make_mesh(fsdp=-1)
    model, params = weights.load_pretrained(path, mesh=mesh)
    tokenizer = Tokenizer.from_folder(weights.find_folder(path, None))
    template = "chat" if tokenizer.chat_template else "deepseekmath"
    return model, params, tokenizer, template, "cot"


if __name__ == "__main__":
    main()
