r"""The structure of a cleaned answer: lists, tuples, intervals, equations, matrices.

In: text that `notation.clean` has normalised. Out: a `Node` (`read`). An inequality
in one name becomes its interval, ± two answers, ① ② a list.
"""

import re
from dataclasses import dataclass

from grpo_jax.grading.brackets import closes, outside, split, unwrap
from grpo_jax.grading.expressions import Unreadable, rational
from grpo_jax.grading.notation import END, ROW, TEXT, rules

RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")
_SIGN = re.compile(r"\\(pm|mp)(?![a-z])")


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
        text = join_thousands(text)
    if re.fullmatch(r"\\(emptyset|varnothing)|\\\{\\\}", text):
        return Node("set", r"\emptyset")
    if text in (r"\mathbb{R}", r"\R", r"\text{all real numbers}", r"\text{all reals}"):
        return Node("tuple", text, (leaf(r"-\infty"), leaf(r"\infty")), "()")
    if inner := re.fullmatch(r"(?:[A-Za-z](?:_\w)?)\\in(?![a-z])(.+)", text):
        return read(inner.group(1), thousands=thousands)
    if cells := matrix_rows(text):
        rows = tuple(Node("tuple", "", tuple(map(read, row)), "[]") for row in cells)
        return Node("matrix", text, rows)
    for separator in (";", ","):
        parts = split(text, separator)
        if len(parts) > 1:
            nodes: tuple[Node, ...] = ()
            for part in filter(None, parts):
                node = read(part, thousands=thousands)
                two = node.kind == "set" and _SIGN.search(part)  # ±1, ±2 are four
                nodes += node.items if two else (node,)
            return _both(text, nodes) or Node("set", text, nodes)
    if len(parts := split(text, r"\cup")) > 1:
        return Node("set", text, tuple(read(part) for part in parts))
    if text.startswith(r"\{") and closes(text, r"\{", r"\}"):
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
    if text[:1] in "([" and text[-1:] in ")]" and closes(text):
        parts = split(text[1:-1], ";")
        parts = parts if len(parts) > 1 else split(text[1:-1], ",")
        if len(parts) > 1:
            inside = tuple(read(part, thousands=False) for part in parts)
            return Node("tuple", text, inside, text[0] + text[-1])
        if text[0] == "(" and text[-1] == ")":
            return read(text[1:-1], thousands=thousands)
    if sides := relation_sides(text):
        return _relation(text, *sides)
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
    halves = [n for n in nodes if n.kind == "tuple" and RELATION.search(n.text)]
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
    names = [is_name(part) for part in parts]
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
    short = {"<": "<", ">": ">", r"\le": "l", r"\ge": "g"}
    marks = "".join(short.get(sign, "?") for sign in signs)
    if set(marks) <= set(">g"):
        parts, names = parts[::-1], names[::-1]
        marks = marks[::-1].replace(">", "<").replace("g", "l")
    if not set(marks) <= set("<l"):
        return Node("chain", text, tuple(map(leaf, parts)), marks)
    size = re.fullmatch(r"\|([A-Za-z])\|", parts[0])
    if len(parts) == 2 and size and not has_unknown(parts[1]):
        ends = (leaf(f"-({parts[1]})"), leaf(parts[1]))
        return Node("tuple", text, ends, {"<": "()", "l": "[]"}[marks])
    closing, opening = {"<": ")", "l": "]"}, {"<": "(", "l": "["}
    constant = [not has_unknown(part) for part in parts]
    if len(parts) == 3 and names[1] and constant[0] and constant[2]:
        bracket = opening[marks[0]] + closing[marks[1]]
        return Node("tuple", text, (leaf(parts[0]), leaf(parts[2])), bracket)
    if len(parts) == 2 and names[0] and constant[1]:
        ends = (leaf(r"-\infty"), leaf(parts[1]))
        return Node("tuple", text, ends, "(" + closing[marks])
    if len(parts) == 2 and names[1] and constant[0]:
        ends = (leaf(parts[0]), leaf(r"\infty"))
        return Node("tuple", text, ends, opening[marks] + ")")
    return Node("chain", text, tuple(map(leaf, parts)), marks)


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SIDES = re.compile(r"\\(?:le|ge|ne)(?![a-z])|[<>=]")


def join_thousands(text: str) -> str:
    """12,345 outside brackets is one number."""
    joined, last = "", 0
    for match in outside(text, _THOUSANDS):
        joined += text[last : match.start()] + match.group().replace(",", "")
        last = match.end()
    return joined + text[last:]


def matrix_rows(text: str) -> list[list[str]] | None:
    """The entries of one LaTeX matrix that is the whole text."""
    found = re.fullmatch(r"\\begin\{([bBp]?matrix)\}(.*)\\end\{\1\}", text, re.S)
    if not found or r"\begin" in found.group(2):
        return None
    rows = [row for row in found.group(2).split(ROW) if row.strip()]
    return [[cell for cell in row.split("&")] for row in rows]


def relation_sides(text: str) -> tuple[list[str], list[str]] | None:
    """The sides and the signs of an equation or inequality, or None."""
    signs = [match.group() for match in outside(text, _SIDES)]
    sides = [side.strip() for side in split(text, _SIDES)]
    return (sides, signs) if signs and all(sides) else None


_NAME_LIKE = rules(
    (TEXT + r"|\\(?:angle|triangle|mathbf|vec)" + END, "w"),
    (r"_(?:\{[^{}]*\}|\w)|\^\{-1\}(?=\()", ""),
    (r"\\frac\{[A-Za-z]+\}\{[A-Za-z]+\}|\b[A-Z]+/[A-Z]+\b|\|[A-Z]{2}\|", "w"),
    (r"(?<=[A-Za-z}'])\([^()]*\)", ""),
    (r"^\([A-Za-z](?:,[A-Za-z])+\)$", "w"),
)
_VALUES = r"\\(?:infty|pi|sqrt|frac|cdot|times|div|ln|log|sin|cos|tan|sum|pm)" + END


def is_name(text: str) -> bool:
    r"""x, a_{12}, f(2), P(X=1), AB, V_1:V_2, (x,y), \angle A: can be assigned to."""
    if len(text) > 60 or text in ("i", "e"):
        return False
    for pattern, replacement in _NAME_LIKE:
        text = pattern.sub(replacement, text)
    if re.search(_VALUES, text):
        return False
    return bool(re.fullmatch(r"[\\A-Za-z{}:' ]*[A-Za-z][\\A-Za-z{}:' ]*", text))


def has_unknown(text: str) -> bool:
    """Whether a name other than e and i appears."""
    return bool(re.search(r"[A-Za-df-hj-z\\]", re.sub(TEXT + "|" + _VALUES, "", text)))
