r"""Evaluates LaTeX arithmetic such as `2\sqrt{7}-1`, without executing any text.

The input is one expression from `notation.normalize_notation`. `evaluate_rational`
returns an exact `Fraction`. `evaluate_at_point` returns a 40-digit value, with a fixed
number for each name; it runs in a grading worker. `f(x)` is an unknown function.
Everything outside the grammar raises `Unreadable`.
"""

import functools
import hashlib
import math
import re
from fractions import Fraction

MAX_BITS = 20_000  # of an exact power; refuses 9^9^9^9
MAX_DEPTH = 60
MAX_TOKENS = 600

_TOKEN = re.compile(
    r"\\begin|\\[A-Za-z]+|\\[{}|%]"
    r"|\d*\.\d*\\overline\{\d+\}|\d+(?:\.\d+)?|\.\d+|[A-Za-z]|\S"
)
_INVERTIBLE = "sin cos tan cot sec csc".split()
_FUNCTIONS = {
    *_INVERTIBLE,
    *"arcsin arccos arctan sinh cosh tanh ln log lg exp".split(),
}
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu "
    "nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi "
    "Psi Omega ell".split()
)
_NAMED = {"vec", "hat", "bar", "overline", "mathbf", "overrightarrow", "mathbb"}
_NO_FACTOR = {"cdot", "times", "div", "rfloor", "rceil", "}", "|", "%"}
POINTS = 4  # points at which expressions are compared; names are negative at the last


class Unreadable(ValueError):
    """Raised if an expression is outside the grammar."""


class TooLarge(Unreadable):
    """Raised if an expression is in the grammar, but too large to evaluate."""


class _Reader:
    """A recursive-descent evaluator for the tokens of one expression."""

    def __init__(self, text: str, point: int | None = None, natural_log: bool = True):
        self.tokens: list[str] = _TOKEN.findall(text)
        if len(self.tokens) > MAX_TOKENS:
            raise TooLarge(f"more than {MAX_TOKENS} tokens")
        self.at = self.depth = 0
        self.point = point  # None: exact rational arithmetic only
        self.natural_log = natural_log
        self.bars = 0

    def value(self):
        result = self.sum()
        if self.at != len(self.tokens):
            raise Unreadable(f"unexpected {self.peek()!r}")
        return result

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise Unreadable(f"expected {expected or 'more'}, found {token!r}")
        self.at += 1
        return token

    def accept(self, *tokens: str) -> str:
        """Takes the next token if it is one of these; else returns ""."""
        return self.take() if self.peek() in tokens else ""

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("nested too deeply")

    def mp(self):
        if self.point is None:
            raise Unreadable("not rational")
        return mpmath_context()

    def sum(self):
        self.descend()
        total = self.product()
        while sign := self.accept("+", "-"):
            term = self.product()
            total = total + (term if sign == "+" else -term)
        self.depth -= 1
        return total

    def product(self):
        total = self.signed()
        while True:
            if self.accept(r"\cdot", r"\times", "*"):
                total = total * self.signed()
            elif self.accept("/", r"\div"):
                total = _divide(total, self.signed())
            elif self.starts_factor():
                total = total * self.power()
            else:
                return total

    def starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":
            return self.bars == 0
        if token[:1] == "\\":
            return token[1:] not in _NO_FACTOR
        return token[:1].isalnum() or token[:1] in set("({[.")

    def signed(self):
        if sign := self.accept("+", "-"):
            self.descend()
            value = self.signed()
            self.depth -= 1
            return value if sign == "+" else -value
        return self.power()

    def power(self):
        base = self.postfix(self.atom())
        if not self.accept("^"):
            return base
        degree = {r"\circ": 1, "{": 3}.get(self.peek(), 0)
        if r"\circ" in self.tokens[self.at : self.at + degree]:
            self.at += degree
            return base * self.mp().pi / 180
        self.descend()
        exponent = self.signed()  # right associative: 2^3^2 is 2^(3^2)
        self.depth -= 1
        return self.postfix(self.raise_to(base, exponent))

    def raise_to(self, base, exponent):
        exact = isinstance(base, Fraction) and isinstance(exponent, Fraction)
        if exact and exponent.denominator == 1:
            n = exponent.numerator
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if base == 0 and n <= 0:
                raise Unreadable("power of zero")
            if abs(n) * bits <= MAX_BITS or base in (-1, 0, 1):
                return base ** (n if abs(base) != 1 else n % 2)
            if abs(n) * bits > 10**7:
                raise TooLarge("power too large")
        mp = self.mp()
        if base == 0:
            return mp.convert(base)
        odd = isinstance(exponent, Fraction) and exponent.denominator in range(3, 99, 2)
        sign = -1 if odd and exponent.numerator % 2 else 1
        base, exponent = mp.convert(base), mp.convert(exponent)
        if abs(exponent * mp.log(base)) > 1e6:
            raise TooLarge("power too large")
        if odd and mp.im(base) == 0 and mp.re(base) < 0:
            return sign * mp.power(-base, exponent)  # the real root, as \sqrt[3]{-8}
        return mp.power(base, exponent)

    def postfix(self, value):
        while self.accept("!"):
            if not _is_whole(value) or value < 0:
                raise Unreadable("factorial")
            if value > 3000:
                raise TooLarge("factorial too large")
            value = Fraction(math.factorial(int(value)))
        return value

    def argument(self):
        """Reads one braced group or one character, as after \\frac."""
        token = self.peek()
        if token.isdigit():  # \frac43 is four thirds
            self.tokens[self.at : self.at + 1] = list(token)
        return self.atom()

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _decimal(token)
        if closing := {"(": ")", "[": "]", "{": "}"}.get(token):
            bars, self.bars = self.bars, 0
            value = self.sum()
            self.bars = bars
            self.take(closing)
            return value
        if token == "|":
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            self.take("|")
            return abs(value)
        if token.isalpha() and token.isascii():
            return self.letter(token)
        if token[0] == "\\":
            return self.command(token[1:])
        raise Unreadable(f"unexpected {token!r}")

    def command(self, name: str):
        if name == "frac":
            top = self.argument()
            return _divide(top, self.argument())
        if name == "binom":
            return _binomial(self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self.take("\\r" + name[1:])
            module = math if isinstance(value, Fraction) else self.mp()
            rounded = getattr(module, name[1:])(value)
            return rounded * Fraction(1)
        if name == "pi":
            return +self.mp().pi
        if name == "infty":
            return self.mp().inf
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _GREEK:
            return self.letter("\\" + name)
        if name in _NAMED:
            return self.unknown(f"{name}{{{self.braced_text()}}}")
        raise Unreadable(f"unknown command \\{name}")

    def braced_text(self) -> str:
        self.take("{")
        text = ""
        while self.peek() not in ("}", ""):
            text += self.take()
        self.take("}")
        return text

    def root(self):
        self.mp()
        degree = Fraction(2)
        if self.accept("["):
            degree = self.sum()
            self.take("]")
        radicand = self.argument()  # \sqrt57 is 7\sqrt5
        return self.raise_to(radicand, _divide(Fraction(1), degree))

    def function(self, name: str):
        mp = self.mp()
        base = exponent = None
        for _ in range(2):
            if self.accept("_"):
                base = self.argument()
            elif self.accept("^"):
                exponent = self.argument() if self.peek() != "-" else self.signed()
        x = mp.convert(self.function_argument())
        if name in ("ln", "log", "lg"):
            y = mp.log(x)
            if base is not None:
                y /= mp.log(mp.convert(base))
            elif name == "lg" or (name == "log" and not self.natural_log):
                y /= mp.log(10)
        elif name == "exp" and abs(x) > 1e6:
            raise TooLarge("power too large")
        elif exponent == -1 and name in _INVERTIBLE:
            return getattr(mp, f"a{name}")(x)
        else:
            y = getattr(mp, name.replace("arc", "a"))(x)
        return y if exponent is None else self.raise_to(y, exponent)

    def function_argument(self):
        if self.peek() in ("(", "{", "["):
            return self.postfix(self.atom())
        if self.peek() in ("+", "-"):
            return self.signed()
        value = self.power()
        while self.starts_factor() and self.peek()[1:] not in _FUNCTIONS:
            if self.peek() in ("(", "["):
                break
            value = value * self.power()
        return value

    def letter(self, name: str):
        if self.accept("_"):
            name += "_" + (self.braced_text() if self.peek() == "{" else self.take())
        while prime := self.accept("'"):
            name += prime
        if name == "i":
            return self.mp().mpc(0, 1)
        if name == "e":
            return +self.mp().e
        if name[0] not in "fghFGHP" or not self.accept("("):
            return self.unknown(name)
        total = self.mp().convert(_random(name, 7))
        for k in range(2, 9):
            total += self.sum() / Fraction(k)
            if not self.accept(","):
                break
        self.take(")")
        return self.mp().cos(total)

    def unknown(self, name: str):
        self.mp()
        assert self.point is not None
        value = _random(name, self.point)
        return -value if self.point == POINTS - 1 else value


def _is_whole(value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1


def _decimal(token: str) -> Fraction:
    head, _, cycle = token.rstrip("}").partition(r"\overline{")
    value = Fraction("0" if cycle and head in ("", ".") else head)
    if cycle:
        digits = len(head.partition(".")[2])
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**digits)
    return value


def _divide(a, b):
    if b == 0:
        raise Unreadable("division by zero")
    return a * (1 / b)


def _binomial(n, k) -> Fraction:
    if not (_is_whole(n) and _is_whole(k) and 0 <= k <= n <= 2000):
        raise Unreadable("binomial")
    return Fraction(math.comb(int(n), int(k)))


def _random(name: str, point: int) -> Fraction:
    """Returns a fixed rational in (0.3, 2.3) for a name at a point."""
    digest = hashlib.sha256(f"{name}@{point}".encode()).digest()
    return Fraction(3, 10) + Fraction(int.from_bytes(digest[:6], "big"), 2**47)


@functools.cache
def mpmath_context():
    """Returns mpmath's arithmetic with 40 digits, imported at the first call."""
    import mpmath

    mp = mpmath.mp.clone()
    mp.dps = 40
    return mp


def evaluate_rational(text: str) -> Fraction:
    r"""Returns the exact value of a rational expression.

    Raises:
      TooLarge: the expression is too large to evaluate.
      Unreadable: the expression is not rational, or is outside the grammar.

    >>> (evaluate_rational(r"\frac43 - 0.5 \cdot 2^{-1}"),
    ...  evaluate_rational(r"\binom{10}{3}"))
    (Fraction(13, 12), Fraction(120, 1))
    """
    return _value(_Reader(text))


def evaluate_at_point(text: str, point: int, natural_log: bool):
    r"""Returns the value of an expression, with a fixed number for each name.

    Args:
      text: the expression, from `notation.normalize_notation`.
      point: the index of the point, below `POINTS`, which fixes the numbers.
      natural_log: whether \log is the natural logarithm; otherwise it has base 10.

    Returns:
      A `Fraction`, or a 40-digit number of mpmath.

    Raises:
      TooLarge: the expression is too large to evaluate.
      Unreadable: the expression is outside the grammar, or undefined.
    """
    return _value(_Reader(text, point, natural_log))


def _value(reader: _Reader):
    try:
        return reader.value()
    except Unreadable:
        raise
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None
