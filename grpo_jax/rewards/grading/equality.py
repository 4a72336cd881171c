r"""Decides whether two answers are equal, by exact arithmetic or a given algebra.

Both answers are brought into one spelling (`notation.normalize_notation`), parsed into
a structure (`structure.parse_answer`) and matched. The rules: p % equals p and p/100,
but n never equals 100n. A missing unit is accepted, and a different unit is wrong.
Tuples are ordered, but comma lists are not. An interval equals its inequality. A
rounded decimal does not equal the exact answer.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from grpo_jax.rewards.grading import notation
from grpo_jax.rewards.grading.expressions import TooLarge, Unreadable, evaluate_rational
from grpo_jax.rewards.grading.extraction import MAX_CHARS
from grpo_jax.rewards.grading.notation import normalize_notation
from grpo_jax.rewards.grading.regions import is_region, normalize_region
from grpo_jax.rewards.grading.structure import (
    RELATION,
    Node,
    family_members,
    family_of,
    parse_answer,
)
from grpo_jax.rewards.grading.units import split_quantity
from grpo_jax.rewards.grading.wording import changes_value

MAX_MEMBERS = 64  # the largest length of a list

_BEGINNING = re.compile(r"(-?)(\d*\.\d{5,})\\ldots")
_GOES_ON = re.compile(r"\\(?:[lc]?dots)(?![A-Za-z])|\.\.\.|⋯")
_PLAIN = re.compile(
    r"(-?)(?:\\?\$)?((?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,11})?)\.?"
)


class Undecided(Exception):
    """Raised if a comparison needs more than rational arithmetic."""


def evaluate_exactly(compute: Callable, *args):
    """Returns `compute(*args)`, or None if an expression is too large.

    Raises:
      Undecided: an expression is outside the grammar of `compute`.
    """
    try:
        return compute(*args)
    except TooLarge:
        return None
    except Unreadable:
        raise Undecided from None


class Exact:
    """Compares leaves by rational arithmetic; raises `Undecided` for others."""

    def same(self, a: str, b: str) -> bool:
        """Returns whether two expressions have the same value."""
        x, y = (evaluate_exactly(evaluate_rational, text) for text in (a, b))
        if x is None or y is None:
            return False
        return x == y or _same_float(a, b, x, y)

    def proportional(self, a: str, b: str, positive: bool) -> bool:
        """Returns whether a = c·b with a constant c ≠ 0 (c > 0 if `positive`)."""
        raise Undecided

    def value(self, text: str) -> Fraction | None:
        """Returns the value of a real constant; None if the text is not one."""
        return evaluate_exactly(evaluate_rational, text)

    def close(self, a: str, b: str, within: float) -> bool:
        """Returns whether two constants differ by at most `within`."""
        x, y = (evaluate_exactly(evaluate_rational, text) for text in (a, b))
        return x is not None and y is not None and abs(x - y) <= within


def _same_float(a: str, b: str, x: Fraction, y: Fraction) -> bool:
    """Accepts a program's rounded output, such as 0.30000000000000004 for 0.3."""
    digits = [len(text.replace(".", "").strip("-0")) for text in (a, b) if "." in text]
    return max(digits, default=0) >= 15 and abs(x - y) <= Fraction(1, 10**13) * max(
        abs(x), abs(y)
    )


def match(a: Node, b: Node, numbers: Exact) -> bool:
    """Returns whether two structures are the same answer.

    Args:
      a: one answer.
      b: the other answer.
      numbers: compares the leaves.

    Raises:
      Undecided: the comparison needs more than `numbers` can decide.
    """
    if a.text and a.text == b.text:
        return True
    a, b = sorted((a, b), key=lambda node: node.kind)
    for one, other in ((a, b), (b, a)):
        if one.kind == "set" and len(one.items) == 1:
            return match(one.items[0], other, numbers)
    if "family" in (a.kind, b.kind):
        return _same_family(a, b, numbers)
    if is_region(a) or is_region(b):
        spans = [normalize_region(node, numbers.value) for node in (a, b)]
        if None not in spans:
            return spans[0] == spans[1]
        if a.kind == b.kind == "set" and {a.marks, b.marks} == {"or", "and"}:
            return False
    match (a.kind, b.kind):
        case ("assign", "assign") if a.items[0].text == b.items[0].text:
            return match(a.items[1], b.items[1], numbers)
        case ("assign" | "equation", "assign" | "equation"):
            return numbers.proportional(_difference(a), _difference(b), False)
        case ("assign", _):
            return match(a.items[1], b, numbers)
        case ("leaf", "leaf"):
            return match_leaves(a.text, b.text, numbers)
        case ("set", "set"):
            return _same_members(a.items, b.items, numbers)
        case ("tuple", "tuple") | ("matrix", "matrix") | ("chain", "chain"):
            if a.marks == b.marks and _same_items(a.items, b.items, numbers):
                return True
            if a.kind != "chain" or a.marks != b.marks or a.marks not in ("<", "l"):
                return False
            return numbers.proportional(_difference(a), _difference(b), True)
        case ("leaf", "set") if re.fullmatch("[A-H]{2,}", a.text):  # options ACD
            letters = sorted(notation.normalize_words(item.text) for item in b.items)
            return letters == sorted(a.text.lower())
        case ("set", "tuple") if b.marks == "()" and len(a.items) == len(b.items):
            if all(item.kind == "assign" for item in a.items):
                return _same_items(a.items, b.items, numbers)
        case ("matrix", "tuple") if b.marks == "()":
            rows = [row.items for row in a.items]
            if len(rows) > 1 and all(len(row) == 1 for row in rows):
                rows = [[row[0] for row in rows]]
            if len(rows) == 1 and len(rows[0]) == len(b.items):
                return _same_items(rows[0], b.items, numbers)
    kinds = {a.kind, b.kind}
    structured = "leaf" not in kinds and kinds & {"chain", "equation", "matrix"}
    if structured or (kinds == {"set", "tuple"} and RELATION.search(a.text + b.text)):
        raise Undecided
    return False


def _same_family(a: Node, b: Node, numbers: Exact) -> bool:
    """Compares families over an integer, whatever integer they start from."""
    if b.kind != "family":
        a, b = b, a
    letter = b.marks[0]
    family = a if a.kind == "family" else family_of(a, letter)
    if family is None or family.marks[1:] != b.marks[1:]:
        return False
    return any(
        match(form, b.items[0], numbers) for form in family_members(family, letter)
    )


def _difference(node: Node) -> str:
    left, right = node.items
    return f"({left.text})-({right.text})"


def _same_items(left: Sequence[Node], right: Sequence[Node], numbers: Exact) -> bool:
    return len(left) == len(right) and all(
        match(*pair, numbers) for pair in zip(left, right, strict=True)
    )


def _same_members(left: Sequence[Node], right: Sequence[Node], numbers: Exact) -> bool:
    """Returns whether each member of either list has an equal in the other."""
    if max(len(left), len(right)) > MAX_MEMBERS:
        return False
    return all(
        any(match(item, other, numbers) for other in others)
        for items, others in ((left, right), (right, left))
        for item in items
    )


def match_leaves(a: str, b: str, numbers: Exact) -> bool:
    """Compares answers without structure: text, times, ratios, bases and quantities.

    Args and errors are those of `match`, with cleaned text for `a` and `b`.
    """
    if notation.normalize_words(a) == notation.normalize_words(b):
        return True
    kinds = {notation.leaf_kind(a), notation.leaf_kind(b)}
    if changes_value(a) or changes_value(b) or kinds == {"text"}:
        return False
    for one, other in ((a, b), (b, a)):
        if begins := _BEGINNING.fullmatch(one):
            # 1.41421… equals a number with these first digits and more.
            sign, digits = begins.groups()
            ulp = 10.0 ** -len(digits.partition(".")[2])
            return numbers.close(f"{sign}{digits}5", other, 0.499999 * ulp)
        if _GOES_ON.search(one) and not _GOES_ON.search(other):
            return False
    if "time" in kinds:
        return notation.same_time(a, b)
    if "base" in kinds:
        return notation.same_base(a, b)
    quantities = [split_quantity(a), split_quantity(b)]
    (x, unit_x), (y, unit_y) = quantities
    if unit_x and unit_y and unit_x != unit_y:
        return False
    if "text" in kinds and not (x and y):
        return False
    if "ratio" in kinds:
        return _same_ratio(x.split(":"), y.split(":"), numbers)
    if numbers.same(x, y):
        return True
    shares = [f"({n})/100" if unit == "%" else n for n, unit in quantities]
    return (unit_x == "%") != (unit_y == "%") and numbers.same(*shares)


def _same_ratio(a: list[str], b: list[str], numbers: Exact) -> bool:
    """Compares ratios: 2:4 equals 1:2 and 1/2, and 1:2:3 equals 2:4:6."""
    if len(a) == 1 or len(b) == 1:
        return len(a) + len(b) == 3 and numbers.same("/".join(a), "/".join(b))
    return len(a) == len(b) and all(
        numbers.same(f"({x})({b[0]})", f"({y})({a[0]})")
        for x, y in zip(a[1:], b[1:], strict=True)
    )


def compare_strict(prediction: str, reference: str, numbers: Exact) -> bool:
    """Returns whether two answers are equal, with a given arithmetic.

    Args:
      prediction: the predicted answer, as written.
      reference: the reference answer, as written.
      numbers: `Exact`, or `algebra.Algebra` in a worker process.

    Raises:
      Undecided: the comparison needs more than `numbers` can decide.
    """
    prediction, reference = prediction.strip(), reference.strip()
    if prediction == reference:
        return bool(reference)
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return False
    x, y = (_PLAIN.fullmatch(text.strip("$")) for text in (prediction, reference))
    if x and y:  # most of GSM8K
        return _fraction(x) == _fraction(y)
    p, r = normalize_notation(prediction), normalize_notation(reference)
    if not p or not r:
        return False
    try:
        a, b = parse_answer(p), parse_answer(r)
        # 100,200,300 may be three numbers.
        grouped = (a.kind == "set") != (b.kind == "set")
        return match(a, b, numbers) or (
            grouped
            and match(
                parse_answer(p, thousands=False),
                parse_answer(r, thousands=False),
                numbers,
            )
        )
    except RecursionError:  # hundreds of nested brackets
        return False


def _fraction(plain: re.Match[str]) -> Fraction:
    return Fraction(plain[1] + plain[2].replace(",", ""))
