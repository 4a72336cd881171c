r"""The lenient rule by which DeepSeekMath's published figures were graded.

Use it only for figures that are compared with published ones, and never as a reward. It
accepts factors of 100, ignores units and the kind of brackets, and looks only at the
end of a list that is too long.

The rule: numbers are equal within 0.001, also after ×100 or /100 (p % is p/100). Tuples
and matrices are compared entry by entry, whatever their brackets. Unions and lists have
no order. x = 5 equals 5, and an equation equals its multiples. Everything else is
compared by algebra, or as two constants within 0.001. The original uses sympy; this
module uses the package's own algebra, and accepts everything that the strict rule does.
"""

import re
from collections.abc import Callable
from functools import partial

from grpo_jax.data.brackets import split_outside_brackets, strip_braces
from grpo_jax.rewards.grading import equality
from grpo_jax.rewards.grading.equality import Exact, Undecided
from grpo_jax.rewards.grading.notation import normalize_notation
from grpo_jax.rewards.grading.structure import parse_answer
from grpo_jax.rewards.grading.units import split_quantity

WITHIN = 1e-3
AND = r"\text{ and }"  # separates the answers of a completion with several boxes
_CUT = re.compile(r"\\left|\\right|\\[,;!]|\s|\\\$|\$")


def compare_leniently(prediction: str, reference: str, numbers: Exact) -> bool:
    r"""Returns whether the lenient rule finds two answers equal.

    Args:
      prediction: the predicted answer, as written.
      reference: the reference answer, as written.
      numbers: `Exact`, or `algebra.Algebra` in a worker process.

    Raises:
      Undecided: the comparison needs more than `numbers` can decide.

    >>> pairs = [("50", "0.5"), ("[1,2)", "(1,2]"), ("7, 1, 2", "2, 1")]
    >>> [compare_leniently(*pair, Exact()) for pair in pairs]
    [True, True, True]
    """
    if max(len(prediction), len(reference)) > equality.MAX_CHARS:
        return prediction == reference
    tests = (equality.compare_strict, _lenient)
    return _any(*(partial(test, prediction, reference, numbers) for test in tests))


def _lenient(prediction: str, reference: str, numbers: Exact) -> bool:
    given, wanted = _list(prediction), _list(reference)
    if _number(reference) is not None or not _is_list(reference):
        wanted = [reference]
        given = given if AND in prediction else [prediction]
    given = given[-len(wanted) :]
    return len(given) == len(wanted) and _same_members(given, wanted, numbers)


def _is_list(text: str) -> bool:
    return AND in text or not re.search(r"[()\[\]]", text)


def _list(text: str) -> list[str]:
    """Returns the distinct answers in a text, in order."""
    if _number(text) is not None:
        return [text.strip()]
    parts = text.split(AND) if AND in text else split_outside_brackets(text, ",")
    return list(dict.fromkeys(part.strip() for part in parts))


def _same_members(given: list[str], wanted: list[str], numbers: Exact) -> bool:
    """Returns whether each answer of either list has an equal in the other."""
    if max(len(given), len(wanted)) > equality.MAX_MEMBERS:
        return False
    return all(
        _any(*(partial(_same, x, y, numbers) for y in wanted)) for x in given
    ) and all(_any(*(partial(_same, x, y, numbers) for x in given)) for y in wanted)


def _any(*tests: Callable[[], bool]) -> bool:
    """Returns whether a test passes; raises `Undecided` only if no other one does."""
    undecided = None
    for test in tests:
        try:
            if test():
                return True
        except Undecided as error:
            undecided = error
    if undecided:
        raise undecided
    return False


def _number(text: str) -> float | None:
    text = text.replace(",", "").strip()
    try:
        return float(text.rstrip("%\\")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _spell(text: str) -> str:
    """Removes spaces, dollar signs and the unit, except %."""
    bare, unit = split_quantity(
        normalize_notation(_CUT.sub("", text) if "begin" not in text else text)
    )
    return strip_braces(bare) + ("%" if unit == "%" else "")


def _same(prediction: str, reference: str, numbers: Exact) -> bool:
    if not prediction.strip():
        return False
    p, r = _spell(prediction), _spell(reference)
    if p == r:
        return True
    x, y = _number(p), _number(r)
    if x is not None and y is not None:
        return any(
            abs(x - z) <= max(WITHIN, 1e-9 * max(abs(x), abs(z)))
            for z in (y / 100, y, y * 100)
        )
    if r"\cup" in p and r"\cup" in r:
        return _same_members(p.split(r"\cup"), r.split(r"\cup"), numbers)
    if re.fullmatch(r"[(\[].+[)\]]", p) and re.fullmatch(r"[(\[].+[)\]]", r):
        given, wanted = (split_outside_brackets(x[1:-1], ",") for x in (p, r))
        if len(given) == len(wanted) > 1:
            return _same_entries(given, wanted, numbers)
    a, b = parse_answer(p), parse_answer(r)
    if a.kind == b.kind == "matrix":
        shape, other_shape = ([len(row.items) for row in m.items] for m in (a, b))
        cells, others = ([x.text for row in m.items for x in row.items] for m in (a, b))
        return shape == other_shape and _same_entries(cells, others, numbers)
    for one, other in ((p, r), (r, p)):
        left, equals, right = one.partition("=")
        if equals and "=" not in right + other and len(left) <= 2:
            return _same(right, other, numbers)
    return _any(
        lambda: equality.compare_strict(prediction, reference, numbers),
        lambda: numbers.close(p, r, WITHIN),
    )


def _same_entries(given: list[str], wanted: list[str], numbers: Exact) -> bool:
    return all(_same(*pair, numbers) for pair in zip(given, wanted, strict=True))


RULES = {"strict": equality.compare_strict, "paper": compare_leniently}
