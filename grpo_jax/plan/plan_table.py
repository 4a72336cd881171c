"""What was compiled, as one JSON object and as a table for people.

In: `Program`s, the topology, what was assumed. Out: a dictionary of plain values; text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.config import Config
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.compiled_programs import Program
from grpo_jax.plan.loop_trip_counts import Lengths


def report(
    config: Config,
    topology: Topology,
    programs: Sequence[Program],
    lengths: Lengths,
    *,
    price: float | None = None,
    smallest: str | None = None,
) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds are those of one chip."""
    chip, count = topology.chip, len(topology.devices)
    rows = []
    for program in programs:
        row = dataclasses.asdict(program) | {"total_bytes": program.total_bytes}
        del row["message"]
        if chip:
            row["seconds"] = program.seconds(chip, count)
            row["bound_by"] = program.bound_by(chip, count)
            row["fits"] = program.total_bytes <= chip.memory  # not so where it is NaN
        if program.message:
            row["compiler"] = program.message
        rows.append({k: _plain(v) for k, v in row.items()})
    found: dict[str, Any] = {
        "config": config.name,
        "topology": topology.name,
        "devices": count,
        "assumed": {
            "mean_prompt_tokens": lengths.prompt,
            "mean_output_tokens": lengths.output,
        },
        "programs": rows,
    }
    if chip:
        hour = chip.price if price is None else price
        step = sum(p.runs * p.seconds(chip, count) for p in programs)
        found |= {
            "chip_memory_bytes": chip.memory,
            "fits": all(row["fits"] for row in rows),
            "step_seconds": step,
            "dollars_per_chip_hour": hour,
            "step_dollars": step / 3600 * count * hour,
        }
        if config.rl_steps and config.method != "sft":
            found["run_dollars"] = config.rl_steps * found["step_dollars"]
    if smallest is not None:
        found["smallest"] = smallest or None
    return found


def _plain(x: Any) -> Any:
    return None if isinstance(x, float) and math.isnan(x) else x


def table(found: dict[str, Any]) -> str:
    """The same for people."""
    memory = found.get("chip_memory_bytes")
    head = ["program", "peak", "beside", "together", "of chip", "FLOP"]
    head += ["sent", "least time", "bound by"]
    rows = [head if memory else head[:4] + head[5:7]]
    for p in found["programs"]:
        peak = p["peak_memory_bytes"]
        cells = [
            p["name"] + (f" × {p['runs']}" if p["runs"] > 1 else ""),
            "too large" if peak is None else size(peak),
            size(p["held_bytes"]),
            "-" if peak is None else size(p["total_bytes"]),
        ]
        if memory:
            share = "-" if peak is None else f"{p['total_bytes'] / memory:.0%}"
            cells.append(share + ("" if p["fits"] else " !"))
        cells += [scaled(p["flops"]), size(p["collective_bytes"])]
        if memory:
            cells += [f"{p['seconds']:.3g} s", p["bound_by"]]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * n for n in widths))
    lines += ["", *_below(found)]
    return "\n".join(line.rstrip() for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(n) if not i else cell.rjust(n)
        for i, (cell, n) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest])


def _below(found: dict[str, Any]) -> list[str]:
    assumed = found["assumed"]
    lines = [
        "beside: what the run keeps meanwhile; memory and what is sent are a chip's, "
        "FLOP all chips'",
        f"assumed: on average {assumed['mean_output_tokens']:g} tokens an output, "
        f"{assumed['mean_prompt_tokens']:g} a question (--mean_output, --mean_prompt)",
    ]
    for p in found["programs"]:
        if "compiler" in p:
            lines.append(f"{p['name']}: {p['compiler']}")
    where = f"{found['topology']}, {found['devices']} chips"
    if "chip_memory_bytes" in found:
        memory = size(found["chip_memory_bytes"])
        verdict = "fits" if found["fits"] else "does not fit"
        lines.append(f"{found['config']} {verdict} on {where} of {memory}")
        cost = f"${found['step_dollars']:.2f} a step"
        if "run_dollars" in found:
            cost += f", ${found['run_dollars']:,.0f} all"
        lines.append(
            f"a step takes {found['step_seconds']:.3g} s or more: {cost} at "
            f"${found['dollars_per_chip_hour']:.2f} a chip and hour (--price)"
        )
    if "smallest" in found:
        lines.append(
            f"the smallest that it fits on: {found['smallest'] or 'none of the list'}"
        )
    return lines


def size(count: float) -> str:
    """
    >>> size(13.25 * 2**30), size(300e3), size(0)
    ('13.2 GiB', '293 KiB', '0')
    """
    return scaled(count, 1024, ("", " KiB", " MiB", " GiB", " TiB"))


_METRIC = ("", " k", " M", " G", " T", " P")


def scaled(x: float, base: float = 1000, units: Sequence[str] = _METRIC) -> str:
    """
    >>> scaled(4.306e16), scaled(2.5e9)
    ('43.1 P', '2.5 G')
    """
    power = 0
    while x >= base and power + 1 < len(units):
        x, power = x / base, power + 1
    return f"{x:.3g}{units[power]}"
