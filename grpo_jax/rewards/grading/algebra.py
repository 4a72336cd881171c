r"""Compares answers by algebra, in a worker process that may be killed.

Expressions are compared by their 40-digit values at a few fixed points. Text that
`expressions` cannot read goes to math-verify. Only workers call `compare_in_worker`, as
it can hang on hostile text.
"""

from fractions import Fraction

from grpo_jax.rewards.grading.equality import Exact, Undecided, evaluate_exactly
from grpo_jax.rewards.grading.expressions import (
    POINTS,
    Unreadable,
    evaluate_at_point,
    mpmath_context,
)
from grpo_jax.rewards.grading.notation import APART, OR, normalize_notation
from grpo_jax.rewards.grading.paper import RULES
from grpo_jax.rewards.grading.structure import letters_of

MATH_VERIFY_CHARS = 400  # longer text would only run into the time limit


def _values(text: str, natural_log: bool):
    for point in range(POINTS):
        yield evaluate_at_point(text, point, natural_log)


def _close(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = mpmath_context()
    a, b = mp.convert(a), mp.convert(b)
    if mp.isnan(a) or mp.isnan(b):
        raise Unreadable("undefined")
    if mp.isinf(a) or mp.isinf(b):
        return a == b
    return mp.almosteq(a, b, rel_eps=1e-28, abs_eps=1e-30 if 0 in (a, b) else 0)


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
    mp = mpmath_context()
    pairs = zip(_values(a, natural_log), _values(b, natural_log), strict=True)
    for point, (x, y) in enumerate(pairs):
        if not _close(x, y):
            # For negative x, x^{2/3} and the square of the real cube root differ.
            is_complex = any(mp.im(mp.convert(v)) != 0 for v in (x, y))
            last = point == POINTS - 1
            return last and is_complex and "i" not in letters_of(a + b)
    return True


def proportional(a: str, b: str, positive: bool = False) -> bool:
    """Returns whether a = c·b for a constant c ≠ 0 (c > 0 if `positive`).

    Raises:
      Unreadable: an expression is outside the grammar of `expressions`.

    >>> proportional("y-(2x+3)", "2x-y+3"), proportional("1-x", "x-1", positive=True)
    (True, False)
    """
    mp = mpmath_context()
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
            return bool(evaluate_exactly(same_function, a, b))

    def proportional(self, a: str, b: str, positive: bool) -> bool:
        """Returns whether a = c·b for a constant c ≠ 0 (c > 0 if `positive`)."""
        return bool(evaluate_exactly(proportional, a, b, positive))

    def value(self, text: str) -> Fraction | None:
        """Returns a real constant to 25 decimals; None if the text is not one."""
        mp, x = mpmath_context(), _constant(text)
        if x is None or mp.im(x) != 0 or not mp.isfinite(x):
            return None
        return Fraction(int(mp.nint(mp.re(x) * 10**25)), 10**25)

    def close(self, a: str, b: str, within: float) -> bool:
        """Returns whether both are constants that differ by at most `within`."""
        x, y = _constant(a), _constant(b)
        return x is not None and y is not None and bool(abs(x - y) <= within)


def _constant(text: str):
    """Returns the value of an expression without names; None for any other text."""
    try:
        x, y = (
            mpmath_context().convert(evaluate_at_point(text, point, True))
            for point in (0, 1)
        )
    except Unreadable:
        return None
    return x if x == y else None


def compare_in_worker(prediction: str, reference: str, rule: str = "strict") -> bool:
    """Returns whether two answers are equal. Only a worker may call this.

    Args:
      prediction: the predicted answer, as written.
      reference: the reference answer, as written.
      rule: "strict" or "paper"; see `worker_pool.grade_answers`.
    """
    try:
        return RULES[rule](prediction, reference, Algebra())
    except Undecided:
        return _math_verify(
            *(
                normalize_notation(text).replace(APART, "").replace(OR, ",")
                for text in (prediction, reference)
            )
        )


def _math_verify(prediction: str, reference: str) -> bool:
    for text in (prediction, reference):
        unbalanced = text.count("{") != text.count("}")
        if len(text) > MATH_VERIFY_CHARS or "__" in text or unbalanced:
            return False
    import math_verify

    # Use only the LaTeX parser: the plain one passes its text to sympy's parse_expr.
    # Its own time limit is an alarm in this process. The pool kills from outside.
    config = [math_verify.LatexExtractionConfig()]
    gold, found = (
        math_verify.parse(f"${text}$", config, parsing_timeout=0)
        for text in (reference, prediction)
    )
    return bool(gold and found) and math_verify.verify(gold, found, timeout_seconds=0)
