"""Text and numbers from anywhere → what may stand in a page.

In: strings that a model, a data set or a file holds; JSON values. Out: strings without
a character that hides, turns round or breaks what stands near it; HTML; JSON for a
script element.
"""

from __future__ import annotations

import html
import json
import math
import unicodedata
from typing import Any

_SHOWN_AS_THEY_ARE = "\n\t\u200c\u200d"  # the joiners: Persian and emoji need them
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(value: Any, most: int = 20_000) -> str:
    r"""The text with control, direction and format characters made visible.

    Cut after `most` characters; "" for what is not text.

    >>> visible("a\x1b[31m \u202eb")
    'a⟨U+001B⟩[31m ⟨U+202E⟩b'
    """
    if not isinstance(value, str):
        return ""
    text = value[:most]
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return text if len(value) <= most and len(text) <= most else text[: most - 1] + "…"


def _visible(c: str) -> str:
    if c in _SHOWN_AS_THEY_ARE or unicodedata.category(c) not in _HIDDEN:
        return c
    return f"⟨U+{ord(c):04X}⟩"


def escape(value: Any, most: int = 200) -> str:
    """A text as HTML, for an element or for a quoted attribute."""
    return html.escape(visible(value, most))


def number(value: Any) -> float | None:
    """A finite number, or None.

    >>> number(1), number(float("nan")), number("1"), number(10**999), number(True)
    (1.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def short(value: float | None) -> str:
    """Four digits; an en dash for None.

    >>> short(0.123456), short(-1e-9), short(12345.6), short(None)
    ('0.1235', '−1e−09', '12346', '–')
    """
    if value is None:
        return "–"
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return text.replace("-", "−")


def script_json(value: Any) -> str:
    """JSON that stands inside <script>: no character of it can end the element.

    >>> script_json({"a": "</script><!--"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text
