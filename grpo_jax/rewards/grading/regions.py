r"""Normalises sets of real numbers: unions of intervals and points.

`normalize_region` converts the structure of an answer with \cup, \cap, "or", "and" or
\ne to its spans in order. Adjacent spans are joined, so (1,2]\cup(2,3) and 1<x<3 give
the same list.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

from grpo_jax.rewards.grading.structure import RELATION, Node

Bound = Fraction | float  # floats are only used for ±infinity
Span = tuple[Bound, bool, Bound, bool]  # low, low included, high, high included
Value = Callable[[str], Fraction | None]
ALL: list[Span] = [(-math.inf, False, math.inf, False)]


def is_region(node: Node) -> bool:
    """Returns whether a node is a union, an intersection or an inequality."""
    if node.kind == "tuple":
        return bool(RELATION.search(node.text))
    return node.kind == "set" and node.marks in ("or", "and", "either")


def normalize_region(node: Node, value: Value) -> list[Span] | None:
    """Returns the spans of an answer, or None if it is not a set of real numbers.

    Args:
      node: the structure of the answer.
      value: returns the value of a text, or None if it is not a real constant.
    """
    if node.kind == "assign":
        return normalize_region(node.items[1], value)
    if node.kind == "leaf":
        x = value(node.text)
        return None if x is None else [(x, True, x, True)]
    if node.kind == "tuple":
        return _interval(node, value)
    if node.kind != "set":
        return None
    if node.marks == "{}" and any(item.kind == "tuple" for item in node.items):
        return None  # a set of points in the plane
    parts = []
    for item in node.items:
        part = normalize_region(item, value)
        if part is None:
            return None
        parts.append(part)
    if node.marks in ("and", "either"):
        common = functools.reduce(_common, parts, ALL)
        if common or node.marks == "and":
            return common
    return _union([span for part in parts for span in part])


def _interval(node: Node, value: Value) -> list[Span] | None:
    if len(node.items) != 2 or any(item.kind != "leaf" for item in node.items):
        return None
    low, high = (_bound(item.text, value) for item in node.items)
    closed = node.marks[0] == "[", node.marks[1] == "]"
    if low is None or high is None:
        return None
    if low > high or (low == high and not all(closed)):
        return [] if RELATION.search(node.text) else None
    return [(low, closed[0], high, closed[1])]


def _bound(text: str, value: Value) -> Bound | None:
    if infinite := re.fullmatch(r"([-+]?)\(?\\infty\)?", text):
        return -math.inf if infinite[1] == "-" else math.inf
    return value(text)


def _union(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for low, in_low, high, in_high in sorted(spans, key=lambda s: (s[0], not s[1])):
        if joined:
            first, in_first, last, in_last = joined[-1]
            if low < last or (low == last and (in_last or in_low)):
                end = max((last, in_last), (high, in_high))
                joined[-1] = (first, in_first, *end)
                continue
        joined.append((low, in_low, high, in_high))
    return joined


def _common(left: list[Span], right: list[Span]) -> list[Span]:
    found = []
    for a, b in itertools.product(left, right):
        low, not_low = max((a[0], not a[1]), (b[0], not b[1]))
        high, in_high = min(a[2:], b[2:])
        if low < high or (low == high and not not_low and in_high):
            found.append((low, not not_low, high, in_high))
    return _union(found)
