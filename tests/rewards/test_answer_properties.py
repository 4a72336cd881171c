"""Properties of extraction, of grading and of the reader of completions.

Sets, families and numbers are compared with what brute force says of them.
"""

import itertools
import json
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo_jax.data.example import Example
from grpo_jax.errors import GrpoError
from grpo_jax.evaluation import completion_files
from grpo_jax.evaluation.completion_files import Completion
from grpo_jax.rewards import answers
from grpo_jax.rewards.grading import algebra, equality, kinds
from grpo_jax.rewards.grading.expressions import evaluate_rational

# Pieces that the rules look for, so that texts of them reach the rules.
PIECES = st.sampled_from(
    r"""\boxed{ \boxed \fbox{ } { ( ) [ ] \{ \} \frac \frac{ \sqrt \sqrt[3]{ ^ _ ^{ \pm
    \cup \cap \lor , ; . : = < > \le \ge \ne \in \mathbb{Z} \mathbb{R} \text{ \text{or}
    \begin{pmatrix} \end{pmatrix} \begin{array}{c} \end{array} \begin{cases} & \\ | !
    ' k \pi \infty \ldots ... … - + / * % \% $ $$ # #### 1 2 57 0.5 .3 1,234 3,141 x y
    i e answer is: answer: 答案是 答： 负 大于 和 或 根号 的平方 三 分之 百分之 ，、 。
    １ ½ ² √ ∞ ≤ negative least than squared between and or not twice seven cm dollars
    </think> <think> <answer> </answer> ```output ``` <|EOT|> </s> << >> \overline{3}
    A B (C) correct Antwort ist réponse est respuesta es 1.234 1\u202f234 \dot{3} ^\circ
    """.split()
    + ["\n"]
)
TEXTS = st.one_of(
    st.lists(st.one_of(PIECES, PIECES, st.just(" ")), max_size=30).map("".join),
    st.lists(PIECES, max_size=12).map(" ".join),
    st.text(max_size=60),
)


@given(TEXTS, st.sampled_from(["en", "de", "fr", "es", "zh", ""]))
def test_any_text_has_an_answer_or_none(text, language):
    found = answers.extract(text, language)
    assert found is None or found == found.strip() != ""
    columns = {"options": ["1", "2", "3"]}
    letters = kinds.extract_prediction(
        text, Example("?", "A", language=language, columns=columns)
    )
    assert letters is None or isinstance(letters, str)
    blanks = kinds.extract_prediction(text, Example("?", "1; 2", columns={"blanks": 2}))
    assert blanks is None or isinstance(blanks, str)


BALANCED = st.recursive(
    st.text("ab1 ,.\\frac", max_size=6).filter(lambda t: not t.endswith("\\")),
    lambda inner: st.lists(inner.map("{{{}}}".format) | inner, max_size=3).map("".join),
)


@given(BALANCED, st.text("{x \\", max_size=5), st.text("}x ", max_size=5))
def test_a_box_holds_what_stands_between_its_braces(content, before, after):
    assume(not before.endswith("\\"))
    text = rf"{before}\boxed{{{content}}}{after}"
    assert answers.find_boxed(text)[-1:] == [content]
    nested = rf"\boxed{{1}}, \boxed{{{content}\boxed{{2}}}}"
    assert answers.find_boxed(nested) == ["1", rf"{content}\boxed{{2}}"]


def _verdict(one, other, numbers):
    try:
        return equality.compare_strict(one, other, numbers)
    except equality.Undecided:
        return None


@given(TEXTS, TEXTS)
def test_any_two_texts_are_graded_alike_from_both_sides(one, other):
    """Without math-verify, which only a worker may ask."""
    for numbers in (equality.Exact(), algebra.Algebra()):
        assert bool(_verdict(one, other, numbers)) == bool(
            _verdict(other, one, numbers)
        )
        if one.strip():
            assert _verdict(one, one, numbers) is True


@given(TEXTS)
def test_a_cleaned_answer_stays_what_it_is(text):
    """The empty answer is never right, and spaces and a box change nothing."""
    assert not equality.compare_strict("", text, equality.Exact())
    if text.strip() and "\\" not in text[-1:]:
        assert _verdict(f"  {text}\n", text, equality.Exact()) is True


FRACTIONS = st.builds(Fraction, st.integers(-3000, 3000), st.integers(1, 60))
SMALL = st.builds(Fraction, st.integers(-6, 6), st.integers(1, 4))


@st.composite
def written(draw, number):
    """A rational in one of its spellings."""
    n, d = number.numerator, number.denominator
    sign, n = ("-" if n < 0 else ""), abs(n)
    times = draw(st.integers(1, 5))
    forms = [
        rf"{sign}\frac{{{n * times}}}{{{d * times}}}",
        rf"{sign}{n * times}/{d * times}",
        rf"\dfrac{{{sign}{n}}}{{{d}}}",
        rf"${sign}\tfrac{{{n}}}{{{d}}}$",
        rf"x = {sign}\frac{{{n}}}{{{d}}}",
        rf"\boxed{{{sign}\frac{{{n}}}{{{d}}}}}",
        rf"({sign}{n})\div {d}",
    ]
    if sign:
        forms += [rf"\text{{negative }}\frac{{{n}}}{{{d}}}", f"负{n}/{d}"]
    if d > 1 and n > d:
        forms.append(rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}")
        forms.append(f"{sign}{n // d} {n % d}/{d}")
    if d == 1:
        forms += [
            f"{sign}{n:,}",
            f"{sign}{n}.0",
            f"{sign}{n}.",
            rf"{sign}{n}\text{{ cm}}",
        ]
        forms += [f"{sign}{n:,}".replace(",", r"\,"), rf"\text{{{sign}{n}}}"]
    elif 10_000 % d == 0:
        decimal = f"{n / d:.4f}".rstrip("0").rstrip(".")
        forms += [sign + decimal, sign + decimal.removeprefix("0")]
    return draw(st.sampled_from(forms))


@given(st.data(), FRACTIONS | SMALL, FRACTIONS | SMALL)
def test_numbers_are_equal_where_their_fractions_are(data, one, other):
    a, b = data.draw(written(one)), data.draw(written(one))
    assert equality.compare_strict(a, b, equality.Exact()), (a, b)
    if one != other:
        c = data.draw(written(other))
        assert not equality.compare_strict(a, c, equality.Exact()), (a, c)


ENDS = st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans())


@st.composite
def regions(draw):
    """(text, {points of 0, 1/2 … 4 that it holds}): a union, however it is written."""
    parts, held = [], set()
    for low, high, left, right in draw(st.lists(ENDS, min_size=1, max_size=3)):
        if low >= high:
            parts.append(rf"\{{{low}\}}")
            held.add(2 * low)
            continue
        style = draw(st.sampled_from("brackets relation builder".split()))
        signs = "\\le " if left else "<", "\\le " if right else "<"
        relation = f"{low}{signs[0]}x{signs[1]}{high}"
        parts.append(
            {
                "brackets": f"{'(['[left]}{low},{high}{')]'[right]}",
                "relation": relation,
                "builder": rf"\{{x\mid {relation}\}}",
            }[style]
        )
        held |= set(range(2 * low + (not left), 2 * high + right))
    related = any(part[0].isdigit() for part in parts)
    joint = r" \text{ or } " if related or draw(st.booleans()) else r"\cup "
    assume(len(parts) > 1 or parts[0][0] != "(")  # (1,2) may be a point as well
    return joint.join(parts), frozenset(held)


def _spans(held):
    """The same set of numbers in its shortest form, read off its points."""
    parts = []
    for _, run in itertools.groupby(
        enumerate(sorted(held)), lambda pair: pair[1] - pair[0]
    ):
        points = [point for _, point in run]
        low, high = points[0], points[-1]
        if low == high and low % 2 == 0:
            parts.append(rf"\{{{low // 2}\}}")
            continue
        left, right = "[("[low % 2], "])"[high % 2]
        parts.append(f"{left}{low // 2},{(high + 1) // 2}{right}")
    return r"\cup".join(parts)


@given(regions(), st.data())
def test_a_union_is_equal_to_its_shortest_form_only(one, data):
    text, held = one
    assume(held)
    assert equality.compare_strict(text, _spans(held), equality.Exact())
    # One point more or less, or one gap: another set.
    point = data.draw(st.integers(0, 4)) * 2
    other = held ^ {point}
    assume(other)
    changed = _spans(other)
    assume(r"\cup" in text + changed or "x" in text)
    assert not equality.compare_strict(text, changed, equality.Exact()), (text, changed)


@given(regions(), regions())
def test_unions_are_equal_where_they_hold_the_same_numbers(one, other):
    assume(r"\{" not in one[0] or "mid" in one[0] or "," in one[0] + other[0])
    same = equality.compare_strict(one[0], other[0], equality.Exact())
    assert same == (one[1] == other[1]), (one, other)


ROWS = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=1, max_size=3
    )
)
WAYS = [
    (r"\begin{pmatrix}", r"\end{pmatrix}"),
    (r"\begin{bmatrix}", r"\end{bmatrix}"),
    (r"\left(\begin{array}{ccc}", r"\end{array}\right)"),
    (r"\left[ \begin{array}{rrr} ", r" \end{array} \right]"),
    (r"\left(\begin{matrix}", r"\end{matrix}\right)"),
]


@given(ROWS, ROWS, st.sampled_from(WAYS), st.sampled_from(WAYS))
def test_matrices_are_equal_entry_by_entry(one, other, way, another):
    def text(rows, ends):
        body = r" \\ ".join(" & ".join(map(str, row)) for row in rows)
        return ends[0] + body + ends[1]

    assert equality.compare_strict(text(one, way), text(one, another), equality.Exact())
    same = equality.compare_strict(
        text(one, way), text(other, another), equality.Exact()
    )
    assert same == (one == other)
    turned = [list(column) for column in zip(*one, strict=True)]
    transposed = text(turned, way) + r"^{T}"
    assert equality.compare_strict(transposed, text(one, another), equality.Exact())


STEPS = st.tuples(st.integers(1, 4), st.integers(-4, 4))


@given(STEPS, STEPS, st.sampled_from("kn"), st.sampled_from("kn"))
def test_families_are_equal_where_they_have_the_same_members(one, other, k, n):
    def members(step, start):
        return {step * i + start for i in range(-40, 40)} & set(range(-20, 20))

    a = rf"x={one[0]}{k}\pi+{one[1]}\pi,\ {k}\in\mathbb{{Z}}"
    b = rf"\left\{{x\mid x={other[1]}\pi-{other[0]}{n}\pi ({n}\in Z)\right\}}"
    same = equality.compare_strict(a, b, algebra.Algebra())
    # Beginnings that lie further apart than it counts are not found to be the same.
    near = abs(one[1] - other[1]) <= 3 * one[0]
    assert same == (members(*one) == members(*other) and near)


@given(st.integers(0, 10**9), st.integers(0, 99), st.sampled_from(["de", "es", "fr"]))
def test_numbers_as_other_languages_group_them(whole, cents, language):
    english = f"{whole:,}.{cents:02d}"
    mark = {"de": ".", "es": ".", "fr": "\u202f"}[language]
    local = english.replace(",", "_").replace(".", ",").replace("_", mark)
    for text in (f"#### {local}", f"So {local} €.", rf"\boxed{{{local}}}"):
        found = answers.extract(text, language)
        assert found is not None and evaluate_rational(found) == Fraction(
            f"{whole}.{cents:02d}"
        )
    phrase = {"de": "Die Antwort ist", "es": "La respuesta es", "fr": "La réponse est"}
    found = answers.extract(f"{phrase[language]} {local}.")
    assert found is not None and evaluate_rational(found) == Fraction(
        f"{whole}.{cents:02d}"
    )


# -- files of completions --------------------------------------------------------------
SET = [Example(f"question {n}", str(n), id=f"own/{n}") for n in range(3)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
HUGE = st.sampled_from(
    [10**400, -1, 3, True, 1.0, float("nan"), float("inf"), "\ud800"]
)
FIELDS = {
    "set": st.just("own") | JSON,
    "id": st.sampled_from(["own/0", "own/1", "own/2"]) | JSON,
    "index": st.sampled_from([0, 1, 2]) | JSON | HUGE,
    "question": st.sampled_from([e.question for e in SET]) | JSON,
    "completion": st.text(max_size=9) | JSON | HUGE,
    "completions": st.lists(st.text(max_size=9), max_size=3) | JSON,
    "mode": st.sampled_from(["cot", "tool"]) | JSON,
    "temperature": st.sampled_from([0, 0.0, 1, 0.7]) | JSON | HUGE,
    "cut_off": st.lists(st.booleans(), max_size=3) | JSON,
}
MADE = st.fixed_dictionaries({}, optional=FIELDS).map(json.dumps)
LINES = st.lists(
    st.one_of(
        MADE.map(str.encode),
        JSON.map(lambda x: json.dumps(x).encode()),
        st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")),
        st.sampled_from([b"[" * 100_000, b'{"id":', b"\xff{}", b"1" * 5000, b"NaN"]),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("made") / "completions.jsonl"


@given(lines=LINES)
def test_any_file_of_completions_is_read_or_refused_in_one_line(file, lines):
    file.write_bytes(b"\n".join(lines))
    try:
        found = completion_files.read_completions(file, {"own": SET})
    except GrpoError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        str(error).encode()  # it can be printed
        return
    for (mode, kind), group in found["own"].items():
        assert mode in ("cot", "tool") and kind in completion_files.KINDS
        assert len(group.completions) == 3
        assert len({len(row) for row in group.completions}) == 1
        assert group.temperature is None or 0 <= group.temperature < float("inf")


NAMES = st.sampled_from(["id", "index", "question"])


@given(
    texts=st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=3, max_size=3),
    order=st.permutations(list(itertools.product(range(3), range(2)))),
    names=st.lists(NAMES, min_size=6, max_size=6),
)
def test_completions_come_back_whatever_order_and_name_they_have(
    file, texts, order, names
):
    lines, expected = [], [[], [], []]
    for (n, i), name in zip(order, names, strict=True):
        asked = {"id": f"own/{n}", "index": n, "question": f" question  {n}"}[name]
        lines.append(json.dumps({name: asked, "completion": texts[n][i]}))
        expected[n].append(Completion(texts[n][i]))
    file.write_text("\n".join(lines))
    (group,) = completion_files.read_completions(file, {"own": SET})["own"].values()
    assert group.completions == expected and group.temperature is None


@pytest.mark.parametrize(
    "row, message",
    [
        ({"index": True}, "no question with index True"),
        ({"index": 1.0}, "no question with index 1.0"),
        ({"id": "\ud800\n"}, r"no question with id '\\ud800\\n'"),
        ({"index": 1, "temperature": float("nan")}, "temperature nan is not a number"),
        ({"index": 1, "temperature": float("inf")}, "temperature inf is not a number"),
        ({"index": 1, "temperature": 10**400}, "temperature 1000.* is not a number"),
        ({"index": 1, "temperature": True}, "temperature True is not a number"),
        ({"index": 1, "mode": "a\nb"}, r"mode 'a\\nb' is neither"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    rows = [{"index": 0, "completion": "0"}, {"completion": "1", **row}]
    file = tmp_path / "completions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(GrpoError, match=f":2: .*{message}") as error:
        completion_files.read_completions(file, {"own": SET})
    str(error.value).encode()


def test_the_sets_that_a_file_has_are_named_on_one_line(tmp_path):
    file = tmp_path / "completions.jsonl"
    file.write_text(json.dumps({"set": "a\n\ud800", "index": 0, "completion": "0"}))
    with pytest.raises(GrpoError, match="it has a \ufffd$") as error:
        completion_files.read_completions(file, {"own": SET})
    str(error.value).encode()


@pytest.mark.parametrize(
    "row",
    [
        {"index": 1, "completions": "ab", "cut_off": [True, None]},
        {"index": 1, "completions": [1], "cut_off": [None]},
        {"index": 1, "completions": {"a": 1}, "cut_off": [None]},
        {"index": 1, "completions": ["a"], "cut_off": ["yes"]},
        {"index": 1, "completions": ["a"], "cut_off": []},
        {"index": 1.0, "completions": ["a"], "cut_off": [None]},
        {"index": "1", "completions": ["a"], "cut_off": [None]},
        {"index": True, "completions": ["a"], "cut_off": [None]},
        {"index": float("inf"), "completions": ["a"], "cut_off": [None]},
        {"index": -1, "completions": ["a"], "cut_off": [None]},
        [1],
        None,
    ],
)
def test_a_line_that_is_not_of_our_making_is_refused(tmp_path, row):
    file = tmp_path / "own.jsonl"
    file.write_text(f'{{"settings": {{}}}}\n{json.dumps(row)}\n')
    with pytest.raises(
        GrpoError, match="own.jsonl:2: not a line of this file's making"
    ):
        completion_files.CompletionLog(file, {}, restart=False)


@given(lines=LINES)
def test_any_file_of_our_own_goes_on_or_is_refused_in_one_line(file, lines):
    settings = {"temperature": 0}
    first = json.dumps({"settings": settings}).encode()
    made = json.dumps({"index": 1, "completions": ["a"], "cut_off": [None]}).encode()
    file.write_bytes(b"\n".join([first, *lines, made, b""]))
    try:
        log = completion_files.CompletionLog(file, settings, restart=False)
    except GrpoError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        return
    assert log.rows[1] == [Completion("a")]
    for index, row in log.rows.items():
        assert isinstance(index, int) and all(isinstance(c.text, str) for c in row)
