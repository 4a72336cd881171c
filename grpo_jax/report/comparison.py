"""The comparison in Markdown.

In: results, as results.json holds them. Out: tables: accuracy by set and model, pass@k
and maj@k, the paired tests.

results["sets"][set][model][measure] is what one model got on one set in one way of
asking: `greedy`, `sampled`, and with programs `tool_greedy`, `tool_sampled`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = dict[str, Any]
MEASURES = ("greedy", "sampled", "tool_greedy", "tool_sampled")
# Further accuracies of a measure, by the key they stand under.
SIDES = {"": "", "program": ", its programs", "paper": ", the paper's grader"}


def title(measure: str, temperature: float | None) -> str:
    """A measure as people read it.

    >>> title("tool_sampled", 0.7), title("greedy", None)
    ('with programs, temperature 0.7', 'greedy')
    """
    tool, _, kind = measure.rpartition("_")
    if kind == "sampled":
        known = isinstance(temperature, int | float)
        kind = f"temperature {temperature:g}" if known else "sampled"
    return f"with programs, {kind}" if tool else kind


def _title(results: Mapping[str, Any], measure: str) -> str:
    """With the temperature, where all of it was sampled at the same one."""
    heats = {
        row[model][measure].get("temperature")
        for row in results["sets"].values()
        for model in results["models"]
        if measure in row.get(model, {})
    }
    return title(measure, heats.pop() if len(heats) == 1 else None)


def table(results: Mapping[str, Any]) -> str:
    """The comparison in Markdown: accuracy in %, ± half of the 95 % interval."""
    models, rows = results["models"], list(results["sets"].values())
    columns = [
        (measure, side)
        for measure in MEASURES
        for side in SIDES
        if any(_figure(row, m, measure, side) for row in rows for m in models)
    ]
    titles = [_title(results, measure) + SIDES[side] for measure, side in columns]
    arrow = " → ".join(models)
    lines = [
        "| set | n | " + " | ".join(f"{t}: {arrow}" for t in titles) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name, row in results["sets"].items():
        known = row.get("in_domain")
        where = " (in-domain)" if known else ""
        where = " (out-of-domain)" if known is False else where
        cells = [
            " → ".join(accuracy(_figure(row, m, measure, side)) for m in models)
            for measure, side in columns
        ]
        n = next((row[m]["n"] for m in models if m in row), "–")
        lines.append(f"| {name}{where} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(row: Mapping[str, Any], model: str, measure: str, side: str) -> Any:
    found = row.get(model, {}).get(measure)
    return found.get(side) if found and side else found


def accuracy(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "–"
    low, high = result["ci95"]
    return f"{100 * result['accuracy']:.1f} ± {50 * (high - low):.1f}"


def at_k(results: Mapping[str, Any]) -> str:
    """pass@k and maj@k with their intervals; "" where there are no several samples."""
    found = [
        (name, model, measure, kind, row[model][measure])
        for name, row in results["sets"].items()
        for model in results["models"]
        for measure in MEASURES
        for kind in ("pass@k", "maj@k")
        if kind in row.get(model, {}).get(measure, {})
    ]
    ks = sorted({int(k) for *_, kind, result in found for k in result[kind]})
    if not ks:
        return ""
    lines = [
        "| set | model | | " + " | ".join(f"k = {k}" for k in ks) + " |",
        "|---|---|---|" + "---|" * len(ks),
    ]
    for name, model, measure, kind, result in found:
        cells = []
        for k in map(str, ks):
            value, ci = result[kind].get(k), result.get(f"{kind}_ci95", {}).get(k)
            known = None if value is None else {"accuracy": value, "ci95": ci}
            cells.append(accuracy(known))
        way = f"{kind}, {_title(results, measure)}"
        lines.append(f"| {name} | {model} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(results: Mapping[str, Any]) -> str:
    """The tests between models on the same questions; "" where there are none."""
    tests: Sequence[Result] = results.get("paired", ())
    if not tests:
        return ""
    lines = [
        "| set | measure | models | difference, 95 % interval | p | test |",
        "|---|---|---|---|---|---|",
    ]
    for test in tests:
        low, high = test["ci95"]
        change = (
            f"{100 * test['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
        cells = [
            test["set"],
            _title(results, test["measure"]),
            " → ".join(test["models"]),
            change.replace("-", "−"),
            p_value(test["p"]),
            test["test"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def p_value(p: float) -> str:
    """>>> p_value(0.0123), p_value(1e-9)
    ('0.012', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader should know: completions that were cut off, questions left out."""
    lines = []
    for model in results["models"]:
        for measure in MEASURES:
            cut, left_out = [], []
            for name, row in results["sets"].items():
                result = row.get(model, {}).get(measure, {})
                if result.get("cut_off", 0) >= 0.01:
                    cut.append(f"{name} {100 * result['cut_off']:.0f} %")
                if result.get("too_long"):
                    left_out.append(f"{name} {result['too_long']}")
            where = f"{model}, {measure.replace('_', ', ')}"
            if cut:
                lines.append(f"{where}: completions cut off: {', '.join(cut)}")
            if left_out:
                lines.append(
                    f"{where}: prompts too long, which count as wrong: "
                    f"{', '.join(left_out)}"
                )
    return lines
