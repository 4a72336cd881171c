r"""Parses a cleaned answer: lists, tuples, intervals, equations and matrices.

`parse_answer` converts text from `notation.normalize_notation` to a `Node`. An
inequality in one variable becomes its interval, and ± becomes two answers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from grpo_jax.data.brackets import (
    is_enclosed,
    matches_outside_brackets,
    split_outside_brackets,
    strip_braces,
)
from grpo_jax.rewards.grading.notation import APART, END, OR, ROW
from grpo_jax.rewards.grading.units import TEXT
from grpo_jax.rewards.grading.wording import compile_rules

RELATION = re.compile(r"[<>]|\\(?:[lgn]e)(?![a-z])")
_REALS = (
    r"\mathbb{R}", r"\mathbf{R}", r"\R", r"\text{R}", r"\text{all real numbers}",
    r"\text{all reals}", r"\text{实数集}", r"\text{全体实数}", r"\text{一切实数}",
)  # fmt: skip
_SIGN = re.compile(r"\\(pm|mp)(?![a-z])")


@dataclass(frozen=True)
class Node:
    """A node in the structure of an answer.

    An interval is a tuple of its ends; x > 1 is (1, infinity).

    Attributes:
      kind: leaf, set (unordered), tuple, matrix, assign (name, value), equation (two
        sides), chain (of inequalities) or family (over an integer).
      text: the cleaned text of the node.
      items: the children.
      marks: a tuple's brackets, a chain's signs, or a family's letter and domain. For a
        set: "{}" if it is written with braces, or "or", "and" or "either" if it is a
        region, for how its parts are joined.
    """

    kind: str
    text: str
    items: tuple["Node", ...] = ()
    marks: str = ""


def parse_answer(text: str, *, thousands: bool = True) -> Node:
    """Returns the structure of a cleaned answer.

    Args:
      text: the answer, from `notation.normalize_notation`.
      thousands: read 12,345 outside brackets as one number.
    """
    text = strip_braces(text)
    if thousands:
        text = join_thousands(text)
    text = text.replace(APART, "")
    if re.fullmatch(r"\\(emptyset|varnothing)|\\\{\\\}", text):
        return Node("set", r"\emptyset")
    if text in _REALS:
        return _interval(r"-\infty", r"\infty", text=text)
    if family := _family(text):
        return family
    if inner := re.fullmatch(r"(?:[A-Za-z](?:_\w)?)\\in(?![a-z])(.+)", text):
        return parse_answer(inner.group(1), thousands=thousands)
    if matrix := _matrix(text):
        return matrix
    for separator in (OR, ";", ","):
        parts = [part for part in split_outside_brackets(text, separator) if part]
        if parts and parts != [text]:
            return _list(text, parts, separator, thousands)
    if len(parts := split_outside_brackets(text, r"\cup")) > 1:
        nodes = tuple(map(parse_answer, parts))
        if all(node.marks == "{}" for node in nodes):
            members = {item.text: item for node in nodes for item in node.items}
            return Node("set", text, tuple(members.values()), "{}")
        return Node("set", text, nodes, "or")
    if len(parts := split_outside_brackets(text, r"\cap")) > 1:
        return Node("set", text, tuple(parse_answer(part) for part in parts), "and")
    if text.startswith(r"\{") and text.endswith(r"\}") and is_enclosed(text):
        return _braces(text[2:-2])
    if complement := re.fullmatch(
        r"\\mathbb\{R\}(?:\\setminus|\\backslash|-)\\\{(.+)\\\}", text
    ):
        return _all_but(text, complement.group(1))
    if text[:1] in "([" and text[-1:] in ")]" and is_enclosed(text):
        parts = split_outside_brackets(text[1:-1], ";")
        parts = parts if len(parts) > 1 else split_outside_brackets(text[1:-1], ",")
        if len(parts) > 1:
            inside = tuple(parse_answer(part, thousands=False) for part in parts)
            lists = all(item.kind == "tuple" and item.marks == "[]" for item in inside)
            even = len({len(item.items) for item in inside}) == 1
            if text[0] == "[" and lists and even:  # [[1,2],[3,4]]
                return Node("matrix", text, inside)
            return Node("tuple", text, inside, text[0] + text[-1])
        if text[0] == "(" and text[-1] == ")":
            return parse_answer(text[1:-1], thousands=thousands)
    if sides := relation_sides(text):
        return _relation(text, *sides)
    if _SIGN.search(text):
        signs = {r"\pm": "+-", r"\mp": "-+"}
        both = (_SIGN.sub(lambda m, n=n: signs[m[0]][n], text) for n in (0, 1))
        return Node("set", text, tuple(map(make_leaf, both)))
    return make_leaf(text)


def _list(text: str, parts: list[str], separator: str, thousands: bool) -> Node:
    """Parses a list of answers; inequalities in one variable form a region."""
    unequal = re.match(r"[A-Za-z]\\ne", parts[0])
    if unequal and separator == "," and not any(map(RELATION.search, parts[1:])):
        return _all_but(text, ",".join([parts[0][unequal.end() :], *parts[1:]]))
    nodes: tuple[Node, ...] = ()
    for part in parts:
        node = parse_answer(part, thousands=thousands)
        several = node.kind == "set" and not node.marks  # ±1, ±2 are four answers
        named = all(item.kind == "assign" for item in node.items)
        opened = _SIGN.search(part) or (separator == OR and not named)
        nodes += node.items if several and opened else (node,)
    marks = ""
    relations = [bool(RELATION.search(part)) for part in parts]
    if len({name for part in parts for name in re.findall(_NAME, part)}) <= 1:
        if separator == OR and any(node.kind in ("tuple", "set") for node in nodes):
            marks = "or"
        elif separator == "," and all(relations):
            marks = "either"
    return Node("set", text, nodes, marks)


def _braces(inner: str) -> Node:
    """Parses the content of braces: members, or a condition."""
    builder = re.match(r"[A-Za-z](?:\\in\\mathbb\{[RCZ]\})?(?:\\mid|\||:)", inner)
    if builder:
        return parse_answer(inner[builder.end() :])
    inside = parse_answer(inner, thousands=False)
    plain = inside.kind == "set" and not inside.marks
    members = inside.items if plain else (inside,)
    return Node("set", rf"\{{{inner}\}}", members, "{}")


def make_leaf(text: str) -> Node:
    """Returns a node without structure."""
    return Node("leaf", text)


def _interval(low: str, high: str, marks: str = "()", text: str = "") -> Node:
    return Node("tuple", text, (make_leaf(low), make_leaf(high)), marks)


def _outside(low: str, high: str, marks: str, text: str) -> Node:
    """Returns the numbers up to `low` and from `high` on."""
    below = _interval(r"-\infty", low, "(" + marks[0])
    above = _interval(high, r"\infty", marks[1] + ")")
    return Node("set", text, (below, above), "or")


def _all_but(text: str, holes: str) -> Node:
    node = parse_answer(holes, thousands=False)
    texts = [hole.text for hole in (node.items if node.kind == "set" else (node,))]
    gaps = [_outside(hole, hole, ")(", text) for hole in texts]
    return gaps[0] if len(gaps) == 1 else Node("set", text, tuple(gaps), "and")


def _absolute(text: str, parts: list[str], marks: str) -> Node | None:
    """Parses |x-1| < 2 as (-1, 3), and |x| > 3 as the two half-lines outside."""
    outside = re.fullmatch(r"\|[^|]*\|", parts[-1])
    size, limit = parts[::-1] if outside else parts
    found = re.fullmatch(r"\|[A-Za-z]((?:[-+][^|]+)?)\|", size)
    if not found or has_unknown(limit + found[1]):
        return None
    low, high = (f"{sign}({limit})-(0{found[1]})" for sign in ("-", ""))
    if outside:
        return _outside(low, high, "][" if marks == "l" else ")(", text)
    return _interval(low, high, "[]" if marks == "l" else "()", text)


# ---- families: x = k\pi, k an integer ------------------------------------------------
_SETS = (
    r"(?:\\(?:mathbb|mathbf|text)\{([ZN])\}|[ \\]?([ZN]))(?:[\^_]\{?([+*])\}?|([+*]))?"
)
_INTEGER = (
    r"[^{}]*?(positive|natural|non-?negative|正|自然)?"
    r"[^{}]*?(?:integers?|numbers?|整数|数)"
)  # fmt: skip
_DOMAIN = re.compile(
    r"(?:[,;:|]|\\mid)?\(?(?:\\text\{[^{}]*\})?(?:"
    rf"([A-Za-z])\\in{_SETS}"
    r"|([A-Za-z])=0,\\pm1(?:,\\pm2)?(?:,\\pm3)?,?(?:\\[lc]?dots|\.\.\.)"
    rf"|([A-Za-z])\\text\{{{_INTEGER}\}}"
    rf"|\\text\{{(?:where|for|with|when|对|其中)?{_INTEGER}\}}([A-Za-z])"
    r")\)?$"
)
SHIFTS = 3  # the largest shift of the integer between two equal families


def _family(text: str) -> Node | None:
    if not re.search(r"\\in(?![a-z])|\\text|\\pm", text):
        return None
    found = _DOMAIN.search(text)
    if not found or not found.start():
        return None
    name, *sets, counted, worded, words, words_before, before = found.groups()
    letter = name or counted or worded or before
    words, rest = words or words_before, text[: found.start()]
    domain = sets[0] or sets[1] or ("N" if words else "Z")
    if sets[2] or sets[3] or words in ("positive", "正"):
        domain = "N+"
    uneven = rest.count("(") != rest.count(")") and "[" not in rest
    if letter not in letters_of(rest) or uneven:
        return None
    return Node("family", text, (parse_answer(rest),), letter + domain)


def letters_of(text: str) -> set[str]:
    """Returns the letters of a text that belong to no LaTeX command."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))


def family_members(family: Node, letter: str) -> list[Node]:
    """Returns spellings of a family: its integer shifted, and counted down.

    Args:
      family: a node of kind "family".
      letter: the letter for the integer in the result.
    """
    old, domain, rest = family.marks[0], family.marks[1:], family.items[0].text
    forms = [letter]
    if domain == "Z":
        steps = range(-SHIFTS, SHIFTS + 1)
        forms = [f"({s}{letter}{j:+d})" for j in steps for s in ("", "-")]
        forms.sort(key=lambda form: form != f"({letter}+0)")

    def put(form: str) -> str:
        return re.sub(rf"(\\[A-Za-z]+)|{old}", lambda m: m[1] or form, rest)

    return [parse_answer(put(form)) for form in forms]


def family_of(node: Node, letter: str) -> Node | None:
    """Returns an answer as a family over a letter that it does not declare.

    Returns None if the letter is not k, n or m, or not in the answer.
    """
    usual = letter in "knm" and letter in letters_of(node.text)
    return Node("family", node.text, (node,), letter + "Z") if usual else None


def _relation(text: str, parts: list[str], signs: list[str]) -> Node:
    names = [is_name(part) for part in parts]
    if set(signs) == {"="}:
        if not names[0] and names[-1] and len(parts) == 2:
            parts, names = parts[::-1], names[::-1]
        if names[0]:
            sides = make_leaf(strip_braces(parts[0])), parse_answer(parts[-1])
            return Node("assign", text, sides)
        states = not re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", text))
        if states or (len(parts) > 2 and not any(map(has_unknown, parts[-2:]))):
            # 3+4=7 states 7, and b^a = 3^5 = 243 states 243.
            return parse_answer(parts[-1])
        return Node("equation", text, (make_leaf(parts[0]), make_leaf(parts[-1])))
    if signs == [r"\ne"]:
        if names[0] and not names[1]:
            return _all_but(text, parts[1])
        return Node("chain", text, tuple(map(make_leaf, parts)), "!")
    short = {"<": "<", ">": ">", r"\le": "l", r"\ge": "g"}
    marks = "".join(short.get(sign, "?") for sign in signs)
    if set(marks) <= set(">g"):
        parts, names = parts[::-1], names[::-1]
        marks = marks[::-1].translate(str.maketrans(">g", "<l"))
    if not set(marks) <= set("<l"):
        return Node("chain", text, tuple(map(make_leaf, parts)), marks)
    if len(parts) == 2 and (inside := _absolute(text, parts, marks)) is not None:
        return inside
    constant = [not has_unknown(part) for part in parts]
    ends, within = parts, marks
    if len(parts) == 2 and names[0] and constant[1]:
        ends, within = [r"-\infty", *parts], "<" + marks
    elif len(parts) == 2 and names[1] and constant[0]:
        ends, within = [*parts, r"\infty"], marks + "<"
    elif len(parts) != 3 or not (constant[0] and names[1] and constant[2]):
        return Node("chain", text, tuple(map(make_leaf, parts)), marks)
    bracket = {"<": "(", "l": "["}[within[0]] + {"<": ")", "l": "]"}[within[1]]
    return _interval(ends[0], ends[2], bracket, text)


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SIDES = re.compile(r"\\(?:le|ge|ne)(?![a-z])|[<>=]")


def join_thousands(text: str) -> str:
    """Joins groups of thousands outside brackets: 12,345 becomes 12345."""
    if "," not in text:
        return text
    joined, last = "", 0
    for match in matches_outside_brackets(text, _THOUSANDS):
        joined += text[last : match.start()] + match.group().replace(",", "")
        last = match.end()
    return joined + text[last:]


_MATRIX = re.compile(
    r"(.*?)\\begin\{([pv]matrix)\}(.*)\\end\{\2\}(\^\{?(?:T|\\text\{T\}|\\top|\\prime|')\}?)?",
    re.S,
)


def _matrix(text: str) -> Node | None:
    """Parses a matrix and its factor; a matrix between bars is its determinant."""
    if listed := re.fullmatch(r"([(\[].*[)\]])\^\{?(?:T|\\text\{T\}|\\top)\}?", text):
        row = parse_answer(listed[1])
        if row.kind == "tuple" and is_enclosed(listed[1]):
            return Node("matrix", text, tuple(_row([item]) for item in row.items))
    found = r"\begin" in text and _MATRIX.fullmatch(text)
    if not found or r"\begin" in found[1] + found[3]:
        return None
    factor, name, body, transposed = found.groups()
    cells = [row.split("&") for row in body.split(ROW) if row.strip()]
    if name == "vmatrix":
        return make_leaf(f"{factor}({_determinant(cells)})")
    if re.search(r"[-+]$|[=<>]", factor[1:]):
        return None
    factor = "-1" if factor == "-" else factor
    if factor:
        cells = [[f"({factor})({cell})" for cell in row] for row in cells]
    if transposed and len({len(row) for row in cells}) == 1:
        cells = [list(column) for column in zip(*cells, strict=True)]
    return Node("matrix", text, tuple(_row(map(parse_answer, row)) for row in cells))


def _row(items: Iterable[Node]) -> Node:
    return Node("tuple", "", tuple(items), "[]")


def _determinant(cells: list[list[str]]) -> str:
    if len(cells) > 4 or any(len(row) != len(cells) for row in cells):
        return r"\text{determinant}"
    if len(cells) == 1:
        return cells[0][0]
    terms = []
    for n, cell in enumerate(cells[0]):
        minor = [row[:n] + row[n + 1 :] for row in cells[1:]]
        terms.append(f"{'-' if n % 2 else '+'}({cell})({_determinant(minor)})")
    return "".join(terms)


def relation_sides(text: str) -> tuple[list[str], list[str]] | None:
    """Returns the sides and the signs of an equation or inequality, or None."""
    signs = [match.group() for match in matches_outside_brackets(text, _SIDES)]
    sides = [side.strip() for side in split_outside_brackets(text, _SIDES)]
    return (sides, signs) if signs and all(sides) else None


_NAME = r"(?<!\\)(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
_NAME_LIKE = compile_rules(
    (TEXT + r"|\\(?:angle|triangle|mathbf|vec)" + END, "w"),
    (r"_(?:\{[^{}]*\}|\w)|\^\{-1\}(?=\()", ""),
    (r"\\frac\{[A-Za-z]+\}\{[A-Za-z]+\}|\b[A-Z]+/[A-Z]+\b|\|[A-Z]{2}\|", "w"),
    (r"(?<=[A-Za-z}'])\([^()]*\)", ""),
    (r"^\([A-Za-z](?:,[A-Za-z])+\)$", "w"),
)
_VALUES = r"\\(?:infty|pi|sqrt|frac|cdot|times|div|ln|log|sin|cos|tan|sum|pm)" + END


def is_name(text: str) -> bool:
    r"""Returns whether a text names something that an equation can define.

    Examples are x, a_{12}, f(2), P(X=1), AB, V_1:V_2, (x,y) and \angle A.
    """
    if len(text) > 60 or text in ("i", "e"):
        return False
    for pattern, replacement in _NAME_LIKE:
        text = pattern.sub(replacement, text)
    if re.search(_VALUES, text):
        return False
    return bool(re.fullmatch(r"[\\A-Za-z{}:' ]*[A-Za-z][\\A-Za-z{}:' ]*", text))


def has_unknown(text: str) -> bool:
    """Returns whether a text contains a name other than e and i."""
    return bool(re.search(r"[A-Za-df-hj-z\\]", re.sub(TEXT + "|" + _VALUES, "", text)))
