"""The census of a run's questions, before RL starts from π_sft.

`run_census` samples outputs of the questions of `data.train`, and writes to the folder
`census` of the work directory: the completions, from which a stopped census goes on;
census.json with the figures; and teaching.jsonl with the questions that were sometimes
right, a file that `data.train` takes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config, tool_generations
from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError
from grpo_jax.evaluation.census import count_outcomes, give_advice, summarize_counts
from grpo_jax.evaluation.completion_files import completions_file_name
from grpo_jax.evaluation.generate_answers import PromptedSet, answer_all
from grpo_jax.files import to_json, write_json, write_whole
from grpo_jax.models.decoder import Params
from grpo_jax.report.tables import Column, Table, to_markdown
from grpo_jax.training.run import Run
from grpo_jax.training.run_comparison import settings_of

FOLDER, TEACHING = "census", "teaching.jsonl"


def census_sets(run: Run) -> dict[str, PromptedSet]:
    """Returns the questions of each set of `data.train` that a census asks.

    They are `census_questions` of each set, drawn with the run's seed.

    Raises:
      GrpoError: a set cannot be read, or all its questions are too long.
    """
    config, found = run.config, {}
    for name in datasets.split_names(config.data.train):
        rows = datasets.load_dataset(
            name, "train", data_dir=config.data.dir or None, require=("answer",)
        )
        rng = np.random.default_rng([config.seed, len(rows)])
        order = rng.permutation(len(rows))[: config.census_questions or None]
        examples = [rows[int(i)] for i in sorted(order)]
        kept, _ = encode_prompts(
            run.tokenizer,
            examples,
            limit=config.data.max_prompt_tokens,
            **run.prompt_options,
        )
        if not kept:
            raise GrpoError(
                f"data {name!r}: all questions are longer than data.max_prompt_tokens "
                f"{config.data.max_prompt_tokens}; raise it"
            )
        prompted = PromptedSet(name, [e for e, _ in kept], [ids for _, ids in kept])
        processes.check_equal(f"census of {name}", {"prompts": prompted.digest()})
        found[name] = prompted
    return found


def run_census(run: Run, params: Params, folder: Path) -> list[Example]:
    """Takes the census, writes its files, and prints its table.

    Args:
      run: the run.
      params: the model that RL starts from.
      folder: where the files are written.

    Returns:
      The questions that were right in some outputs and wrong in others.

    Raises:
      GrpoError: a set cannot be used, or the run has tools.
      Preempted: it was asked to stop; the same command resumes.
    """
    config = run.config
    check_census(config)
    settings = dataclasses.replace(
        settings_of(config),
        samples=config.census_samples,
        temperature=config.temperature,
    )
    figures: dict[str, Any] = {}
    teaching: list[Example] = []
    for name, prompted in census_sets(run).items():
        found = answer_all(
            run.model,
            params,
            run.tokenizer,
            prompted,
            settings,
            kind="sampled",
            label=f"census of {name}",
            file=folder / completions_file_name(name, settings.mode, "sampled"),
            restart=True,
        )
        rows = [row for row in found if row is not None]
        prompts = [ids for ids in prompted.prompts if ids is not None]
        counts = count_outcomes(run.tokenizer, prompted.examples, prompts, rows)
        figures[name] = summarize_counts(counts, config.group_size)
        teaching += [
            prompted.examples[i] for i in np.flatnonzero(counts.teaches).tolist()
        ]
    advice = give_advice(figures, config.max_new_tokens)
    if processes.is_first_process():
        about = {"samples": config.census_samples, "group_size": config.group_size}
        write_json(folder / "census.json", about | {"sets": figures, "advice": advice})
        lines = [to_json(example_as_row(example)) for example in teaching]
        write_whole(folder / TEACHING, b"".join(lines))
    count = sum(rows[0]["questions"] for rows in figures.values())
    advice.append(
        f"{len(teaching)} of {count} questions teach; they are in {folder / TEACHING}, "
        "which data.train takes"
    )
    listed = "\n".join(f"- {line}" for line in advice)
    processes.print_once(f"\n{to_markdown(census_table(figures))}\n\n{listed}\n")
    return teaching


def check_census(config: Config) -> None:
    """Checks that a census of the config's questions is possible.

    Raises:
      GrpoError: the run has tools.
    """
    if tool_generations(config):
        raise GrpoError("census: outputs with tools are not supported; set it to false")


def census_table(figures: dict[str, list[dict[str, Any]]]) -> Table:
    """Returns a row for each set, and for each class of prompt length in it."""
    names = (
        *("set", "prompt tokens", "questions", "never right", "sometimes", "always"),
        *("groups that teach", "cut off", "answer found", "tokens (9 in 10)"),
    )
    rows = []
    for name, (all_of_it, *classes) in figures.items():
        for row in (all_of_it, *classes):
            low, high = row["prompt_tokens"]
            parts = "never", "sometimes", "always", "teaches", "cut_off", "answered"
            rows.append(
                [
                    name if row is all_of_it else "",
                    f"{low}–{high}",
                    str(row["questions"]),
                    *(f"{100 * row[part]:.1f} %" for part in parts),
                    f"{row['tokens']:.0f} ({row['tokens_90']:.0f})",
                ]
            )
    return Table([Column(name) for name in names], rows)


def example_as_row(example: Example) -> dict[str, Any]:
    """Returns a question as a line of a file that `data.train` takes."""
    values = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    columns = dict(values.pop("columns"))
    if "messages" in columns:  # the turns before the question
        turn = {"role": "user", "content": values.pop("question")}
        columns["messages"] = [*columns["messages"], turn]
    return {name: x for name, x in values.items() if x} | columns
