"""Untrusted text and numbers, made safe to stand in an HTML page.

A model, a data set or a damaged file may hold anything. What comes out has no character
that hides, reverses or breaks the text beside it.
"""

from __future__ import annotations

import html
import json
import math
import unicodedata
from typing import Any

_KEPT = "\n\t\u200c\u200d"  # the joiners: Persian and emoji need them
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def make_visible(value: Any, max_characters: int = 20_000) -> str:
    r"""Returns the text with control, direction and format characters written as ⟨U+…⟩.

    A longer text ends in an ellipsis. Returns "" for a value that is no text.

    >>> make_visible("a\x1b[31m \u202eb")
    'a⟨U+001B⟩[31m ⟨U+202E⟩b'
    """
    if not isinstance(value, str):
        return ""
    text = value[:max_characters]
    if not text.isprintable():
        text = "".join(map(_visible_character, text))
    if len(value) <= max_characters and len(text) <= max_characters:
        return text
    return text[: max_characters - 1] + "…"


def _visible_character(c: str) -> str:
    if c in _KEPT or unicodedata.category(c) not in _HIDDEN_CATEGORIES:
        return c
    return f"⟨U+{ord(c):04X}⟩"


def escape_html(value: Any, max_characters: int = 200) -> str:
    """Returns the visible text as HTML, for an element or for a quoted attribute."""
    return html.escape(make_visible(value, max_characters))


def finite_number(value: Any) -> float | None:
    """Returns the value as a float; None if it is not a finite number.

    >>> [finite_number(x) for x in (1, float("nan"), "1", 10**999, True)]
    [1.0, None, None, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def format_number(value: float | None) -> str:
    """Returns the number with four digits; an en dash for None.

    >>> [format_number(x) for x in (0.123456, -1e-9, 12345.6, None)]
    ['0.1235', '−1e−09', '12346', '–']
    """
    if value is None:
        return "–"
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def script_json(value: Any) -> str:
    """Returns the value as JSON that cannot end the <script> element around it.

    >>> script_json({"a": "</script><!--"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text
