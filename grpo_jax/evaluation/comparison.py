"""Measures models on sets of questions, to compare them.

    questions → prompts → completions, kept on disk → scores → tables

`generate_answers.py` asks the model, `completion_files.py` keeps what it answers, and
`metrics.py` scores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.evaluation import completion_files, generate_answers, metrics
from grpo_jax.evaluation.completion_files import KINDS
from grpo_jax.evaluation.generate_answers import AnswerSettings
from grpo_jax.evaluation.metrics import Score
from grpo_jax.models.decoder import Decoder, Params

Result = dict[str, Any]
Scores = dict[tuple[str, str], dict[str, Score]]  # (set, measure) → model → score


@dataclass(frozen=True)
class Measured:
    """The scores of one model on one set, by measure ("greedy", "tool_sampled", …)."""

    n: int  # questions
    by_measure: Mapping[str, Score]

    @property
    def result(self) -> Result:
        """The figures as results.json holds them."""
        return {"n": self.n} | {m: s.result for m, s in self.by_measure.items()}


def measure_set(
    model: Decoder,
    params: Params,
    tokenizer: Tokenizer,
    name: str,
    settings: AnswerSettings,
    *,
    sampled: bool = True,
    label: str = "",
    folder: Path | None = None,
    restart: bool = False,
) -> Measured:
    """Measures greedy accuracy, and accuracy, pass@k and maj@k of samples.

    Args:
      model: the decoder.
      params: its parameters.
      tokenizer: the model's.
      name: the set's name.
      settings: how the set is asked and answered.
      sampled: also measure `settings.samples` samples a question.
      label: what the progress bar shows.
      folder: where completions are kept and found again; None keeps none.
      restart: replace completions of other settings or weights, instead of raising.

    Raises:
      GrpoError: the set cannot be read, or the folder has completions of other
        settings or weights.
    """
    prompted = generate_answers.load_prompts(tokenizer, name, settings)
    found = {}
    for kind in KINDS[: 2 if sampled and settings.samples else 1]:
        key = measure_name(settings.mode, kind)
        file = folder and folder / completion_files.completions_file_name(
            name, settings.mode, kind
        )
        answered = generate_answers.answer_all(
            model,
            params,
            tokenizer,
            prompted,
            settings,
            kind=kind,
            label=f"{label} {name} {key}".strip(),
            file=file,
            restart=restart,
        )
        found[key] = metrics.score_completions(
            prompted.examples,
            answered,
            temperature=0.0 if kind == "greedy" else settings.temperature,
            grader=settings.grader,
            programs=settings.mode == "tool",
        )
    return Measured(len(prompted.examples), found)


def measure_name(mode: str, kind: str) -> str:
    """Returns a measure's name: "greedy" for chain of thought, "tool_greedy", …."""
    return kind if mode == "cot" else f"{mode}_{kind}"


def add_scores(found: Scores, name: str, model: str, measured: Measured) -> None:
    """Adds a model's scores on a set to those that were found before."""
    for key, score in measured.by_measure.items():
        found.setdefault((name, key), {})[model] = score
