"""The plan as one JSON object, and as a table for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.config import Config
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.compiled_programs import CompiledProgram
from grpo_jax.plan.loop_trip_counts import MeanLengths


def summarize_plan(
    config: Config,
    topology: Topology,
    programs: Sequence[CompiledProgram],
    lengths: MeanLengths,
    *,
    price: float | None = None,
    smallest: str | None = None,
) -> dict[str, Any]:
    """Returns the plan as plain values, for JSON.

    Args:
      config: the run's.
      topology: the devices.
      programs: what a step runs, compiled for them.
      lengths: what was assumed of prompts and outputs.
      price: dollars a chip and hour; by default the chip's list price.
      smallest: the smallest slice that the config fits on ("" for none), if it was
        looked for.

    Returns:
      Names and figures. Bytes and seconds are those of one chip.
    """
    chip, count = topology.chip, len(topology.devices)
    rows = []
    for program in programs:
        row = dataclasses.asdict(program) | {"total_bytes": program.total_bytes}
        del row["message"]
        if chip:
            row["seconds"] = program.seconds(chip, count)
            row["bound_by"] = program.bound_by(chip, count)
            row["fits"] = program.total_bytes <= chip.memory_bytes  # False for NaN
        if program.message:
            row["compiler"] = program.message
        rows.append({k: _none_for_nan(v) for k, v in row.items()})
    summary: dict[str, Any] = {
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
        hour = chip.dollars_per_hour if price is None else price
        step = sum(p.runs * p.seconds(chip, count) for p in programs)
        summary |= {
            "chip_memory_bytes": chip.memory_bytes,
            "fits": all(row["fits"] for row in rows),
            "step_seconds": step,
            "dollars_per_chip_hour": hour,
            "step_dollars": step / 3600 * count * hour,
        }
        if config.rl_steps and config.method != "sft":
            summary["run_dollars"] = config.rl_steps * summary["step_dollars"]
    if smallest is not None:
        summary["smallest"] = smallest or None
    return summary


def _none_for_nan(x: Any) -> Any:
    return None if isinstance(x, float) and math.isnan(x) else x


def format_plan(summary: dict[str, Any]) -> str:
    """Returns the plan of `summarize_plan` as a table with notes below it."""
    memory = summary.get("chip_memory_bytes")
    head = ["program", "peak", "beside", "together", "of chip", "FLOP"]
    head += ["sent", "least time", "bound by"]
    rows = [head if memory else head[:4] + head[5:7]]
    for p in summary["programs"]:
        peak = p["peak_memory_bytes"]
        cells = [
            p["name"] + (f" × {p['runs']}" if p["runs"] > 1 else ""),
            "too large" if peak is None else format_bytes(peak),
            format_bytes(p["held_bytes"]),
            "-" if peak is None else format_bytes(p["total_bytes"]),
        ]
        if memory:
            share = "-" if peak is None else f"{p['total_bytes'] / memory:.0%}"
            cells.append(share + ("" if p["fits"] else " !"))
        cells += [format_scaled(p["flops"]), format_bytes(p["collective_bytes"])]
        if memory:
            cells += [f"{p['seconds']:.3g} s", p["bound_by"]]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * n for n in widths))
    lines += ["", *_notes(summary)]
    return "\n".join(line.rstrip() for line in lines)


def _notes(summary: dict[str, Any]) -> list[str]:
    assumed = summary["assumed"]
    lines = [
        "beside: what the run keeps meanwhile; memory and what is sent are a chip's, "
        "FLOP all chips'",
        f"assumed: on average {assumed['mean_output_tokens']:g} tokens an output, "
        f"{assumed['mean_prompt_tokens']:g} a question (--mean_output, --mean_prompt)",
    ]
    for p in summary["programs"]:
        if "compiler" in p:
            lines.append(f"{p['name']}: {p['compiler']}")
    where = f"{summary['topology']}, {summary['devices']} chips"
    if "chip_memory_bytes" in summary:
        memory = format_bytes(summary["chip_memory_bytes"])
        verdict = "fits" if summary["fits"] else "does not fit"
        lines.append(f"{summary['config']} {verdict} on {where} of {memory}")
        cost = f"${summary['step_dollars']:.2f} a step"
        if "run_dollars" in summary:
            cost += f", ${summary['run_dollars']:,.0f} all"
        lines.append(
            f"a step takes {summary['step_seconds']:.3g} s or more: {cost} at "
            f"${summary['dollars_per_chip_hour']:.2f} a chip and hour (--price)"
        )
    if "smallest" in summary:
        lines.append(
            f"the smallest that it fits on: {summary['smallest'] or 'none of the list'}"
        )
    return lines


def format_bytes(count: float) -> str:
    """Returns a number of bytes with its unit.

    >>> format_bytes(13.25 * 2**30), format_bytes(300e3), format_bytes(0)
    ('13.2 GiB', '293 KiB', '0')
    """
    return format_scaled(count, 1024, ("", " KiB", " MiB", " GiB", " TiB"))


_METRIC = ("", " k", " M", " G", " T", " P")


def format_scaled(x: float, base: float = 1000, units: Sequence[str] = _METRIC) -> str:
    """Returns a number with three digits and the prefix of its power.

    >>> format_scaled(4.306e16), format_scaled(2.5e9)
    ('43.1 P', '2.5 G')
    """
    power = 0
    while x >= base and power + 1 < len(units):
        x, power = x / base, power + 1
    return f"{x:.3g}{units[power]}"
