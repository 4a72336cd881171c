"""Published figures, to be shown beside measured ones and marked as published.

None of them was measured by this project. They are accuracies in % from the
DeepSeekMath report (Shao et al. 2024): zero-shot chain of thought, tool-integrated
reasoning, and the base model's few-shot chain of thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SETS = ("gsm8k", "math", "mgsm_zh", "cmath")
NOTE = "published, not measured here (DeepSeekMath, 2024)"

_COT = """\
Gemini Ultra 94.4/53.2/–/–
GPT-4 92.0/52.9/–/86.0
Inflection-2 81.4/34.8/–/–
GPT-3.5 80.8/34.1/–/73.8
Gemini Pro 86.5/32.6/–/–
Grok-1 62.9/23.9/–/–
Baichuan-3 88.2/49.2/–/–
GLM-4 87.6/47.9/–/–
InternLM2-Math 20B 82.6/37.7/–/–
Qwen 72B 78.9/35.2/–/–
Math-Shepherd-Mistral 7B 84.1/33.0/–/–
WizardMath-v1.1 7B 83.2/33.0/–/–
DeepSeek-LLM-Chat 67B 84.1/32.6/74.0/80.3
MetaMath 70B 82.3/26.6/66.4/70.9
SeaLLM-v2 7B 78.2/27.5/64.8/–
ChatGLM3 6B 72.3/25.7/–/–
WizardMath-v1.0 70B 81.6/22.7/64.8/65.4
DeepSeekMath-Instruct 7B 82.9/46.8/73.2/84.6
DeepSeekMath-RL 7B 88.2/51.7/79.6/88.8"""
_TOOL = """\
GPT-4 Code Interpreter 97.0/69.7/–/–
InternLM2-Math 20B 80.7/54.3/–/–
DeepSeek-LLM-Chat 67B 86.7/51.1/76.4/85.4
ToRA 34B 80.7/50.8/41.2/53.4
MAmmoTH 70B 76.9/41.8/–/–
DeepSeekMath-Instruct 7B 83.7/57.4/72.0/84.3
DeepSeekMath-RL 7B 86.7/58.8/78.4/87.6"""
_BASE_SETS = ("gsm8k", "math", "ocw", "sat", "mmlu_stem", "cmath")
_BASE_SETS += ("gaokao_mathcloze", "gaokao_mathqa")
_BASE = "DeepSeekMath-Base 7B 64.2/36.2/15.4/84.4/56.5/71.7/20.3/35.3"

Figures = dict[str, dict[str, str]]  # model → set → accuracy in %, or –


def _read(text: str, sets: Sequence[str]) -> Figures:
    return {
        name: dict(zip(sets, figures.split("/"), strict=True))
        for line in text.splitlines()
        for name, figures in [line.rsplit(" ", 1)]
    }


FIGURES = {
    "cot": _read(_COT, SETS),
    "tool": _read(_TOOL, SETS),
    "few_shot": _read(_BASE, _BASE_SETS),
}
TITLES = {
    "cot": "chain of thought",
    "tool": "tool-integrated reasoning",
    "few_shot": "few-shot chain of thought",
}


def find_figures(sets: Sequence[str], modes: Sequence[str]) -> dict[str, Figures]:
    """Returns mode → model → set → accuracy in %, for sets that have published figures.

    Args:
      sets: names of sets.
      modes: of "cot", "tool" and "few_shot".

    >>> find_figures(["ocw", "svamp"], ["cot", "few_shot"])
    {'few_shot': {'DeepSeekMath-Base 7B': {'ocw': '15.4'}}}
    """
    found: dict[str, Figures] = {}
    for mode in modes:
        for model, row in FIGURES[mode].items():
            if known := {n: row[n] for n in sets if row.get(n, "–") != "–"}:
                found.setdefault(mode, {})[model] = known
    return found


def figures_for_json(sets: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """Returns the published figures as results.json holds them; {} if none."""
    found = find_figures(sets, modes)
    return {"note": NOTE, "unit": "%", **found} if found else {}
