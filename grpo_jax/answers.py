r"""What a completion's final answer is, and whether two answers are the same.

In: a model's text (`extract`), or a prediction and a reference (`equivalent`).
Out: the answer's text or None; True or False. Both sides are cleaned into one
spelling (`clean`), read as a small structure (`read`: list, tuple, interval,
equation, leaf …) and matched (`match`). Policy: p % equals p and p/100, but n never
equals 100n; a missing unit is fine, another unit is wrong; tuples are ordered,
comma lists are not; an interval equals its inequality; a rounded decimal is not the
exact answer. Rationals are decided here; the rest goes to `grading`'s workers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from grpo_jax import notation
from grpo_jax.expressions import TooLarge, Unreadable, rational
from grpo_jax.notation import clean, split, unwrap

MAX_CHARS = 2000  # a longer answer must be the reference letter for letter
MAX_MEMBERS = 64  # of a list

_HOPE = re.compile(r"final answer is \$(.*?)\$\.? I hope", re.S)
_IS = re.compile(
    r"(?:he|nal) answer is\s*:?|答案\s*(?:是|为|為|：|:)+\s*：?|答え[はは]\s*：?", re.I
)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_OUTPUT = re.compile(r"```output[ \t]*\n(.*?)(?:\n?```|\Z)", re.S)
_NUMBER = re.compile(
    r"(?:(?<![\d\w)}])[-−])?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:/\d+(?![\d.]))?(?:\s?\\?%)?"
)
_WIDE = str.maketrans("０１２３４５６７８９，．－％／", "0123456789,.-%/")


def extract(text: str) -> str | None:
    r"""The final answer that a completion states, or None.

    The order of DeepSeekMath's evaluation: `final answer is $…$. I hope`, the last
    complete `\boxed{…}`, `he answer is …` (or 答案是 …), GSM8K's `#### …`, the last
    ```output block, the last number.

    >>> extract(r"First \boxed{1}. So it is \boxed{\frac{1}{2}}."), extract("Hm.")
    ('\\frac{1}{2}', None)
    >>> extract("He pays 3 + 4 = 7. The answer is $7.00."), extract("so 1,234 in all")
    ('7.00', '1,234')
    """
    if found := _HOPE.findall(text):
        return _trim(found[-1]) or None
    if boxes := [box for box in boxed(text) if box.strip()]:
        return _trim(boxes[-1]) or None
    if (at := list(_IS.finditer(text))) and (said := _statement(text[at[-1].end() :])):
        return said
    if found := _HASHES.findall(text):
        return _trim(found[-1]) or None
    if found := _OUTPUT.findall(text):
        lines = [line.strip() for line in found[-1].splitlines() if line.strip()]
        failed = not lines or re.match(r"Runtime errors?:|Traceback|Timeout", lines[0])
        return None if failed else lines[-1]
    numbers = [m.group() for m in _NUMBER.finditer(text.translate(_WIDE)) if m.group()]
    return _trim(numbers[-1]) if numbers else None


def boxed(text: str) -> list[str]:
    r"""The contents of every complete `\boxed{…}` or `\fbox{…}`, braces balanced.

    >>> boxed(r"\boxed{a_{1}}, \boxed 7, \boxed{2")
    ['a_{1}', '7']
    """
    found = []
    for match in re.finditer(r"\\f?boxe?d?\s*(?:\{|(\w+))", text):
        if match.group(1):
            found.append(match.group(1))
            continue
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1
            else:
                depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        if depth == 0:
            found.append(text[match.end() : at - 1])
    return found


def _statement(text: str) -> str | None:
    """The clause after "the answer is": its formula, or all of it to the full stop."""
    line = next((part for part in text.splitlines() if part.strip(" :：*$")), "")
    line = line.strip().lstrip(":：").strip().strip("*").strip()
    if formula := re.match(r"\$\$?([^$]+)\$", line) or re.match(
        r"\\[(\[](.+?)\\[)\]]", line
    ):
        return _trim(formula.group(1)) or None
    clause = re.split(r"(?<!\b[ap])(?<!\.[am])[.!](?:\s|$)|。|！", line)[0]
    return _trim(clause.replace("**", "")) or None


def _trim(text: str) -> str:
    text = text.strip()
    text = re.sub(r"(?<![apm])[.。,，;；:：]+$", "", text)
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return re.sub(r"^\$(?=[\d.])", "", text).strip()


_RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_SIGN = re.compile(r"\\(pm|mp)(?![a-z])")
_PLAIN = re.compile(r"\s*(-?)\s*\\?\$?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\.?\s*")


class Undecided(Exception):
    """The comparison needs more than rational arithmetic."""


@dataclass(frozen=True)
class Node:
    """One part of an answer.

    kind: leaf | set (unordered) | tuple | matrix | assign (name, value) |
    equation (two sides) | chain (of inequalities). marks: a tuple's brackets, an
    inequality's signs. An interval is a tuple of its ends; x > 1 is (1, infinity).
    """

    kind: str
    text: str
    items: tuple["Node", ...] = ()
    marks: str = ""


def read(text: str, *, thousands: bool = True) -> Node:
    """The structure of a cleaned answer."""
    text = unwrap(text)
    if thousands:
        text = notation.join_thousands(text)
    if re.fullmatch(r"\\(emptyset|varnothing)|\\\{\\\}", text):
        return Node("set", r"\emptyset")
    if text in (r"\mathbb{R}", r"\R", r"\text{all real numbers}", r"\text{all reals}"):
        return Node("tuple", text, (leaf(r"-\infty"), leaf(r"\infty")), "()")
    if inner := re.fullmatch(r"(?:[A-Za-z](?:_\w)?)\\in(?![a-z])(.+)", text):
        return read(inner.group(1), thousands=thousands)
    if matrix := notation.matrix(text):
        rows = tuple(Node("tuple", "", tuple(map(read, row)), "[]") for row in matrix)
        return Node("matrix", text, rows)
    for separator in (";", ","):
        parts = split(text, separator)
        if len(parts) > 1:
            read_parts = [read(part, thousands=thousands) for part in parts if part]
            nodes = tuple(
                node
                for part in read_parts
                for node in (
                    part.items
                    if _SIGN.search(part.text) and part.kind == "set"
                    else [part]
                )
            )
            return _both(text, nodes) or Node("set", text, nodes)
    if len(parts := split(text, r"\cup")) > 1:
        return Node("set", text, tuple(read(part) for part in parts))
    if text.startswith(r"\{") and notation.closes(text, r"\{", r"\}"):
        inner_text = text[2:-2]
        if builder := re.match(
            r"[A-Za-z](?:\\in\\mathbb\{[RCZ]\})?(?:\\mid|\||:)", text[2:]
        ):
            return read(inner_text[builder.end() :])
        inside = read(inner_text, thousands=False)
        if inside.kind == "set":
            return Node("set", text, inside.items)
        return Node("set", text, (inside,))
    if complement := re.fullmatch(
        r"\\mathbb\{R\}(?:\\setminus|\\backslash|-)\\\{([^,]+)\\\}", text
    ):
        return _all_but(text, leaf(complement.group(1)))
    if text[:1] in "([" and text[-1:] in ")]" and notation.closes(text):
        parts = split(text[1:-1], ";")
        parts = parts if len(parts) > 1 else split(text[1:-1], ",")
        if len(parts) > 1:
            inside = tuple(read(part, thousands=False) for part in parts)
            return Node("tuple", text, inside, text[0] + text[-1])
        if text[0] == "(" and text[-1] == ")":
            return read(text[1:-1], thousands=thousands)
    if relation := notation.relation(text):
        return _relation(text, *relation)
    if _SIGN.search(text):
        swap = {r"\pm": r"\mp", r"\mp": r"\pm"}
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = re.sub(r"\\pm|\\mp", lambda m: swap[m.group()], text)
        minus = minus.replace(r"\pm", "+").replace(r"\mp", "-")
        return Node("set", text, (leaf(plus), leaf(minus)))
    return leaf(text)


def leaf(text: str) -> Node:
    return Node("leaf", text)


def _all_but(text: str, hole: Node) -> Node:
    low = Node("tuple", "", (leaf(r"-\infty"), hole), "()")
    return Node("set", text, (low, Node("tuple", "", (hole, leaf(r"\infty")), "()")))


def _both(text: str, nodes: tuple[Node, ...]) -> Node | None:
    """x > 1, x < 5 is (1, 5): two half-lines that overlap are meant together."""
    halves = [n for n in nodes if n.kind == "tuple" and _RELATION.search(n.text)]
    above = [n for n in halves if n.items[1].text == r"\infty"]
    below = [n for n in halves if n.items[0].text == r"-\infty"]
    if len(nodes) != 2 or len(above) != 1 or len(below) != 1:
        return None
    low, high = above[0].items[0], below[0].items[1]
    try:
        if rational(low.text) >= rational(high.text):
            return None
    except Unreadable:
        return None
    return Node("tuple", text, (low, high), above[0].marks[0] + below[0].marks[1])


def _relation(text: str, parts: list[str], signs: list[str]) -> Node:
    names = [notation.is_name(part) for part in parts]
    if set(signs) == {"="}:
        if names[0]:
            return Node("assign", text, (leaf(unwrap(parts[0])), read(parts[-1])))
        if names[-1] and len(parts) == 2:
            return Node("assign", text, (leaf(unwrap(parts[1])), read(parts[0])))
        if not re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", text)):
            return read(parts[-1])  # 3+4=7 states 7
        return Node("equation", text, (leaf(parts[0]), leaf(parts[-1])))
    if signs == [r"\ne"]:
        if names[0] and not names[1]:
            return _all_but(text, leaf(parts[1]))
        return Node("chain", text, tuple(map(leaf, parts)), "!")
    marks = "".join(
        {"<": "<", ">": ">", r"\le": "l", r"\ge": "g"}.get(s, "?") for s in signs
    )
    if set(marks) <= set(">g"):
        parts, names = parts[::-1], names[::-1]
        marks = marks[::-1].replace(">", "<").replace("g", "l")
    if not set(marks) <= set("<l"):
        return Node("chain", text, tuple(map(leaf, parts)), marks)
    size = re.fullmatch(r"\|([A-Za-z])\|", parts[0])
    if len(parts) == 2 and size and not notation.has_unknown(parts[1]):
        ends = (leaf(f"-({parts[1]})"), leaf(parts[1]))
        return Node("tuple", text, ends, {"<": "()", "l": "[]"}[marks])
    constant = [not notation.has_unknown(part) for part in parts]
    closing = {"<": ")", "l": "]"}
    opening = {"<": "(", "l": "["}
    if len(parts) == 3 and names[1] and constant[0] and constant[2]:
        ends = (leaf(parts[0]), leaf(parts[2]))
        return Node("tuple", text, ends, opening[marks[0]] + closing[marks[1]])
    if len(parts) == 2 and names[0] and constant[1]:
        return Node(
            "tuple", text, (leaf(r"-\infty"), leaf(parts[1])), "(" + closing[marks]
        )
    if len(parts) == 2 and names[1] and constant[0]:
        return Node(
            "tuple", text, (leaf(parts[0]), leaf(r"\infty")), opening[marks] + ")"
        )
    return Node("chain", text, tuple(map(leaf, parts)), marks)


class Exact:
    """Leaf comparisons that rational arithmetic settles; others are `Undecided`."""

    def same(self, a: str, b: str) -> bool:
        try:
            x, y = rational(a), rational(b)
        except TooLarge:
            return False
        except Unreadable:
            raise Undecided from None
        return x == y or _same_float(a, b, x, y)

    def proportional(self, a: str, b: str, positive: bool) -> bool:
        raise Undecided


def _same_float(a: str, b: str, x: Fraction, y: Fraction) -> bool:
    """A program's 15-digit output (0.30000000000000004) equals the number it rounds."""
    floats = [
        "." in text and len(text.replace(".", "").strip("-0")) >= 15 for text in (a, b)
    ]
    return any(floats) and abs(x - y) <= Fraction(1, 10**13) * max(abs(x), abs(y))


def match(a: Node, b: Node, numbers: Exact) -> bool:
    """Whether two structures are the same answer; `Undecided` if that needs algebra."""
    if a.text and a.text == b.text:
        return True
    if a.kind == "set" and len(a.items) == 1:
        return match(a.items[0], b, numbers)
    if b.kind == "set" and len(b.items) == 1:
        return match(a, b.items[0], numbers)
    if a.kind == "assign" and b.kind == "assign":
        if a.items[0].text == b.items[0].text:
            return match(a.items[1], b.items[1], numbers)
        return numbers.proportional(_difference(a), _difference(b), False)
    if a.kind == b.kind == "leaf":
        return match_leaves(a.text, b.text, numbers)
    for one, other in ((a, b), (b, a)):
        if one.kind == "assign":
            if other.kind == "equation":
                return numbers.proportional(_difference(one), _difference(other), False)
            return match(one.items[1], other, numbers)
    if a.kind == b.kind == "equation":
        return numbers.proportional(_difference(a), _difference(b), False)
    if a.kind == b.kind == "set":
        return _same_members(list(a.items), list(b.items), numbers)
    if a.kind == b.kind and a.kind in ("tuple", "matrix", "chain"):
        if a.marks == b.marks and len(a.items) == len(b.items):
            if all(match(x, y, numbers) for x, y in zip(a.items, b.items, strict=True)):
                return True
            if a.kind != "chain":
                return False
        elif a.kind == "tuple":
            return False
        if a.kind == "chain" and len(a.items) == len(b.items) == 2:
            if a.marks == b.marks and a.marks in ("<", "l"):
                return numbers.proportional(_difference(a), _difference(b), True)
        return False
    for one, other in ((a, b), (b, a)):
        if one.kind == "set" and re.fullmatch("[A-H]{2,}", other.text):  # options ACD
            letters = sorted(notation.plain(item.text) for item in one.items)
            return letters == sorted(other.text.lower())
        if one.kind == "set" and other.kind == "tuple" and other.marks == "()":
            named = all(item.kind == "assign" for item in one.items)
            if named and len(one.items) == len(other.items):
                pairs = zip(one.items, other.items, strict=True)
                return all(match(x, y, numbers) for x, y in pairs)
        if one.kind == "matrix" and other.kind == "tuple" and other.marks == "()":
            column = all(len(row.items) == 1 for row in one.items)
            flat = [row.items[0] for row in one.items] if column else one.items[0].items
            if (column or len(one.items) == 1) and len(flat) == len(other.items):
                return all(
                    match(x, y, numbers) for x, y in zip(flat, other.items, strict=True)
                )
    kinds = {a.kind, b.kind}
    structured = "leaf" not in kinds and kinds & {"chain", "equation", "matrix"}
    if structured or (kinds == {"set", "tuple"} and _RELATION.search(a.text + b.text)):
        raise Undecided
    return False


def _difference(node: Node) -> str:
    left, right = node.items
    return f"({left.text})-({right.text})"


def _same_members(left: list[Node], right: list[Node], numbers: Exact) -> bool:
    """Each one of either side has its equal on the other."""
    if max(len(left), len(right)) > MAX_MEMBERS:
        return False
    return all(
        any(match(item, other, numbers) for other in others)
        for items, others in ((left, right), (right, left))
        for item in items
    )


def match_leaves(a: str, b: str, numbers: Exact) -> bool:
    """Two answers without structure: text, times, ratios, bases, units, numbers."""
    if notation.plain(a) == notation.plain(b):
        return True
    kinds = {notation.leaf_kind(a), notation.leaf_kind(b)}
    if kinds == {"text"}:
        return False
    if "time" in kinds:
        return notation.same_time(a, b)
    if "base" in kinds:
        return notation.same_base(a, b)
    quantities = [notation.quantity(a), notation.quantity(b)]
    (x, unit_x), (y, unit_y) = quantities
    if unit_x and unit_y and unit_x != unit_y:
        return False
    if "text" in kinds and not (x and y):
        return False
    if kinds == {"ratio"} or kinds == {"ratio", "number"}:
        x, y = x.replace(":", "/"), y.replace(":", "/")
        return (x.count("/") == y.count("/") or "ratio" in kinds) and numbers.same(x, y)
    if (unit_x == "%") == (unit_y == "%"):
        return numbers.same(x, y)
    if unit_x == "%":
        return numbers.same(x, y) or numbers.same(f"({x})/100", y)
    return numbers.same(x, y) or numbers.same(x, f"({y})/100")


def compare(prediction: str, reference: str, numbers: Exact) -> bool:
    """`equivalent` with a given arithmetic: exact here, algebraic in a worker."""
    if prediction.strip() == reference.strip():
        return bool(reference.strip())
    if max(len(prediction), len(reference)) > MAX_CHARS:
        return False
    numerals = [_PLAIN.fullmatch(text) for text in (prediction, reference)]
    if all(numerals):  # most of GSM8K
        x, y = (
            Fraction(found[1] + found[2].replace(",", ""))
            for found in numerals
            if found
        )
        return x == y
    p, r = clean(prediction), clean(reference)
    if not p or not r:
        return False
    a, b = read(p), read(r)
    if match(a, b, numbers):
        return True
    if (a.kind == "set") != (b.kind == "set"):  # 100,200,300 may be three numbers
        return match(read(p, thousands=False), read(r, thousands=False), numbers)
    return False


def equivalent(prediction: str, reference: str) -> bool:
    r"""Whether a predicted answer is the reference answer; never raises, bounded time.

    Rational answers are settled in the calling thread; all else, and so any hostile
    text, in the killable workers of `grading`.

    >>> equivalent(r"\dfrac{3}{6}", "0.5"), equivalent("20%", "20"), equivalent("2", "200")
    (True, True, False)
    >>> equivalent("$12,000", "12000 dollars"), equivalent("3 cm", r"3\text{ cm}^2")
    (True, False)
    """
    from grpo_jax import grading

    return grading.grade([prediction], [reference])[0]
