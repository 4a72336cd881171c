r"""A small reader of LaTeX arithmetic: text to a number, and nothing is executed.

In: one expression that `answers.clean` has normalised, such as `2\sqrt{7}-1`.
Out: an exact `Fraction`, or (`same_function`, in a grading worker) the decision
whether two expressions agree, from 40-digit values at a few fixed points. Names
are unknowns; `f(x)` is an unknown function. Anything else raises `Unreadable`.
"""

import hashlib
import re
from fractions import Fraction

MAX_BITS = 20_000  # of an exact power or factorial: 9^9^9^9 stops here
MAX_DEPTH = 60
MAX_TOKENS = 600

_TOKEN = re.compile(
    r"\\begin|\\[A-Za-z]+|\\[{}|%]"
    r"|\d*\.\d*\\overline\{\d+\}|\d+(?:\.\d+)?|\.\d+|[A-Za-z]|\S"
)
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh",
    "cosh", "tanh", "ln", "log", "lg", "exp",
}  # fmt: skip
_INVERSE = {name: f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta",
    "theta", "vartheta", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau",
    "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda",
    "Sigma", "Phi", "Psi", "Omega", "ell",
}  # fmt: skip
_NAMED = {"vec", "hat", "bar", "overline", "mathbf", "overrightarrow", "mathbb"}
_CLOSING = {"lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert"}
_TIMES = {r"\cdot", r"\times", "*"}
_OVER = {"/", r"\div"}
_POINTS = 4  # where two expressions are compared; the last has negative values


class Unreadable(ValueError):
    """The expression is outside the grammar."""


class TooLarge(Unreadable):
    """The expression is in the grammar, but nobody should evaluate it."""


class _Reader:
    """A recursive-descent evaluator over one expression's tokens."""

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

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise Unreadable(f"expected {expected or 'more'}, found {token!r}")
        self.at += 1
        return token

    def mp(self):
        if self.point is None:
            raise Unreadable("not rational")
        return _context()

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("nested too deeply")
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product()
            total = _apply(lambda a, b: a + b, total, term if sign == "+" else -term)
        self.depth -= 1
        return total

    def product(self):
        total = self.signed()
        while True:
            token = self.peek()
            if token in _TIMES:
                self.take()
                total = _apply(lambda a, b: a * b, total, self.signed())
            elif token in _OVER:
                self.take()
                total = _divide(total, self.signed())
            elif self.starts_factor(token):
                total = _apply(lambda a, b: a * b, total, self.power())
            else:
                return total

    def starts_factor(self, token: str) -> bool:
        if token == "|":
            return self.bars == 0
        if token[:1] == "\\":
            name = token[1:]
            return name in _CLOSING or name not in (
                *_CLOSING.values(), "cdot", "times", "div", "}", "|", "%",
            )  # fmt: skip
        return bool(token) and (token[0].isalnum() or token[0] in "({[.")

    def signed(self):
        if self.peek() in ("+", "-"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise TooLarge("nested too deeply")
            value = self.signed() if self.take() == "+" else -self.signed()
            self.depth -= 1
            return value
        return self.power()

    def power(self):
        base = self.postfix(self.atom())
        if self.peek() != "^":
            return base
        self.take()
        if self.peek() == r"\circ":
            self.take()
            return base * self.mp().pi / 180
        if self.tokens[self.at : self.at + 3] == ["{", r"\circ", "}"]:
            self.at += 3
            return base * self.mp().pi / 180
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("nested too deeply")
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
        base, exponent = mp.convert(base), mp.convert(exponent)
        if base == 0:
            return base
        if abs(exponent * mp.log(base)) > 1e6:
            raise TooLarge("power too large")
        return mp.power(base, exponent)

    def postfix(self, value):
        while self.peek() == "!":
            self.take()
            n = value.numerator if isinstance(value, Fraction) else -1
            if n < 0 or value != n:
                raise Unreadable("factorial")
            if n > 3000:
                raise TooLarge("factorial too large")
            value = Fraction(1)
            for k in range(2, n + 1):
                value *= k
        return value

    def argument(self):
        """One braced group or one character, as after \\frac."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token.isdigit() and len(token) > 1:  # \frac43 is four thirds
            self.tokens[self.at : self.at + 1] = list(token)
        return self.atom()

    def group(self):
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return _decimal(token)
        if token in ("(", "[", "{"):
            bars, self.bars = self.bars, 0
            value = self.sum()
            self.bars = bars
            self.take({"(": ")", "[": "]", "{": "}"}[token])
            return value
        if token == "|":
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            self.take("|")
            return abs(value)
        if token.isalpha() and token.isascii():
            return self.letter(token)
        if token[0] == "\\" and len(token) > 1:
            return self.command(token[1:])
        raise Unreadable(f"unexpected {token!r}")

    def command(self, name: str):
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            top = self.argument()
            return _divide(top, self.argument())
        if name == "binom":
            n, k = self.argument(), self.argument()
            return _binomial(n, k)
        if name == "sqrt":
            return self.root()
        if name in _CLOSING:
            value = self.sum()
            self.take("\\" + _CLOSING[name])
            if name == "lvert":
                return abs(value)
            if not isinstance(value, Fraction):
                mp = self.mp()
                return mp.floor(value) if name == "lfloor" else mp.ceil(value)
            floor = value.numerator // value.denominator
            ceiling = -(-value.numerator // value.denominator)
            return Fraction(floor if name == "lfloor" else ceiling)
        if name == "pi":
            return +self.mp().pi
        if name == "infty":
            return self.mp().inf
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _GREEK:
            return self.letter("\\" + name)
        if name in _NAMED:
            self.take("{")
            inner = ""
            while self.peek() not in ("}", ""):
                inner += self.take()
            self.take("}")
            return self.unknown(f"{name}{{{inner}}}")
        raise Unreadable(f"unknown command \\{name}")

    def root(self):
        mp_degree = Fraction(2)
        if self.peek() == "[":
            self.take()
            mp_degree = self.sum()
            self.take("]")
        radicand = self.group() if self.peek() == "{" else self.atom()
        if isinstance(radicand, Fraction) and isinstance(mp_degree, Fraction):
            exact = _exact_root(radicand, mp_degree)
            if exact is not None:
                return exact
        mp = self.mp()
        radicand, degree = mp.convert(radicand), mp.convert(mp_degree)
        if mp.im(radicand) == 0 and mp.re(radicand) < 0 and degree % 2 == 1:
            return -mp.power(-radicand, 1 / degree)  # the real cube root of -2
        return mp.power(radicand, 1 / degree)

    def function(self, name: str):
        mp = self.mp()
        base = exponent = None
        for _ in range(2):
            if self.peek() == "_":
                self.take()
                base = self.argument()
            elif self.peek() == "^":
                self.take()
                exponent = self.argument() if self.peek() != "-" else self.signed()
        x = mp.convert(self.function_argument())
        inverse = exponent == -1 and name in _INVERSE
        if inverse:
            exponent = None
        if name in ("ln", "log", "lg"):
            y = mp.log(x)
            if base is not None:
                y /= mp.log(mp.convert(base))
            elif name == "lg" or (name == "log" and not self.natural_log):
                y /= mp.log(10)
        elif name == "exp" and abs(x) > 1e6:
            raise TooLarge("power too large")
        else:
            python = _INVERSE[name] if inverse else name.replace("arc", "a")
            y = getattr(mp, python)(x)
        return y if exponent is None else self.raise_to(y, exponent)

    def function_argument(self):
        if self.peek() in ("(", "{", "["):
            return self.postfix(self.atom())
        if self.peek() in ("+", "-"):
            return self.signed()
        value = self.power()
        while self.starts_factor(self.peek()) and self.peek()[1:] not in _FUNCTIONS:
            if self.peek() in ("(", "["):
                break
            value = value * self.power()
        return value

    def letter(self, name: str):
        if self.peek() == "_":
            self.take()
            name += "_"
            if self.peek() == "{":
                self.take()
                while self.peek() not in ("}", ""):
                    name += self.take()
                self.take("}")
            else:
                name += self.take()
        while self.peek() == "'":
            name += self.take()
        if name == "i":
            return self.mp().mpc(0, 1)
        if name == "e":
            return +self.mp().e
        if name[0] in "fghFGHP" and self.peek() == "(":
            self.take()
            mp = self.mp()
            total = mp.convert(_random(name, 7))
            for k in range(2, 9):
                total += mp.convert(self.sum()) / k
                if self.peek() != ",":
                    break
                self.take()
            self.take(")")
            return mp.cos(total)
        return self.unknown(name)

    def unknown(self, name: str):
        self.mp()
        assert self.point is not None
        value = _random(name, self.point)
        return -value if self.point == _POINTS - 1 else value


def _decimal(token: str) -> Fraction:
    if r"\overline" not in token:
        return Fraction(token)
    head, cycle = token[:-1].split(r"\overline{")
    scale = 10 ** len(head.partition(".")[2])
    repeat = Fraction(int(cycle), 10 ** len(cycle) - 1) / scale
    return Fraction(head if head not in (".", "") else "0") + repeat


def _apply(operation, a, b):
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = _context().convert(a), _context().convert(b)
    return operation(a, b)


def _divide(a, b):
    if b == 0:
        raise Unreadable("division by zero")
    return _apply(lambda x, y: x / y, a, b)


def _binomial(n, k) -> Fraction:
    exact = isinstance(n, Fraction) and isinstance(k, Fraction)
    if not exact or n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 2000:
        raise Unreadable("binomial")
    total = Fraction(1)
    for j in range(int(k)):
        total = total * (n - j) / (j + 1)
    return total


def _exact_root(x: Fraction, degree: Fraction) -> Fraction | None:
    if degree.denominator != 1 or not 2 <= degree <= 64 or x < 0:
        return None
    n = int(degree)
    parts = []
    for part in (x.numerator, x.denominator):
        guess = 1 << -(-part.bit_length() // n)
        while True:  # Newton's step on integers, from above
            step = ((n - 1) * guess + part // guess ** (n - 1)) // n if guess else 0
            if step >= guess:
                break
            guess = step
        if guess**n != part:
            return None
        parts.append(guess)
    return Fraction(*parts)


def _random(name: str, point: int) -> Fraction:
    """A fixed rational in (0.3, 2.3) for this name at this point."""
    digest = hashlib.sha256(f"{name}@{point}".encode()).digest()
    return Fraction(3, 10) + Fraction(int.from_bytes(digest[:6], "big"), 2**47)


_mp = None


def _context():
    """The worker's own 40-digit arithmetic (imported there, never changed)."""
    global _mp
    if _mp is None:
        import mpmath

        _mp = mpmath.mp.clone()
        _mp.dps = 40
    return _mp


def rational(text: str) -> Fraction:
    r"""The exact value of a rational expression; `Unreadable` otherwise.

    >>> rational(r"\frac43 - 0.5 \cdot 2^{-1}"), rational(r"\binom{10}{3}")
    (Fraction(13, 12), Fraction(120, 1))
    """
    return _value(_Reader(text))


def _value(reader: _Reader):
    try:
        return reader.value()
    except Unreadable:
        raise
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from None


def _values(text: str, natural_log: bool):
    for point in range(_POINTS):
        yield _value(_Reader(text, point, natural_log))


def _close(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = _context()
    a, b = mp.convert(a), mp.convert(b)
    if mp.isnan(a) or mp.isnan(b):
        raise Unreadable("undefined")
    if mp.isinf(a) or mp.isinf(b):
        return a == b
    if a == 0 or b == 0:
        return abs(a - b) < mp.mpf(10) ** -30
    return abs(a - b) <= mp.mpf(10) ** -28 * max(abs(a), abs(b))


def same_function(a: str, b: str) -> bool:
    r"""Whether two expressions agree at every point (they may differ in branch cuts).

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
            # Below zero x^{2/3} and the real cube root's square are on two branches.
            mp = _context()
            complex_values = mp.im(mp.convert(x)) != 0 or mp.im(mp.convert(y)) != 0
            return (
                point == _POINTS - 1 and complex_values and "i" not in _letters(a + b)
            )
    return True


def _letters(text: str) -> str:
    return re.sub(r"\\[A-Za-z]+", "", text)


def proportional(a: str, b: str, *, positive: bool = False) -> bool:
    """Whether a = c·b for one constant c ≠ 0 (c > 0 if `positive`).

    >>> proportional("y-(2x+3)", "2x-y+3"), proportional("1-x", "x-1", positive=True)
    (True, False)
    """
    mp = _context()
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
