"""Charts of curves, drawn as SVG when the page is written.

A chart has fixed proportions and takes its colours from the page. Its points also go to
the page's script, which shows the values under the pointer. A long curve is drawn as
the means of equal stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.report.safe_text import escape_html, format_number, make_visible

Line = tuple[str, Sequence[float], Sequence[float]]  # label, steps, values
MAX_POINTS = 240  # of a line
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 166


def downsample_curve(
    steps: Sequence[float], values: Sequence[float], max_points: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Returns the last step and the mean of each of `max_points` parts of a curve.

    A curve with fewer points is returned as it is.

    >>> downsample_curve([1, 2, 3, 4], [0.0, 2.0, 4.0, 6.0], max_points=2)
    ([2, 4], [1.0, 5.0])
    """
    n = len(steps)
    if n <= max_points:
        return list(steps), list(values)
    edges = [n * i // max_points for i in range(max_points + 1)]
    spans = list(zip(edges, edges[1:], strict=False))
    means = [math.fsum(values[a:b]) / (b - a) for a, b in spans]
    return [steps[b - 1] for _, b in spans], means


def choose_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about `count` round numbers between low and high.

    >>> choose_ticks(0.0, 1.0), choose_ticks(3.0, 61.0, 3)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [20.0, 40.0, 60.0])
    """
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    by = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.ceil(low / by - 1e-9), math.floor(high / by + 1e-9)
    return [i * by for i in range(first, last + 1)]


def _axis_range(values: Sequence[float]) -> tuple[float, float]:
    """Returns (low, high) with a margin of 6 % at both ends; they are never equal."""
    low, high = min(values), max(values)
    if low == high == 0:
        return 0.0, 1.0
    room = 0.06 * (high - low)
    if room <= 1e-9 * abs(high):
        room = 0.1 * abs(high) or 1e-6
    return low - room, high + room


def _merge_equal_lines(lines: Sequence[Line]) -> list[Line]:
    """Merges equal lines into one line with all their labels."""
    merged: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for label, *curve in lines:
        merged.setdefault(tuple(map(tuple, curve)), []).append(label)
    return [(" = ".join(labels), xs, ys) for (xs, ys), labels in merged.items()]


def draw_chart(title: str, lines: Sequence[Line]) -> tuple[str, dict[str, Any]]:
    """Draws one chart.

    Args:
      title: above the chart, from this package.
      lines: (label, steps, values) each, with at least one point.

    Returns:
      The chart as HTML, and the points that the page's script reads out.
    """
    drawn = [
        (make_visible(label, 200), *downsample_curve(xs, ys))
        for label, xs, ys in _merge_equal_lines(lines)
    ]
    all_x = [x for _, xs, _ in drawn for x in xs]
    all_y = [y for _, _, ys in drawn for y in ys]
    x0, x1 = min(all_x), max(all_x)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    y0, y1 = _axis_range(all_y)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (RIGHT - LEFT)

    def py(y: float) -> float:
        return BOTTOM - (y - y0) / (y1 - y0) * (BOTTOM - TOP)

    parts = [
        f'<path class="grid" d="M{LEFT} {py(y):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{py(y):.1f}" class="y">{format_number(y)}</text>'
        for y in choose_ticks(y0, y1)
    ]
    parts += [
        f'<text x="{px(x):.1f}" y="{BOTTOM + 16}">{format_number(x)}</text>'
        for x in choose_ticks(x0, x1, 3)
    ]
    legend, spoken = [], []
    for i, (label, xs, ys) in enumerate(drawn):
        points = [(f"{px(x):.1f}", f"{py(y):.1f}") for x, y in zip(xs, ys, strict=True)]
        color, drawn_at = f"line line{i % 5}", " ".join(map(",".join, points))
        parts.append(f'<polyline class="{color}" points="{drawn_at}"/>')
        if len(xs) <= 12:
            parts += [
                f'<circle class="{color}" cx="{x}" cy="{y}" r="2.5"/>'
                for x, y in points
            ]
        first, last = format_number(ys[0]), format_number(ys[-1])
        legend.append(
            f'<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true">'
            f'<path class="{color}" d="M0 4H18"/></svg>{escape_html(label)} '
            f'<span class="num">{first} → {last}</span></li>'
        )
        spoken.append(f"{label} from {first} at step {format_number(xs[0])} to {last}")
    name = escape_html(title)
    head = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{name}: {escape_html("; ".join(spoken), 600)}">'
    )
    html = (
        f"<figure><h3>{name}</h3>{head}{''.join(parts)}"
        f'<path class="cursor" d="M-9 {TOP}V{BOTTOM}"/></svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
        f'<p class="readout" aria-live="polite"></p></figure>'
    )
    data = {
        "x": [x0, x1],
        "lines": [
            {"label": label, "x": xs, "y": [float(f"{y:.6g}") for y in ys]}
            for label, xs, ys in drawn
        ],
    }
    return html, data
