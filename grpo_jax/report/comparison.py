"""The comparison of models: the tables and remarks that results.json gives.

results["sets"][set][model][measure] is what one model reached on one set in one way of
answering: `greedy`, `sampled`, and with programs `tool_greedy`, `tool_sampled`. A
figure that is missing or malformed is shown as an en dash.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from grpo_jax.evaluation import published_figures
from grpo_jax.report.safe_text import finite_number, format_number
from grpo_jax.report.tables import Cell, Column, Table

T = TypeVar("T")
Results = Mapping[str, Any]
MEASURES = ("greedy", "sampled", "tool_greedy", "tool_sampled")
# Further gradings of the same completions: key in the measure's result → title.
GRADINGS = {"": "", "program": ", its programs", "paper": ", the paper's grader"}


def comparison_tables(results: Results, *, changes: bool = False) -> list[Table]:
    """Returns tables of accuracies, of pass@k and maj@k, and of paired tests.

    Args:
      results: the content of results.json.
      changes: whether the accuracies of two models have their difference beside them.
    """
    tables = accuracy_table(results, changes=changes), samples_table(results)
    return [table for table in (*tables, paired_table(results)) if table.rows]


def accuracy_table(results: Results, *, changes: bool = False) -> Table:
    """Accuracy in % with half of its 95 % interval: a row a set, a column a model.

    `changes` adds a column with the difference between two models.
    """
    models = model_names(results)
    found = {
        (measure, grading)
        for _, _, measure, result in _measured(results)
        for grading in GRADINGS
        if not grading or _object(result, grading)
    }
    shown = [pair for pair in itertools.product(MEASURES, GRADINGS) if pair in found]
    changes = changes and len(models) == 2
    columns = [Column("set"), Column("n")]
    for measure, grading in shown:
        title = _title(results, measure) + GRADINGS[grading]
        columns += [Column(model, title) for model in models]
        columns += [Column("change", title)] if changes else []
    rows = []
    for name in set_names(results):
        row: list[Cell | str] = [Cell(name, _domain(results["sets"][name]))]
        counts = [_object(results["sets"][name], model).get("n") for model in models]
        known = [n for n in map(finite_number, counts) if n is not None]
        row.append(format_number(known[0] if known else None))
        for measure, grading in shown:
            keys = [("sets", name, model, measure, grading) for model in models]
            one = [_object(results, *filter(None, key)) for key in keys]
            row += [_accuracy(x.get("accuracy"), x.get("ci95")) for x in one]
            row += [_change(*one)] if changes else []
        rows.append(row)
    return Table(columns, rows, "Accuracy in %, ± half of the 95 % interval")


def samples_table(results: Results) -> Table:
    """pass@k and maj@k in % with half of their 95 % intervals: a column a k.

    It has no rows where no question was answered more than once.
    """
    found = [
        (name, model, f"{kind}, {_title(results, measure)}", values, intervals)
        for name, model, measure, result in _measured(results)
        for kind in ("pass@k", "maj@k")
        if (values := _object(result, kind))
        for intervals in [_object(result, f"{kind}_ci95")]
    ]
    counts = {k for *_, values, _ in found for k in values if _is_count(k)}
    ks = sorted(counts, key=int)
    rows = [
        [*texts, *(_accuracy(values.get(k), intervals.get(k)) for k in ks)]
        for *texts, values, intervals in found
    ]
    names = ["set", "model", "measure", *(f"k = {k}" for k in ks)]
    caption = "Of several samples, in %, ± half of the 95 % interval"
    return Table([*map(Column, names)], rows if ks else [], caption)


def paired_table(results: Results) -> Table:
    """Returns the tests of differences between models on the same questions.

    It has no rows where nothing was tested.
    """
    rows = []
    for test in _list(results.get("paired"), dict):
        bounds = [_signed(bound) for bound in _interval(test.get("ci95"))]
        interval = f" [{', '.join(bounds)}]" if bounds else ""
        rows.append(
            [
                str(test.get("set")),
                _title(results, str(test.get("measure"))),
                " → ".join(_list(test.get("models"), str)),
                _signed(finite_number(test.get("difference"))) + interval,
                format_p_value(finite_number(test.get("p"))),
                str(test.get("test", "–")),
            ]
        )
    names = "set", "measure", "models", "difference, 95 % interval", "p", "test"
    return Table(
        [*map(Column, names)], rows, "Differences on the same questions, in points"
    )


def published_tables(sets: Sequence[str], modes: Sequence[str]) -> dict[str, Table]:
    """Returns title → table of the figures that others have published on these sets."""
    tables = {}
    for mode, figures in published_figures.find_figures(sets, modes).items():
        names = [name for name in sets if any(name in row for row in figures.values())]
        rows = [
            [model, *(row.get(name, "–") for name in names)]
            for model, row in figures.items()
        ]
        title = "Published, not measured here (DeepSeekMath, 2024; "
        title += f"{published_figures.TITLES[mode]}, %)"
        tables[title] = Table([Column("model"), *map(Column, names)], rows)
    return tables


def comparison_remarks(results: Results) -> list[str]:
    """Sentences on completions that were cut off and questions that were left out."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, model, measure, result in _measured(results):
        who = model, measure
        if (share := finite_number(result.get("cut_off")) or 0) >= 0.01:
            text = f"{name} {100 * share:.0f} %"
            found.setdefault((*who, "completions cut off"), []).append(text)
        if count := finite_number(result.get("too_long")):
            text = f"{name} {format_number(count)}"
            why = "prompts too long, which count as wrong"
            found.setdefault((*who, why), []).append(text)
    return [
        f"{model}, {measure.replace('_', ', ')}: {what}: {', '.join(texts)}"
        for (model, measure, what), texts in found.items()
    ]


def set_names(results: Results) -> list[str]:
    """Returns the names of the evaluation sets, in the order of the file."""
    sets = _object(results, "sets")
    return [name for name, row in sets.items() if isinstance(row, dict)]


def model_names(results: Results) -> list[str]:
    """Returns the names of the models, in the order of the file."""
    return _list(results.get("models"), str)


def prompting_modes(results: Results) -> list[str]:
    """Returns how questions were asked: "cot", "tool" or "few_shot"."""
    if _object(results, "settings").get("few_shot") is True:
        return ["few_shot"]
    tools = {measure.startswith("tool") for _, _, measure, _ in _measured(results)}
    return ["tool" if tool else "cot" for tool in sorted(tools or {False})]


def measure_title(measure: str, temperature: float | None) -> str:
    """Returns the name of a measure as people read it.

    >>> measure_title("tool_sampled", 0.7), measure_title("greedy", None)
    ('with programs, temperature 0.7', 'greedy')
    """
    tool, _, kind = measure.rpartition("_")
    if kind == "sampled" and temperature is not None:
        kind = f"temperature {temperature:g}"
    return f"with programs, {kind}" if tool else kind


def format_p_value(p: float | None) -> str:
    """Returns p with two digits, down to 0.001.

    >>> format_p_value(0.0123), format_p_value(1e-9), format_p_value(None)
    ('0.012', '< 0.001', '–')
    """
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _measured(results: Results) -> Iterator[tuple[str, str, str, Results]]:
    """Returns (set, model, measure, result) of every result that is there."""
    for name in set_names(results):
        for model, measure in itertools.product(model_names(results), MEASURES):
            if result := _object(results, "sets", name, model, measure):
                yield name, model, measure, result


def _title(results: Results, measure: str) -> str:
    """Returns a measure's title, with the temperature if there is only one."""
    found = [x for _, _, name, x in _measured(results) if name == measure]
    temperatures = {finite_number(x.get("temperature")) for x in found}
    return measure_title(
        measure, temperatures.pop() if len(temperatures) == 1 else None
    )


def _object(value: Any, *keys: str) -> dict[str, Any]:
    """Returns the object at a path of keys; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, dict) else {}


def _list(value: Any, kind: type[T]) -> list[T]:
    """Returns the items of a type; [] where there is no list."""
    given = value if isinstance(value, list | tuple) else ()
    return [x for x in given if isinstance(x, kind)]


def _interval(value: Any) -> list[float]:
    """Returns both bounds, or []."""
    numbers = map(finite_number, _list(value, object))
    bounds = [bound for bound in numbers if bound is not None]
    return bounds if len(bounds) == 2 else []


def _accuracy(accuracy: Any, interval: Any) -> Cell:
    share = finite_number(accuracy)
    if share is None:
        return Cell("–")
    bounds = _interval(interval)
    margin = f"± {50 * (bounds[1] - bounds[0]):.1f}" if bounds else ""
    return Cell(f"{100 * share:.1f}", margin)


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    a, b = (finite_number(result.get("accuracy")) for result in (before, after))
    return _signed(None if a is None or b is None else b - a)


def _signed(share: float | None) -> str:
    """Returns a share in points, with its sign."""
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _domain(row: Mapping[str, Any]) -> str:
    known = row.get("in_domain")
    names = {True: "(in-domain)", False: "(out-of-domain)"}
    return names[known] if isinstance(known, bool) else ""


def _is_count(k: str) -> bool:
    return k.isdecimal() and len(k) < 10
