"""Models on sets: one measured, and the comparison at the end of a run.

In: models with their parameters, and the names of sets. Out: scores, and for a run
results.json in its work directory, with every completion beside it.

    questions ─ prompts ─ completions, kept on disk ─ scores ─ tables
    data, shots  asking    completions                 scores   tables, published
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, generations, set_names
from grpo_jax.data import registry
from grpo_jax.data.datasets import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.distributed import processes
from grpo_jax.evaluation import completion_files, generate_answers, metrics
from grpo_jax.evaluation.completion_files import KINDS, Completion
from grpo_jax.evaluation.generate_answers import Settings
from grpo_jax.evaluation.metrics import Score
from grpo_jax.files import write_whole
from grpo_jax.models.decoder import Decoder, Params
from grpo_jax.training.run import Run

Result = dict[str, Any]
Scores = dict[tuple[str, str], dict[str, Score]]  # (set, measure) → model → score


@dataclass(frozen=True)
class Measured:
    """One model on one set: by measure, such as greedy or tool_sampled."""

    n: int  # questions
    by_measure: Mapping[str, Score]

    @property
    def result(self) -> Result:
        return {"n": self.n} | {m: s.result for m, s in self.by_measure.items()}


def measure(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    name: str,
    settings: Settings,
    *,
    sampled: bool = True,
    label: str = "",
    folder: Path | None = None,
    restart: bool = False,
) -> Measured:
    """Greedy accuracy; with samples also accuracy, pass@k, maj@k at a temperature.

    folder: where the completions are kept, and found again. `restart`: those that
    were made with other settings, or weights, are replaced instead of refused.
    """
    asked = generate_answers.load_prompts(tokenizer, name, settings)
    found = {}
    for kind in KINDS[: 2 if sampled and settings.samples else 1]:
        file = folder and folder / completion_files.file_name(name, settings.mode, kind)
        answered = generate_answers.answer_all(
            model,
            params,
            tokenizer,
            asked,
            settings,
            kind=kind,
            label=f"{label} {name} {measure_name(settings.mode, kind)}".strip(),
            file=file,
            restart=restart,
        )
        key = measure_name(settings.mode, kind)
        found[key] = grade(
            asked.examples,
            answered,
            settings.mode,
            settings.grader,
            0.0 if kind == "greedy" else settings.temperature,
        )
    return Measured(len(asked.examples), found)


def measure_name(mode: str, kind: str) -> str:
    return kind if mode == "cot" else f"{mode}_{kind}"


def grade(
    examples: Sequence[Example],
    answered: Sequence[Sequence[Completion] | None],
    mode: str,
    grader: str,
    temperature: float | None,
) -> Score:
    rules = ("strict",) if grader == "strict" else ("strict", grader)
    return metrics.score(
        examples,
        answered,
        temperature=temperature,
        rules=rules,
        programs=mode == "tool",
    )


# -- a run's own comparison ------------------------------------------------------------


def settings_of(config: Config) -> Settings:
    return Settings(
        template=config.data.template,
        instruction=config.data.instruction,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        questions=config.eval.questions,
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        batch=config.eval.batch,
        seed=config.seed,
        data_dir=config.data.dir or None,
        mode="tool" if generations(config) else "cot",
        generations=generations(config),
        tool_timeout=config.tools.timeout,
    )


def check_sets(run: Run) -> None:
    """Refuses before the training what the comparison would refuse after it."""
    generate_answers.find_mode(settings_of(run.config))
    for name in set_names(run.config):
        generate_answers.load_prompts(run.tokenizer, name, settings_of(run.config))


def evaluate_set(
    run: Run, params: Params, name: str, *, sampled: bool = True, label: str = ""
) -> Result:
    """One set of a run's comparison, of parameters that change: nothing is kept."""
    settings = settings_of(run.config)
    measured = measure(
        run.model, params, run.tokenizer, name, settings, sampled=sampled, label=label
    )
    return measured.result


def trained_on(config: Config) -> list[str]:
    return (config.data.in_domain or config.data.train).split("+")


def compare(run: Run, models: Mapping[str, Params]) -> Result:
    """The comparison of a run's models on all its sets; what is measured stays so.

    Completions are kept in the work directory, so that no question is asked again
    while weights and settings stay the same. results.json is written whole after every
    set; the sets that are still to come stand in it without figures.
    """
    run.recorder.begin()
    config, settings = run.config, settings_of(run.config)
    steps = {"instruct": config.sft_steps, "rl": config.rl_steps}
    results: Result = {
        "name": config.name,
        "seed": config.seed,
        "method": config.method,
        "steps": {name: steps[name] for name in models},
        "settings": settings.__dict__,
        "models": list(models),
        "sets": {
            name: {"in_domain": registry.in_domain(name, trained_on(config))}
            for name in set_names(config)
        },
    }
    found: Scores = {}
    for name, row in results["sets"].items():
        for model, params in models.items():
            measured = measure(
                run.model,
                params,
                run.tokenizer,
                name,
                settings,
                label=model,
                folder=run.workdir / "completions" / model,
                restart=True,
            )
            row[model] = measured.result
            add(found, name, model, measured)
        results["paired"] = metrics.pairs(found)
        write_json(run.workdir / "results.json", results)
    return results


def add(found: Scores, name: str, model: str, measured: Measured) -> None:
    for key, score in measured.by_measure.items():
        found.setdefault((name, key), {})[model] = score


def write_json(file: Path, value: Any) -> None:
    if processes.first():
        write_whole(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
