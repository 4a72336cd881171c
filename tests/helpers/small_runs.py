"""Runs that take seconds: configs/tiny.py made smaller, and questions of its own."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import Config
from grpo_jax.training.config_checks import validate_config

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.ffn": 16,
    "sft_steps": 24,
    "sft.batch_size": 16,
    "sft.micro_rows": 8,
    "sft.learning_rate": 2e-2,
    "sft.warmup_steps": 2,
    "rl_steps": 4,
    "learning_rate": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "questions_per_step": 8,
    "group_size": 4,
    "max_new_tokens": 12,
    "optimizer.micro_rows": 4,
    "checkpoint_every": 2,
    "eval.questions": 16,
    "eval.batch": 16,
}


def small_config(settings: Mapping[str, Any]) -> Config:
    """tiny.py's config with SMALL and these settings, by their dotted names."""
    config: Config = runpy.run_path(str(ROOT / "configs/tiny.py"))["get_config"]()
    for name, value in (SMALL | dict(settings)).items():
        outer, _, inner = name.rpartition(".")
        setattr(getattr(config, outer) if outer else config, inner, value)
    return validate_config(config)


def dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """{"eval__samples": 0} → {"eval.samples": 0}: settings as keyword arguments."""
    return {name.replace("__", "."): value for name, value in changes.items()}


def write_questions(file: Path, *, two_ways: bool = False) -> str:
    """81 questions whose answers take no arithmetic; `two_ways`: half are longer."""
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):
            answer = f"{a % 2 + 4}"  # not the sum
            text = f"{a}{b}\n#### {answer}" if two_ways and b % 2 else f"#### {answer}"
            row = {"question": f"{a}+{b}=?", "answer": answer, "solution": text}
            rows.append(json.dumps(row) + "\n")
    file.write_text("".join(rows))
    return str(file)
