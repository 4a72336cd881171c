r"""Compares answers by algebra, in a worker process that may be killed.

Expressions are compared by their 40-digit values at a few fixed points. Text that
`expressions` cannot read goes to math-verify. Only workers call `decide`, as it can
hang on hostile text.
"""

import re
from fractions import Fraction

from grpo_jax.rewards.grading.equality import Exact, Undecided
from grpo_jax.rewards.grading.expressions import (
    POINTS,
    TooLarge,
    Unreadable,
    context,
    value_at,
)
from grpo_jax.rewards.grading.notation import APART, OR, clean
from grpo_jax.rewards.grading.paper import RULES

MATH_VERIFY_CHARS = 400  # longer text would only run into the time limit


def _values(text: str, natural_log: bool):
    for point in range(POINTS):
        yield value_at(text, point, natural_log)


def _close(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = context()
    a, b = mp.convert(a), mp.convert(b)
    if mp.isnan(a) or mp.isnan(b):
        raise Unreadable("undefined")
    if mp.isinf(a) or mp.isinf(b):
        return a == b
    if a == 0 or b == 0:
        return abs(a - b) < mp.mpf(10) ** -30
    return abs(a - b) <= mp.mpf(10) ** -28 * max(abs(a), abs(b))


def same_function(a: str, b: str) -> bool:
    r"""Returns whether two expressions agree at every point, up to branch cuts.

    Raises:
      Unreadable: an expression is outside the grammar of `expressions`.

    >>> same_function(r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}")
    True
    >>> same_function("2(1-p)", "2-2q"), same_function("2^{-99}", "2^{-98}")
    (False, False)
    """
    logs = (True, False) if r"\log" in a + b else (True,)
    return any(_agree(a, b, natural_log) for natural_log in logs)


def _agree(a: str, b: str, natural_log: bool) -> bool:
    pairs = zip(_values(a, natural_log), _values(b, natural_log), strict=True)
    for point, (x, y) in enumerate(pairs):
        if not _close(x, y):
            # For negative x, x^{2/3} and the square of the real cube root differ.
            mp = context()
            complex_values = mp.im(mp.convert(x)) != 0 or mp.im(mp.convert(y)) != 0
            return point == POINTS - 1 and complex_values and "i" not in _letters(a + b)
    return True


def _letters(text: str) -> str:
    return re.sub(r"\\[A-Za-z]+", "", text)


def proportional(a: str, b: str, *, positive: bool = False) -> bool:
    """Returns whether a = c·b for a constant c ≠ 0 (c > 0 if `positive`).

    Raises:
      Unreadable: an expression is outside the grammar of `expressions`.

    >>> proportional("y-(2x+3)", "2x-y+3"), proportional("1-x", "x-1", positive=True)
    (True, False)
    """
    mp = context()
    ratios = []
    for x, y in zip(_values(a, True), _values(b, True), strict=True):
        x, y = mp.convert(x), mp.convert(y)
        if x == 0 or y == 0:
            return False
        ratios.append(x / y)
    first = ratios[0]
    if positive and not (abs(mp.im(first)) < 1e-30 and mp.re(first) > 0):
        return False
    return all(_close(first, ratio) for ratio in ratios[1:])


class Algebra(Exact):
    """Compares leaves by their values at fixed points, in a worker process."""

    def same(self, a: str, b: str) -> bool:
        """Returns whether two expressions agree at every point."""
        try:
            return super().same(a, b)
        except Undecided:
            pass
        try:
            return same_function(a, b)
        except TooLarge:
            return False
        except Unreadable:
            raise Undecided from None

    def proportional(self, a: str, b: str, positive: bool) -> bool:
        """Returns whether a = c·b for a constant c ≠ 0 (c > 0 if `positive`)."""
        try:
            return proportional(a, b, positive=positive)
        except TooLarge:
            return False
        except Unreadable:
            raise Undecided from None

    def value(self, text: str) -> Fraction | None:
        """Returns a real constant to 25 decimals; None if the text is not one."""
        mp = context()
        try:
            x, y = (mp.convert(value_at(text, point, True)) for point in (0, 1))
        except Unreadable:
            return None
        if x != y or mp.im(x) != 0 or not mp.isfinite(x):
            return None
        return Fraction(int(mp.nint(mp.re(x) * 10**25)), 10**25)

    def close(self, a: str, b: str, within: float) -> bool:
        """Returns whether two constants differ by at most `within`.

        Returns False if one of them is not a constant.
        """
        try:
            return super().close(a, b, within)
        except Undecided:
            mp = context()
        try:
            x, y = (
                [mp.convert(value_at(text, point, True)) for point in (0, 1)]
                for text in (a, b)
            )
        except Unreadable:
            return False
        return x[0] == x[1] and y[0] == y[1] and bool(abs(x[0] - y[0]) <= within)


def decide(prediction: str, reference: str, rule: str = "strict") -> bool:
    """Returns whether two answers are equal. Only a worker may call this.

    Args:
      prediction: the predicted answer, as written.
      reference: the reference answer, as written.
      rule: "strict" or "paper"; see `worker_pool.grade`.
    """
    try:
        return RULES[rule](prediction, reference, Algebra())
    except Undecided:
        plain = [_for_math_verify(text) for text in (prediction, reference)]
        return _math_verify(*plain)


def _for_math_verify(text: str) -> str:
    return clean(text).replace(APART, "").replace(OR, ",")


def _math_verify(prediction: str, reference: str) -> bool:
    for text in (prediction, reference):
        unbalanced = text.count("{") != text.count("}")
        if len(text) > MATH_VERIFY_CHARS or "__" in text or unbalanced:
            return False
    import math_verify

    # Use only the LaTeX parser: the plain one passes its text to sympy's parse_expr.
    # Its own time limit is an alarm in this process. The pool kills from outside.
    config = [math_verify.LatexExtractionConfig()]
    parsed = [
        math_verify.parse(f"${text}$", config, parsing_timeout=0)
        for text in (reference, prediction)
    ]
    gold, found = parsed
    return bool(gold and found) and math_verify.verify(gold, found, timeout_seconds=0)
