r"""Splits text at brackets, and finds the contents of `\boxed{…}`.

The text may be plain or LaTeX. Every function takes one pass, whatever the nesting.
`(`, `[`, `{` and `\{` open, and their partners close. Any closing bracket matches any
opening one, as `[1, 2)` is an interval.
"""

import re
from collections.abc import Iterator

_BRACKET = re.compile(r"\\[{}]|\\.|[(){}\[\]]", re.S)
_OPENING = ("(", "[", "{", r"\{")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?:\{|(\w{1,99}))|\\.|[{}]", re.S)


def find_brackets(text: str) -> Iterator[tuple[int, int, int]]:
    """Yields (start, end, depth after it) of each bracket; commands do not count."""
    depth = 0
    for found in _BRACKET.finditer(text):
        if len(found.group()) == 1 or found.group() in (r"\{", r"\}"):
            depth += 1 if found.group() in _OPENING else -1
            yield found.start(), found.end(), depth


def matches_outside_brackets(
    text: str, pattern: re.Pattern[str]
) -> Iterator[re.Match[str]]:
    """Yields the matches of a pattern that no bracket encloses."""
    inside, depth = find_brackets(text), 0
    start, _, after = next(inside, (len(text), 0, 0))
    for found in pattern.finditer(text):
        while start < found.start():
            depth = after
            start, _, after = next(inside, (len(text), 0, 0))
        if depth <= 0:
            yield found


def split_outside_brackets(text: str, separators: str | re.Pattern[str]) -> list[str]:
    r"""Splits a text at the separators that no bracket encloses.

    Args:
      text: the text.
      separators: a literal text, or a pattern.

    >>> split_outside_brackets(r"1, (2, 3), \{4, 5\}", ",")
    ['1', ' (2, 3)', ' \\{4, 5\\}']
    """
    if isinstance(separators, str):
        separators = re.compile(re.escape(separators))
    parts, start = [], 0
    for found in matches_outside_brackets(text, separators):
        parts.append(text[start : found.start()])
        start = found.end()
    return [*parts, text[start:]]


def is_enclosed(text: str) -> bool:
    """Returns whether the partner of the first bracket is the last character."""
    return next(
        (end == len(text) for _, end, n in find_brackets(text) if n == 0), False
    )


def strip_braces(text: str) -> str:
    """Removes braces that enclose the whole text."""
    text = text.strip()
    while (
        text[:1] == "{"
        and text[-1:] == "}"
        and text[-2:] != r"\}"
        and is_enclosed(text)
    ):
        text = text[1:-1].strip()
    return text


def find_boxed(text: str) -> list[str]:
    r"""Returns the contents of each complete `\boxed{…}` or `\fbox{…}`, in order.

    Braces are balanced. Of nested boxes, only the outermost complete one counts.

    >>> find_boxed(r"\boxed{a_{1}}, \boxed 7, \boxed{2, \boxed{3} ")
    ['a_{1}', '7', '3']
    >>> find_boxed(r"\fbox{\fbox{4}}")
    ['\\fbox{4}']
    """
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # start of a box's content; None for other braces
    starts = [at for at in (text.find(r"\boxed"), text.find(r"\fbox")) if at >= 0]
    for token in _BOX.finditer(text, min(starts, default=len(text))):
        if token[1]:
            found.append(token.span(1))
        elif token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None:
                while found and found[-1][0] >= start:
                    found.pop()
                found.append((start, token.start()))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
    return [text[start:end] for start, end in found]
