"""The page: sections of HTML, and the policy under which a browser opens it.

In: what `read` found. Out: one HTML text that asks for nothing from anywhere. What
comes from data stands in texts, never in a tag; its scripts and styles are named by
their hashes, so that no other could run.
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

from grpo_jax.evaluation import published_figures
from grpo_jax.report.charts import Line, draw
from grpo_jax.report.run_files import Curve
from grpo_jax.report.safe_text import escape, number, script_json, short

# Title: the metrics in it, by pattern.
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
MEASURES = ("greedy", "sampled", "tool_greedy", "tool_sampled")


def page(
    name: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Curve]],
    groups: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page."""
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    script = (here / "report.js").read_text(encoding="utf-8")
    charts: list[dict[str, Any]] = []
    curves = "".join(
        _curves(stage, stages[stage], charts)
        for stage in sorted(stages, key=lambda s: (s != "rl", s != "sft"))
    )
    body = [
        _header(name, config, results, stages),
        _section("Comparison", _comparison(results) or _none("No comparison yet.")),
    ]
    if config or stages or groups or not results:  # else an evaluation, not a run
        said = COMPLETIONS if groups else _none("No samples yet.")
        settings = _settings(config) + _metrics(stages)
        body += [
            _section("Curves", curves or _none("No metrics yet.")),
            _section("Completions", said),
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
<title>{escape(name)} – report</title>
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


def _none(text: str) -> str:
    return f'<p class="quiet">{text}</p>'


def _header(name, config, results, stages) -> str:
    facts = [f"{k} {escape(str(config[k]))}" for k in ("method", "seed") if k in config]
    for stage, curves in stages.items():
        last = max((steps[-1] for steps, _ in curves.values()), default=None)
        planned = number(config.get(f"{stage}_steps"))
        of = f" of {short(planned)}" if planned else ""
        facts.append(f"{escape(stage)}: step {short(last)}{of}")
    compared = len(_dict(results.get("sets")))
    if compared:
        facts.append(f"compared on {compared} {'set' if compared == 1 else 'sets'}")
    facts.append(time.strftime("written %Y-%m-%d %H:%M UTC", time.gmtime()))
    items = "".join(f"<li>{fact}</li>" for fact in facts)
    return f'<header><h1>{escape(name)}</h1><ul class="facts">{items}</ul></header>\n'


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# -- the comparison --------------------------------------------------------------------


def _comparison(results: Mapping[str, Any]) -> str:
    sets = {k: v for k, v in _dict(results.get("sets")).items() if isinstance(v, dict)}
    given = results.get("models")
    models = [m for m in given if isinstance(m, str)] if isinstance(given, list) else []
    if not sets or not models:
        return ""

    def cell(row: Any, model: str, mode: str) -> dict[str, Any]:
        return _dict(_dict(row.get(model)).get(mode))

    modes = [
        m
        for m in MEASURES
        if any(cell(r, model, m) for r in sets.values() for model in models)
    ]
    heat = short(number(_dict(results.get("settings")).get("temperature")))
    heat = f"temperature {heat}"
    titles = {"greedy": "greedy", "sampled": f"at {heat}"}
    titles |= {"tool_greedy": "programs, greedy", "tool_sampled": f"programs, {heat}"}
    difference = len(models) == 2
    span = len(models) + difference
    head = '<tr><th scope="col" rowspan="2">set</th><th scope="col" rowspan="2">n</th>'
    head += "".join(
        f'<th scope="colgroup" colspan="{span}">{titles[m]}</th>' for m in modes
    )
    names = "".join(f'<th scope="col">{escape(m)}</th>' for m in models)
    names += '<th scope="col">change</th>' if difference else ""
    head += f"</tr><tr>{names * len(modes)}</tr>"
    lines = []
    for name, row in sets.items():
        known = row.get("in_domain")
        where = "in-domain" if known is True else ""
        where = "out-of-domain" if known is False else where
        first = f'{escape(name)} <span class="by">{where}</span>'
        n = short(number(_dict(row.get(models[0])).get("n")))
        cells = [f'<th scope="row">{first}</th><td>{n}</td>']
        for mode in modes:
            found = [cell(row, model, mode) for model in models]
            cells += [f"<td>{_accuracy(x)}</td>" for x in found]
            if difference:
                p = _p_value(results, name, mode, models)
                cells.append(f"<td>{_change(*found)}{p}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    main = _table(head, lines, "Accuracy in %, ± half of the 95 % interval")
    asked = ["tool" if mode.startswith("tool") else "cot" for mode in modes] or ["cot"]
    if _dict(results.get("settings")).get("few_shot") is True:
        asked = ["few_shot"]
    asked = list(dict.fromkeys(asked))
    return main + _at_k(sets, models) + _published(list(sets), asked)


def _accuracy(result: Mapping[str, Any]) -> str:
    accuracy, ci = number(result.get("accuracy")), result.get("ci95")
    if accuracy is None:
        return "–"
    bounds = [number(x) for x in ci] if isinstance(ci, list) else []
    text = f"{100 * accuracy:.1f}"
    if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
        half = 50 * (bounds[1] - bounds[0])
        text += f' <span class="quiet">± {half:.1f}</span>'
    if (programs := number(_dict(result.get("program")).get("accuracy"))) is not None:
        text += f' <span class="by">(programs {100 * programs:.1f})</span>'
    if (lenient := number(_dict(result.get("paper")).get("accuracy"))) is not None:
        text += f' <span class="by">(paper\'s grader {100 * lenient:.1f})</span>'
    if (cut := number(result.get("cut_off")) or 0) >= 0.01:
        text += f' <span class="by">({100 * cut:.0f} % cut off)</span>'
    left_out = number(result.get("too_long"))
    return text + (f" ({short(left_out)} too long)" if left_out else "")


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    a, b = number(before.get("accuracy")), number(after.get("accuracy"))
    return "–" if a is None or b is None else f"{100 * (b - a):+.1f}".replace("-", "−")


def _p_value(results, name: str, measure: str, models: Sequence[str]) -> str:
    """Of the paired test between the two models; "" where there was none."""
    tests = results.get("paired")
    for test in tests if isinstance(tests, list) else ():
        test = _dict(test)
        about = test.get("set"), test.get("measure"), test.get("models")
        p = number(test.get("p"))
        if about == (name, measure, list(models)) and p is not None:
            shown = "&lt; 0.001" if p < 0.001 else f"= {p:.2g}"
            return f' <span class="by">p {shown}</span>'
    return ""


def _at_k(sets: Mapping[str, Any], models: Sequence[str]) -> str:
    """pass@k and maj@k, where several samples were drawn."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, row in sets.items():
        for model in models:
            for measure, how in (("sampled", ""), ("tool_sampled", ", programs")):
                sampled = _dict(_dict(row.get(model)).get(measure))
                for kind in ("pass@k", "maj@k"):
                    if values := _dict(sampled.get(kind)):
                        found[name, model, kind + how] = values
    ks = sorted({k for row in found.values() for k in row if _is_count(k)}, key=int)
    if not ks:
        return ""
    head = '<tr><th scope="col">set</th><th scope="col">model</th><th></th>'
    head += "".join(f'<th scope="col">k&nbsp;=&nbsp;{escape(k)}</th>' for k in ks)
    head += "</tr>"
    lines = []
    for (name, model, kind), row in found.items():
        values = [number(row.get(k)) for k in ks]
        cells = "".join(
            f"<td>{'–' if v is None else f'{100 * v:.1f}'}</td>" for v in values
        )
        first = f'<th scope="row">{escape(name)}</th><td>{escape(model)}</td>'
        lines.append(f"<tr>{first}<td>{kind}</td>{cells}</tr>")
    return _table(head, lines, "Of several samples, in %")


def _is_count(k: str) -> bool:
    return k.isdecimal() and len(k) < 10


def _published(names: Sequence[str], modes: Sequence[str]) -> str:
    shown = ""
    for mode, rows in published_figures.figures(names, modes).items():
        known = [name for name in names if any(name in row for row in rows.values())]
        head = '<tr><th scope="col">model</th>'
        head += "".join(f'<th scope="col">{escape(name)}</th>' for name in known)
        lines = [
            f'<tr><th scope="row">{escape(model)}</th>'
            + "".join(f"<td>{escape(row.get(name, '–'))}</td>" for name in known)
            + "</tr>"
            for model, row in rows.items()
        ]
        caption = "Published, not measured here (DeepSeekMath, 2024; "
        caption += f"{published_figures.TITLES[mode]}, %)"
        table = _table(f"{head}</tr>", lines)
        shown += f"<details><summary>{caption}</summary>{table}</details>"
    return shown


def _table(head: str, lines: Sequence[str], caption: str = "") -> str:
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"{title}<thead>{head}</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


# -- curves and numbers ----------------------------------------------------------------


def _curves(
    stage: str, curves: Mapping[str, Curve], charts: list[dict[str, Any]]
) -> str:
    """A stage's charts; their points are added to `charts`."""
    drawn = []
    for title, patterns in CHARTS.items():
        names = [n for p in patterns for n in sorted(curves) if fnmatchcase(n, p)]
        lines: list[Line] = [(n, *curves[n]) for n in dict.fromkeys(names)]
        if lines:
            html, data = draw(title, lines[:5])
            drawn.append(html)
            charts.append(data)
    if not drawn:
        return ""
    shown = {"rl": "RL", "sft": "SFT"}.get(stage, escape(stage))
    open_ = " open" if stage == "rl" else ""
    charts_html = f'<div class="charts">{"".join(drawn)}</div>'
    return f"<details{open_}><summary>{shown}</summary>{charts_html}</details>"


def _metrics(stages: Mapping[str, Mapping[str, Curve]]) -> str:
    head = "".join(
        f'<th scope="col">{x}</th>'
        for x in ("stage", "metric", "first", "last", "lowest", "highest")
    )
    lines = [
        f'<tr><td>{escape(stage)}</td><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{short(y)}</td>" for y in (ys[0], ys[-1], min(ys), max(ys)))
        + "</tr>"
        for stage, curves in stages.items()
        for name, (_, ys) in sorted(curves.items())
    ]
    table = _table(f"<tr>{head}</tr>", lines)
    return f"<details><summary>All metrics</summary>{table}</details>"


def _settings(config: Mapping[str, Any]) -> str:
    flat: list[tuple[str, Any]] = []
    for name, value in config.items():
        inner = value.items() if isinstance(value, dict) else None
        flat += [(f"{name}.{k}", v) for k, v in inner] if inner else [(name, value)]
    lines = [
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>'
        for k, v in flat
        if v is not None and v != ""
    ]
    return f"<details><summary>config.json</summary>{_table('', lines)}</details>"


_BUTTONS = (
    ("advantage", "advantage Â"),
    ("log_ratio", "log π/π_ref"),
    ("kl", "KL"),
    ("ratio", "ratio π_old/π_sampler"),
    ("surprise", "−log π"),
)
COMPLETIONS = re.sub(
    r"\s*\n\s*",
    "",
    """
<div id="tools">
<fieldset id="colors"><legend>Colour of a token</legend>"""
    + "".join(
        f'<label><input type="radio" name="color" value="{value}">{text}</label>'
        for value, text in _BUTTONS
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
