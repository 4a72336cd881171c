"""Renders the page: its sections, and the policy under which a browser opens it.

The page asks for nothing from anywhere. Text from data stands in text and never in a
tag. The page's own script and style are named by their hashes, so no other can run.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from grpo_jax.report import comparison
from grpo_jax.report.charts import Line, draw_chart
from grpo_jax.report.run_files import Curve
from grpo_jax.report.safe_text import (
    escape_html,
    finite_number,
    format_number,
    script_json,
)
from grpo_jax.report.tables import Column, Table, to_html

# The charts of a stage: title → patterns of the metrics in it.
CHARTS = {
    "Reward": ("reward", "rewards/*/mean", "rewards/chosen", "rewards/rejected"),
    "KL to the reference": ("kl",),
    "Entropy": ("entropy",),
    "Tokens of a completion": ("completions/*_length",),
    "Share of clipped ratios": ("clip_ratio/*",),
    "Accuracy": ("eval/*", "accuracy", "rewards/accuracies"),
    "Programs of a completion": ("tools/call_frequency",),
    "Share of programs that fail": ("tools/failure_frequency",),
    "Share of completions cut off": ("completions/clipped_ratio",),
    "Spread of rewards in a group": ("reward_std",),
    "Share of groups without a signal": ("frac_reward_zero_std", "dynamic/tied"),
    "Loss": ("loss", "nll"),
    "Loss of the value function": ("value_loss",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Seconds": ("step_time", "time/*"),
}


def render_page(
    name: str,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Curve]],
    groups: Sequence[Mapping[str, Any]],
    findings: Sequence[str] = (),
) -> str:
    """Returns the whole page as HTML.

    Args:
      name: the run's, for the title.
      config: the content of config.json, or {}.
      results: the content of results.json, or {}.
      stages: stage → metric → curve (`run_files.read_metric_curves`).
      groups: sampled groups (`sample_groups.prepare_sample_groups`).
      findings: lines on what is wrong with the run (`run_files.read_findings`).
    """
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    script = (here / "report.js").read_text(encoding="utf-8")
    charts: list[dict[str, Any]] = []
    curves = "".join(
        _stage_charts(stage, stages[stage], charts)
        for stage in sorted(stages, key=lambda s: (s != "rl", s != "sft"))
    )
    body = [
        _header(name, config, results, stages),
        *([_section("Diagnosis", _list(findings))] if findings else []),
        _section("Comparison", _comparison(results) or _quiet("No comparison yet.")),
    ]
    if config or stages or groups or not results:  # else an evaluation, not a run
        samples = COMPLETIONS_HTML if groups else _quiet("No samples yet.")
        settings = _details("config.json", _settings_table(config))
        settings += _details("All metrics", _metrics_table(stages))
        body += [
            _section("Curves", curves or _quiet("No metrics yet.")),
            _section("Completions", samples),
            _section("Settings and all metrics", settings),
        ]
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = script_json({"charts": charts, "groups": groups})
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape_html(name)} – report</title>
<style>{style}</style>
</head>
<body>
{"".join(body)}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _quiet(text: str) -> str:
    return f'<p class="quiet">{text}</p>'


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape_html(line, 2000)}</li>" for line in lines)
    return f"<ul>{items}</ul>"


def _details(title: str, table: Table) -> str:
    return f"<details><summary>{escape_html(title)}</summary>{to_html(table)}</details>"


def _header(
    name: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Curve]],
) -> str:
    facts = [f"{k} {config[k]}" for k in ("method", "seed") if k in config]
    for stage, curves in stages.items():
        last = max((steps[-1] for steps, _ in curves.values()), default=None)
        planned = finite_number(config.get(f"{stage}_steps"))
        total = f" of {format_number(planned)}" if planned else ""
        facts.append(f"{stage}: step {format_number(last)}{total}")
    if compared := len(comparison.set_names(results)):
        facts.append(f"compared on {compared} {'set' if compared == 1 else 'sets'}")
    facts.append(time.strftime("written %Y-%m-%d %H:%M UTC", time.gmtime()))
    items = "".join(f"<li>{escape_html(fact, 400)}</li>" for fact in facts)
    return (
        f'<header><h1>{escape_html(name)}</h1><ul class="facts">{items}</ul></header>\n'
    )


def _comparison(results: Mapping[str, Any]) -> str:
    """Returns the comparison's tables and remarks; "" without any result."""
    names = comparison.set_names(results)
    if not names or not comparison.model_names(results):
        return ""
    tables = comparison.comparison_tables(results, changes=True)
    remarks = comparison.comparison_remarks(results)
    items = "".join(f"<li>{escape_html(remark, 2000)}</li>" for remark in remarks)
    modes = comparison.prompting_modes(results)
    published = comparison.published_tables(names, modes)
    return "".join(
        [
            *map(to_html, tables),
            f'<ul class="quiet">{items}</ul>' if items else "",
            *(_details(title, table) for title, table in published.items()),
        ]
    )


def _stage_charts(
    stage: str, curves: Mapping[str, Curve], charts: list[dict[str, Any]]
) -> str:
    """Returns a stage's charts as HTML; appends their points to `charts`."""
    drawn = []
    for title, patterns in CHARTS.items():
        names = [n for p in patterns for n in sorted(curves) if fnmatchcase(n, p)]
        lines: list[Line] = [(n, *curves[n]) for n in dict.fromkeys(names)]
        if lines:
            html, data = draw_chart(title, lines[:5])
            drawn.append(html)
            charts.append(data)
    if not drawn:
        return ""
    shown = {"rl": "RL", "sft": "SFT"}.get(stage, escape_html(stage))
    open_ = " open" if stage == "rl" else ""
    charts_html = f'<div class="charts">{"".join(drawn)}</div>'
    return f"<details{open_}><summary>{shown}</summary>{charts_html}</details>"


def _metrics_table(stages: Mapping[str, Mapping[str, Curve]]) -> Table:
    names = "metric", "stage", "first", "last", "lowest", "highest"
    rows = [
        [name, stage, *map(format_number, (ys[0], ys[-1], min(ys), max(ys)))]
        for stage, curves in stages.items()
        for name, (_, ys) in sorted(curves.items())
    ]
    return Table([*map(Column, names)], rows)


def _settings_table(config: Mapping[str, Any]) -> Table:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{inner}": x for inner, x in value.items()}
        else:
            flat[name] = value
    rows = [[k, str(v)] for k, v in flat.items() if v is not None and v != ""]
    return Table([Column("setting"), Column("value")], rows)


_TOKEN_COLOURS = (
    ("advantage", "advantage Â"),
    ("log_ratio", "log π/π_ref"),
    ("kl", "KL"),
    ("ratio", "ratio π_old/π_sampler"),
    ("surprise", "−log π"),
)
COMPLETIONS_HTML = re.sub(
    r"\s*\n\s*",
    "",
    """
<div id="tools">
<fieldset id="colors"><legend>Colour of a token</legend>"""
    + "".join(
        f'<label><input type="radio" name="color" value="{value}">{text}</label>'
        for value, text in _TOKEN_COLOURS
    )
    + """</fieldset>
<label>Order <select id="order">
<option value="failures">failures first</option>
<option value="newest">newest first</option>
<option value="oldest">oldest first</option>
</select></label>
<p id="scale" aria-live="polite"></p>
</div>
<p id="token" class="quiet" role="status">
Point at a token, or move through a completion with the arrow keys.</p>
<noscript><p>Completions are shown by a script, which is turned off here.</p></noscript>
<div id="groups"></div>
<button type="button" id="more" hidden>Show more groups</button>
""",
)
