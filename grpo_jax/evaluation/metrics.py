"""Scores completions: accuracy, pass@k and maj@k; and compares two models.

All intervals are 95 %. The interval of an accuracy is Wilson's if there is one
completion a question. With several, and for pass@k and maj@k, it is the bootstrap's
over questions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.data.example import Example
from grpo_jax.distributed import processes
from grpo_jax.evaluation import statistics
from grpo_jax.evaluation.completion_files import Completion
from grpo_jax.rewards import answers
from grpo_jax.rewards.grading import equality, kinds
from grpo_jax.rewards.grading.expressions import Unreadable, evaluate_rational
from grpo_jax.rewards.grading.notation import normalize_notation

Result = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """The score of one model on one set, in one mode at one temperature."""

    result: Result  # the figures, as results.json holds them
    right: np.ndarray  # [questions, samples], 0 or 1


def score_completions(
    examples: Sequence[Example],
    completions: Sequence[Sequence[Completion] | None],
    *,
    temperature: float | None = None,
    grader: str = "strict",
    programs: bool = False,
) -> Score:
    """Grades every completion of a set.

    Args:
      examples: the questions with their references.
      completions: those of each question; None if it was too long, which is wrong.
      temperature: at which they were sampled, for the result; None if not known.
      grader: "strict", or "paper" for DeepSeekMath's lenient rule beside it.
      programs: also report the accuracy of the last ```output block, as is usual for
        tool-integrated reasoning.

    >>> two = [Example("1+1", "2"), Example("1+2", "3")]
    >>> found = score_completions(two, [[Completion("It is 2.")]] * 2)
    >>> found.result["accuracy"], found.right.tolist()
    (0.5, [[1.0], [0.0]])
    """
    samples = max((len(row) for row in completions if row is not None), default=1)
    flat = [example for example in examples for _ in range(samples)]
    texts = [
        c.text if c else None for row in completions for c in row or [None] * samples
    ]
    shape = len(examples), samples

    def graded(rule: str, output: bool = False) -> tuple[list[str | None], np.ndarray]:
        def extract(text: str | None, example: Example) -> str | None:
            if text is None:
                return None
            if output:
                return answers.printed_answer(text)
            return kinds.extract_prediction(text, example, rule)

        def grade(places: Sequence[int]) -> list[tuple[str | None, bool]]:
            given = [extract(texts[place], flat[place]) for place in places]
            right = kinds.grade_examples([flat[place] for place in places], given, rule)
            return list(zip(given, right, strict=True))

        pairs = processes.map_divided(grade, range(len(flat)))
        right = np.array([same for _, same in pairs], float).reshape(shape)
        return [given for given, _ in pairs], right

    given, right = graded("strict")
    result: Result = _accuracy(right) | {"temperature": temperature}
    result["too_long"] = sum(row is None for row in completions)
    cut = [c.cut_off for row in completions for c in row or ()]
    if cut and None not in cut:
        result["cut_off"] = sum(map(bool, cut)) / len(cut)
    if grader != "strict":
        result[grader] = _accuracy(graded(grader)[1])
    if programs:
        result["program"] = _accuracy(graded("strict", True)[1])
    if samples > 1:
        result["samples"] = samples
        result |= _at_k(assign_votes(examples, given, right), right)
    return Score(result, right)


def _accuracy(right: np.ndarray) -> Result:
    accuracy, (n, samples) = float(right.mean()), right.shape
    if samples == 1:
        return {"accuracy": accuracy, "ci95": statistics.wilson_interval(accuracy, n)}
    return {"accuracy": accuracy, "ci95": statistics.bootstrap_interval(right.mean(1))}


def _at_k(votes: Sequence[Sequence[int | None]], right: np.ndarray) -> Result:
    samples = right.shape[1]
    counts = right.sum(1).astype(int).tolist()
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    pairs = list(zip(votes, (right > 0).tolist(), strict=True))
    each = {
        "pass@k": {
            k: statistics.pass_at_k_by_question(counts, samples, k) for k in powers
        },
        "maj@k": {
            k: [statistics.maj_at_k(*pair, k) for pair in pairs]
            for k in dict.fromkeys([*powers, samples])
        },
    }
    result: Result = {}
    for name, by_k in each.items():
        result[name] = {str(k): float(np.mean(x)) for k, x in by_k.items()}
        intervals = {
            str(k): statistics.bootstrap_interval(np.array(x)) for k, x in by_k.items()
        }
        result[f"{name}_ci95"] = intervals
    return result


MOST_ANSWERS = 64  # the most different wrong answers of a question that are compared


def assign_votes(
    examples: Sequence[Example], given: Sequence[str | None], right: np.ndarray
) -> list[list[int | None]]:
    """Returns the number of the answer that each prediction votes for in maj@k.

    Predictions that are equal, however they are written, vote for the same answer. The
    right ones vote for the reference, number 0.

    Args:
      examples: the questions with their references.
      given: the predictions of all questions, side by side; None casts no vote.
      right: [questions, samples], whether the prediction is right.

    Returns:
      For each question its samples' votes; None for no vote.

    >>> given = ["5", "3 cm", "5", "x=3", "3", None]
    >>> assign_votes([Example("?", "3")], given, np.array([[0, 1, 0, 1, 1, 0]]))
    [[1, 0, 1, 0, 0, None]]
    """
    samples = right.shape[1]

    def vote(places: Sequence[int]) -> list[list[int | None]]:
        answered, pairs = [], []
        for i in places:
            mine = given[i * samples : (i + 1) * samples]
            spelled = [p if p is None else _common_spelling(p) for p in mine]
            wrong = [s for s, good in zip(spelled, right[i], strict=True) if not good]
            distinct = [s for s in dict.fromkeys(wrong) if s is not None]
            answered.append((spelled, distinct))
            # If none is right, no majority can be right either.
            compared = distinct[:MOST_ANSWERS] if right[i].any() else []
            pairs += [(i, *pair) for pair in itertools.combinations(compared, 2)]
        same = _equal_predictions([(examples[i], a, b) for i, a, b in pairs])
        equal = {pair for pair, is_same in zip(pairs, same, strict=True) if is_same}
        found = []
        for i, (spelled, distinct) in zip(places, answered, strict=True):
            number: dict[str, int] = {}
            for n, answer in enumerate(distinct):
                first = (a for a in distinct[:n] if (i, a, answer) in equal)
                number[answer] = next((number[a] for a in first), n + 1)
            row = zip(spelled, right[i], strict=True)
            found.append(
                [None if s is None else 0 if good else number[s] for s, good in row]
            )
        return found

    return processes.map_divided(vote, range(len(examples)))


def _equal_predictions(triples: Sequence[tuple[Example, str, str]]) -> list[bool]:
    """Returns whether two predictions for an example are the same answer."""
    references, predictions = [], []
    for example, a, b in triples:
        options = len(kinds.options_of(example))
        if kinds.is_letters(b, options):  # the reference must be the letter
            a, b = b, a
        references.append(dataclasses.replace(example, answer=a))
        predictions.append(b)
    return kinds.grade_examples(references, predictions)


def _common_spelling(prediction: str) -> str:
    """Returns a common spelling of equal numbers, such as 1/2, 0.5 and $0.50."""
    if len(prediction) > equality.MAX_CHARS:
        return prediction
    text = normalize_notation(prediction)
    try:
        return str(evaluate_rational(text))
    except (Unreadable, RecursionError):
        return prediction


def compare_pair(first: Score, second: Score) -> Result:
    """Tests whether two models differ on the same questions.

    With one completion a question, p is the exact McNemar test's. With several, it is
    that of a paired bootstrap over the questions' mean accuracies. The interval is the
    bootstrap's in both cases.

    Returns:
      difference (second minus first), ci95, p, and the test's name.
    """
    a, b = first.right.mean(1), second.right.mean(1)
    low, high, p = statistics.paired_bootstrap(a, b)
    test = "paired bootstrap"
    if first.right.shape[1] == second.right.shape[1] == 1:
        test, p = "exact McNemar", statistics.mcnemar_p_value(a > 0, b > 0)
    difference = float((b - a).mean())
    return {"difference": difference, "ci95": (low, high), "p": p, "test": test}


def compare_pairs(
    scores: Mapping[tuple[str, str], Mapping[str, Score]],
) -> list[Result]:
    """Returns the tests between every two models of scores[set, measure][model]."""
    return [
        {"set": name, "measure": measure, "models": [a, b], **compare_pair(x, y)}
        for (name, measure), models in scores.items()
        for (a, x), (b, y) in itertools.combinations(models.items(), 2)
        if len(x.right) == len(y.right)
    ]
