"""Few-shot prompts, for base models that follow no instruction.

In: a set's name and an example. Out: a prompt of worked examples followed by the
question, and the mark at which a model has gone on to a question of its own.

GSM8K and MATH take worked examples from their own training files, drawn at a fixed
seed; the others take those below, which were written for this project, so that figures
are near to, and not the same as, those of the reports' own demonstrations.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_jax.data import datasets
from grpo_jax.data.example import Example
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

Shot = tuple[str, str]  # question, worked answer


@dataclass(frozen=True)
class Format:
    """How a set's prompt is written: labels, and how an answer ends."""

    question: str
    answer: str
    ends: str  # of a worked answer; {} is the final answer
    shots: int
    source: str  # a set with a training file, or a key of WRITTEN

    @property
    def stop(self) -> str:
        """What begins the next question."""
        return f"\n{self.question}"


_GSM = Format("Q:", "A:", "The answer is {}.", 8, "gsm8k")
_MATH = Format(
    "Problem:",
    "Solution:",
    "Final Answer: The final answer is ${}$. I hope it is correct.",
    4,
    "math",
)
_ENDS_ZH = "所以答案是 {}。"
_ZH = Format("问题：", "答案：", _ENDS_ZH, 6, "zh")
_CHOICE = dataclasses.replace(_MATH, ends="The final answer is ({}).", source="sat")
FORMATS = {
    "gsm8k": _GSM,
    "gsm_hard": _GSM,
    "svamp": _GSM,
    "mawps": _GSM,
    "math": _MATH,
    "math500": _MATH,
    "ocw": dataclasses.replace(_MATH, source="ocw"),
    "sat": _CHOICE,
    "mmlu_stem": dataclasses.replace(_CHOICE, source="mmlu_stem"),
    "cmath": _ZH,
    "gaokao_mathcloze": dataclasses.replace(_ZH, shots=5, source="cloze"),
    "gaokao_mathqa": dataclasses.replace(_ZH, shots=5, source="choice_zh"),
    "mgsm_zh": _ZH,
    **{f"mgsm_{language}": _GSM for language in ("de", "en", "es", "fr", "ja")},
}
SEED = 0
LONGEST = 400  # characters of a drawn worked answer: eight of them leave room


def find(name: str) -> Format:
    """The format of a set's few-shot prompts.

    >>> find("gsm8k").shots, find("cmath").stop
    (8, '\\n问题：')
    """
    if name not in FORMATS:
        raise GrpoError(
            f"set {name!r}: no few-shot prompt; ask it without --few-shot, or one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name]


def prompt(name: str, example: Example, *, data_dir: str | None = None) -> Example:
    """The example with its few-shot prompt as the question.

    >>> print(prompt("cmath", Example("2加3等于几？")).question[-23:])
    答案是 8。
    <BLANKLINE>
    问题： 2加3等于几？
    答案：
    """
    form = find(name)
    blocks = [
        f"{form.question} {question}\n{form.answer} {answer}"
        for question, answer in _shots(form, data_dir)
    ]
    blocks.append(f"{form.question} {example.question}\n{form.answer}")
    return dataclasses.replace(example, question="\n\n".join(blocks))


def cut(text: str, form: Format) -> str:
    """A completion up to where the model asks itself the next question.

    >>> cut(" It is 3.\\n\\nQ: And 4 + 4?", find("gsm8k"))
    ' It is 3.\\n'
    """
    return text.partition(form.stop)[0]


def stop_ids(tokenizer: Tokenizer, form: Format) -> list[list[int]]:
    """The mark as the token ids that it has after a line break; or [].

    Only to end a row early: what counts is `cut`.
    """
    ids = tokenizer.encode(f"1.\n\n{form.question}")
    for n in range(1, len(ids)):
        if tokenizer.decode(ids[-n:]) == form.question:
            return [ids[-n:]]
    return []


@functools.lru_cache(32)
def _shots(form: Format, data_dir: str | None) -> Sequence[Shot]:
    if form.source not in WRITTEN:
        return _draw(form, data_dir)
    shots = [(q, f"{a} {form.ends.format(x)}") for q, a, x in WRITTEN[form.source]]
    return shots[: form.shots]


def _draw(form: Format, data_dir: str | None) -> Sequence[Shot]:
    """Worked examples from a set's training file, the same ones on every machine."""
    train = datasets.load(
        form.source, "train", data_dir=data_dir, require=("solution",)
    )
    order = random.Random(SEED).sample(range(len(train)), 50 * form.shots)
    shots = []
    for index in order:
        example = train[index]
        if len(example.solution) <= LONGEST and "[asy]" not in example.question:
            ends = form.ends.format(example.answer)
            shots.append((example.question, f"{example.solution}\n{ends}"))
    return shots[: form.shots]


# Question, worked answer, final answer. All written for this project.
WRITTEN: dict[str, list[tuple[str, str, str]]] = {
    "zh": [
        (
            "书架上有24本书，借走了9本，又还回来4本，现在有多少本书？",
            "借走9本后剩24-9=15本，还回4本后是15+4=19本。",
            "19",
        ),
        (
            "一箱苹果重12千克，5箱这样的苹果一共重多少千克？",
            "每箱12千克，5箱重12×5=60千克。",
            "60",
        ),
        (
            "小华每分钟走65米，从家到学校走了8分钟，又走了30米才到校门，"
            "家到校门有多少米？",
            "8分钟走65×8=520米，再加30米，一共520+30=550米。",
            "550",
        ),
        (
            "一根绳子长3.6米，剪去它的1/4，还剩多少米？",
            "剪去3.6×1/4=0.9米，还剩3.6-0.9=2.7米。",
            "2.7",
        ),
        (
            "果园里梨树有48棵，梨树是桃树的3/4，桃树有多少棵？",
            "桃树的3/4是48棵，桃树有48÷3/4=48×4/3=64棵。",
            "64",
        ),
        (
            "一个长方形的周长是46厘米，长比宽多7厘米，宽是多少厘米？",
            "设宽是x厘米，长是x+7厘米，2(x+x+7)=46，x+x+7=23，2x=16，x=8。"
            "检验：长是15厘米，周长是2×(15+8)=46厘米。",
            "8",
        ),
    ],
    "cloze": [
        (
            "已知 $f(x)=x^{2}-4x+7$, 则 $f(x)$ 的最小值为 $(\\quad)$.",
            "配方得 $f(x)=(x-2)^{2}+3$, 当 $x=2$ 时取最小值 $3$.",
            "$3$",
        ),
        (
            "等差数列 $\\{a_{n}\\}$ 中, $a_{2}=5$, $a_{5}=14$, 则 $a_{10}=(\\quad)$.",
            "公差 $d=\\frac{14-5}{3}=3$, 于是 $a_{10}=a_{5}+5d=14+15=29$.",
            "$29$",
        ),
        (
            "已知向量 $\\vec{a}=(1,3)$, $\\vec{b}=(m,-2)$, 若 "
            "$\\vec{a} \\perp \\vec{b}$, 则 $m=(\\quad)$.",
            "由 $\\vec{a} \\cdot \\vec{b}=m-6=0$ 得 $m=6$.",
            "$6$",
        ),
        (
            "$\\left(x+\\frac{2}{x}\\right)^{4}$ 的展开式中常数项为 $(\\quad)$, "
            "各项系数之和为 $(\\quad)$.",
            "通项为 $\\mathrm{C}_{4}^{k} 2^{k} x^{4-2k}$, 令 $k=2$ 得常数项 "
            "$6\\times4=24$; 令 $x=1$ 得各项系数之和 $3^{4}=81$.",
            "$24$;$81$",
        ),
        (
            "圆 $x^{2}+y^{2}-6x+2y+6=0$ 的半径为 $(\\quad)$.",
            "配方得 $(x-3)^{2}+(y+1)^{2}=4$, 半径为 $2$.",
            "$2$",
        ),
    ],
    "choice_zh": [
        (
            "设集合 $A=\\{1,2,3\\}$, $B=\\{x \\mid x^{2}-x-2=0\\}$, 则 $A \\cap B=$ "
            "($\\quad$)\n从以下选项中选择：\n"
            "(A) $\\{1\\}$ (B) $\\{2\\}$ (C) $\\{-1,2\\}$ (D) $\\{1,2\\}$",
            "方程的根为 $-1$ 和 $2$, 所以 $A \\cap B=\\{2\\}$.",
            "B",
        ),
        (
            "复数 $z=(2+i)(1-2i)$ 的虚部为 ($\\quad$)\n从以下选项中选择：\n"
            "(A) $4$ (B) $3$ (C) $-3$ (D) $-4$",
            "$z=2-4i+i-2i^{2}=4-3i$, 虚部为 $-3$.",
            "C",
        ),
        (
            "函数 $y=\\sin \\left(2x+\\frac{\\pi}{5}\\right)$ 的最小正周期是 "
            "($\\quad$)\n"
            "从以下选项中选择：\n"
            "(A) $\\frac{\\pi}{2}$ (B) $\\pi$ (C) $2\\pi$ (D) $4\\pi$",
            "最小正周期 $T=\\frac{2\\pi}{2}=\\pi$.",
            "B",
        ),
        (
            "“$x>3$” 是 “$x^{2}>9$” 的 ($\\quad$)\n从以下选项中选择：\n"
            "(A) 充分不必要条件 (B) 必要不充分条件 (C) 充要条件 "
            "(D) 既不充分也不必要条件",
            "$x>3$ 时 $x^{2}>9$ 成立; 反之 $x=-4$ 时 $x^{2}>9$ 而 $x<3$.",
            "A",
        ),
        (
            "从 $1,2,3,4,5$ 中任取两个不同的数, 它们的和为偶数的概率是 ($\\quad$)\n"
            "从以下选项中选择：\n"
            "(A) $\\frac{1}{5}$ (B) $\\frac{3}{10}$ (C) $\\frac{1}{2}$ "
            "(D) $\\frac{2}{5}$",
            "共有 $10$ 种取法, 同为奇数有 $3$ 种, 同为偶数有 $1$ 种, 概率是 "
            "$\\frac{4}{10}=\\frac{2}{5}$.",
            "D",
        ),
    ],
    "ocw": [
        (
            "A lens has a focal length of $20 \\mathrm{~cm}$. An object stands "
            "$60 \\mathrm{~cm}$ in front of it. At what distance behind the lens, in "
            "$\\mathrm{cm}$, does the image form?",
            "With $\\frac{1}{f}=\\frac{1}{s}+\\frac{1}{s'}$, "
            "$\\frac{1}{s'}=\\frac{1}{20}-\\frac{1}{60}=\\frac{2}{60}$, "
            "so $s'=30 \\mathrm{~cm}$.",
            "30",
        ),
        (
            "Find the general solution of $y^{\\prime}+3 y=6$. Use $C$ for the "
            "constant of integration.",
            "A constant solution is $y=2$; the homogeneous equation has the solutions "
            "$C e^{-3 x}$.",
            "2+C e^{-3 x}",
        ),
        (
            "A photon has a wavelength of $500 \\mathrm{~nm}$. What is its energy in "
            "joules, to three significant figures?",
            "$E=h c / \\lambda=6.626 \\times 10^{-34} \\cdot 2.998 \\times 10^{8} / "
            "\\left(5.00 \\times 10^{-7}\\right)=3.97 \\times 10^{-19}$.",
            "3.97 \\times 10^{-19}",
        ),
        (
            "A mass $m$ hangs from a spring of constant $k$ and oscillates without "
            "friction. Write the equation of motion for its displacement $x$ from "
            "equilibrium.",
            "The restoring force is $-k x$, and Newton's second law gives "
            "$m \\ddot{x}=-k x$.",
            "m \\ddot{x}+k x=0",
        ),
    ],
    "sat": [
        (
            "If $4 x-7=13$, what is the value of $2 x+1$ ?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) 5 (B) 9 (C) 11 (D) 21",
            "Adding 7 gives $4 x=20$, so $x=5$ and $2 x+1=11$.",
            "C",
        ),
        (
            "A taxi charges a fee of $\\$3$ and $\\$2$ for each mile. Which equation "
            "gives the total charge $c$, in dollars, for $m$ miles?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) $c=2 m+3$ (B) $c=3 m+2$ (C) $c=5 m$ (D) $c=2(m+3)$",
            "The fee is paid once and $2$ dollars are paid for each of $m$ miles, so "
            "$c=2 m+3$.",
            "A",
        ),
        (
            "The function $f$ is defined by $f(x)=(x-1)(x+6)$. What is the sum of the "
            "zeros of $f$ ?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) -7 (B) -6 (C) 5 (D) -5",
            "The zeros are $1$ and $-6$, and their sum is $-5$.",
            "D",
        ),
        (
            "A shirt costs $\\$40$ after a discount of $20 \\%$. What was its price "
            "before the discount?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) $\\$48$ (B) $\\$50$ (C) $\\$52$ (D) $\\$60$",
            "$80 \\%$ of the price is $40$ dollars, so the price was $40 / 0.8=50$ "
            "dollars.",
            "B",
        ),
    ],
    "mmlu_stem": [
        (
            "A ball is dropped and falls freely from rest. About how far does it fall "
            "in the first two seconds?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) 5 m, (B) 10 m, (C) 20 m, (D) 40 m",
            "The distance is $\\frac{1}{2} g t^{2}$, with $g$ about 10 m/s² and "
            "$t=2$ s: $\\frac{1}{2} \\cdot 10 \\cdot 4=20$ m.",
            "C",
        ),
        (
            "Which of these structures is found in plant cells and not in animal cells?"
            "\nWhat of the following is the right choice? Explain your answer.\n"
            "(A) Cell wall, (B) Nucleus, (C) Ribosome, (D) Mitochondrion",
            "Both kinds of cell have a nucleus, ribosomes and mitochondria; only plant "
            "cells are enclosed by a wall of cellulose.",
            "A",
        ),
        (
            "What is the worst-case number of comparisons of a binary search in a "
            "sorted list of n items?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) O(1), (B) O(log n), (C) O(n), (D) O(n log n)",
            "Each comparison halves the part of the list that is left, so that about "
            "log n of them are enough.",
            "B",
        ),
        (
            "How many moles of hydrogen gas are needed to make 6 moles of water from "
            "hydrogen and oxygen?\n"
            "What of the following is the right choice? Explain your answer.\n"
            "(A) 2, (B) 3, (C) 12, (D) 6",
            "In 2 H₂ + O₂ → 2 H₂O each mole of water takes one mole of hydrogen, so "
            "that 6 moles are needed.",
            "D",
        ),
    ],
}
