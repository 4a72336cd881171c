"""Figures that others have published, to stand beside measured ones.

In: the names of sets. Out: a Markdown table, marked as published; nothing here was
measured by this project. From the DeepSeekMath report (2024), zero-shot chain of
thought, accuracy in %.
"""

from __future__ import annotations

from collections.abc import Sequence

SETS = ("gsm8k", "math", "mgsm_zh", "cmath")

_TEXT = """\
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

CHAIN_OF_THOUGHT: dict[str, dict[str, str]] = {
    name: dict(zip(SETS, figures.split("/"), strict=True))
    for line in _TEXT.splitlines()
    for name, figures in [line.rsplit(" ", 1)]
}


def table(sets: Sequence[str]) -> str:
    """The published figures on those of `sets` that have any; "" where none has.

    >>> print(table(["math"]).splitlines()[-1])
    | DeepSeekMath-RL 7B | 51.7 |
    """
    known = [name for name in sets if name in SETS]
    if not known:
        return ""
    lines = [
        "Published, not measured here (DeepSeekMath, 2024; chain of thought, %):",
        "",
        "| model | " + " | ".join(known) + " |",
        "|---|" + "---|" * len(known),
    ]
    for model, figures in CHAIN_OF_THOUGHT.items():
        cells = " | ".join(figures[name] for name in known)
        lines.append(f"| {model} | {cells} |")
    return "\n".join(lines)
