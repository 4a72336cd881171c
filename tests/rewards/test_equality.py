"""Answers: what is extracted, and which answers are equal, by each policy line."""

import json
import os
import time
from pathlib import Path

import pytest

from grpo_jax.rewards import answers
from grpo_jax.rewards.grading import algebra, expressions, notation, worker_pool

EXTRACTED = [
    ("1 + 2 = 3\n#### ", None),  # cut off before it was stated
    ("So the final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
    ("First \\boxed{1}, then \\boxed{\\frac{2}{3}}.", "\\frac{2}{3}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("It is \\boxed{7}, and so \\boxed{\\frac{1}{", "7"),  # cut off in its last box
    ("\\boxed{} is empty, the answer is 4.", "4"),
    ("6 * 7 = 42. The answer is: $42$. Done 3 times.", "42"),
    ("The answer is 3.5.\n\nQ: What is 9?", "3.5"),
    ("The answer is **$18** per day.", "18 per day"),
    ("He leaves at 4. The answer is 4:30 p.m.", "4:30 p.m."),
    ("所以一共 3+4=7 个。答案是：7。", "7"),
    ("答案为 $\\frac{3}{4}$。", "\\frac{3}{4}"),
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"),
    ("The answer is <<8=8>>8.\n#### 8", "8"),
    ("#### 1,234", "1,234"),
    ("```python\nprint(6*7)\n```\n```output\n42\n```\n", "42"),
    ("```output\n1\n```\nagain\n```output\n12.5\n```", "12.5"),
    ("```output\nRuntime errors: name 'x' is not defined, line 3\n```\n", None),
    ("The tool says 12\n```output\n40\n```\nso it is \\boxed{41}", "41"),
    ("10 - 3 leaves 7 and 5-3", "3"),
    ("It costs 1,234.50 dollars", "1,234.50"),
    ("a temperature of -5 degrees", "-5"),
    ("so 3/4 of it", "3/4"),
    ("一共有１２个", "12"),
    ("I do not know.", None),
    ("", None),
]


@pytest.mark.parametrize("text, expected", EXTRACTED)
def test_extraction_follows_deepseekmaths_order(text, expected):
    found = answers.extract(text)
    if expected is None or found is None:
        assert found is expected
    else:
        assert found == expected or answers.equivalent(found, expected)
        assert found[-1] not in "。,:"


# prediction | reference, by policy line; each is tried in both directions.
EQUAL = r"""
3\frac{1}{2} | 7/2
-3 1/2 | -3.5
3½ | \frac72
−５ | -5
1,234.0 | 1234
5\,000\,000 | 5 \times 10^6
1.5e3 | 1500
3 million | 3{,}000{,}000
1.2亿 | 120000000
0.\overline{3} | \frac13
0.3333333333333333 | 1/3
50\% | 0.5
50 percent | 50
百分之20 | 20\%
5 cm | 5
12平方厘米 | 12 square centimeters
60 mph | 60 miles per hour
$5.00 | 5 dollars
18（颗） | 18颗
3.6千克 | 3.6 kg
52° | 52
6\frac{1}{6}\text{ feet} | \frac{37}{6}
[1,2) | 1 \le x < 2
(2,\infty) | \{x \mid x>2\}
x\ne 1 | (-\infty,1)\cup(1,\infty)
x>1, x<5 | (1,5)
3>x>1 | (1,3)
-x \ge -1 | x \le 1
|x|<1 | (-1,1)
2, 3 | \{3, 2\}
x=3 或 x=-2 | -2, 3
\pm1, \pm2 | -2,-1,1,2
1\pm\sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
x=1, y=2 | (1,2)
p=5,q=2;p=7,q=2 | (5,2),(7,2)
100,200,300 | 100, 200, 300
(0;0;6) | (0, 0, 6)
y=2x+3 | 2x-y+3=0
k=\frac13 | 1/3
f^{-1}(x)=\frac{x+1}{3} | \frac{x+1}{3}
r = \frac{31}{5} = 6.2 | 6.2
\frac{NO}{BO}=\frac12 | 0.5
\begin{pmatrix}0.02\\1\\\end{pmatrix} | \begin{bmatrix}1/50\\1\end{bmatrix}
2021_{\text{three}} | 2021_3
4:30 p.m. | \text{4:30 PM}
4:6 | 2:3
1:2 | 0.5
1:2:3 | 2:4:6
(B) | \text{b}
ACD | A, C, D
①② | ②，①
\textbf{Friday} | friday
充分不必要条件 | \text{充分不必要}
\varnothing | \{\}
\text{all real numbers} | (-\infty,\infty)
0.75i | \frac34 i
2√3 | \sqrt{12}
(x-1)(x+2) | x^2+x-2
\tan 45^\circ | 1
\log_2 8 | 3
{10 \choose 3} | 120
x \equiv 3 \pmod{5} | x\equiv 3\pmod 5
"""
DIFFERENT = r"""
500 | 5
0.05 | 5
5000% | 5
0.5% | 50%
5 cm | 5 m
12厘米 | 12平方厘米
45^\circ | 45\%
3 hours | 3 minutes
1.41 | \sqrt{2}
1.41421356237 | \sqrt{2}
0.33 | \frac13
1\cdot\frac13 | \frac43
2^{-99} | 2^{-98}
100000000000000000001 | 100000000000000000000
(1,2) | (2,1)
(1,2) | [1,2]
12,28 | [12,28]
(15,600) | 15,600
1 | 1,2
\pm3 | 3
x>5 | x\ge5
x=2y+3 | y=2x+3
1 | 2x+z=1
10 | 10!
1011_2 | 1011_3
61_3 | 2021_3
1:30 pm | 1:30 am
56 | 5:6
1:2:3 | 1:6
\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\text{Yes} | No
\emptyset | 0
\frac35x | \frac35
\frac34 | \frac34i
p-q | q-p
\ln 2 | 2
nan | 0
\text{} | 1
"""


def _pairs(block):
    return [tuple(line.split(" | ")) for line in block.strip().splitlines()]


@pytest.mark.parametrize("one, other", _pairs(EQUAL))
def test_equal_answers(one, other):
    assert answers.equivalent(one, other)
    assert answers.equivalent(other, one)


@pytest.mark.parametrize("one, other", _pairs(DIFFERENT))
def test_different_answers(one, other):
    assert not answers.equivalent(one, other)
    assert not answers.equivalent(other, one)


def test_an_empty_reference_equals_nothing():
    assert not answers.equivalent("", "")
    assert not answers.equivalent("0", " ")


@pytest.mark.parametrize("text", [r"\lor", "or", ",", ";", r"\cup", r"\{\}", "()", "="])
def test_a_lone_separator_is_a_wrong_answer(text):
    assert not answers.equivalent(text, "1")
    assert not answers.equivalent("1", text)


def test_what_the_reader_cannot_read_goes_to_math_verify():
    integral = r"\int_0^1 2x \, dx"
    with pytest.raises(expressions.Unreadable):
        algebra.same_function(notation.normalize_notation(integral), "1")
    assert answers.equivalent(integral, "1")
    assert not answers.equivalent(integral, "2")


def test_rational_answers_need_no_worker(monkeypatch):
    def no_worker(*_):
        raise AssertionError("asked a worker")

    monkeypatch.setattr(worker_pool, "shared_pool", no_worker)
    pairs = ["1,234", "3/4", "(1, 2)"], ["1234", "0.75", "(1,2)"]
    assert worker_pool.grade_answers(*pairs) == [True, True, True]


def test_the_collected_cases_are_graded_as_people_would():
    root = os.environ.get("GRPO_JAX_DATA")
    if not root:
        pytest.skip("GRPO_JAX_DATA names no data folder")
    lines = (Path(root) / "grading_cases.jsonl").read_text("utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    worker_pool.grade_answers(
        [r"\sqrt{2}"], [r"2^{1/2}"]
    )  # a worker's start is not grading time
    began = time.monotonic()
    found = worker_pool.grade_answers(
        [case["prediction"] for case in cases], [case["reference"] for case in cases]
    )
    seconds = time.monotonic() - began
    wrong = [c for c, same in zip(cases, found, strict=True) if same != c["equal"]]
    false_positives = sum(not case["equal"] for case in wrong)
    accuracy = 1 - len(wrong) / len(cases)
    print(
        f"{len(cases)} pairs: {accuracy:.1%}, {false_positives} false positives,"
        f" {len(wrong) - false_positives} false negatives, {seconds:.1f} s"
    )
    assert accuracy >= 0.96
    assert false_positives <= 8
