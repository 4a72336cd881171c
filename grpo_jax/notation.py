r"""One spelling for answers: Unicode, LaTeX, units, times and bases in plain rules.

In: an answer as a model or a data set writes it. Out: `clean` text without spaces
(prose stays inside `\text{…}`), and small questions about cleaned text that
`answers` asks: where a list splits, what is a name, which unit a quantity has.
"""

import re
import unicodedata

_SYMBOLS = {
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∙": r"\cdot ", "⋅": r"\cdot ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ",
    "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "ω": r"\omega ", "φ": r"\phi ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "−": "-", "–": "-", "—": "-",
    "‐": "-", "ℝ": r"\mathbb{R}", "、": ",", "。": ".", "∶": ":", "′": "'", "’": "'", "⟨": "(",
    "⟩": ")", "¥": r"\text{yuan}", "￥": r"\text{yuan}", "€": r"\text{euro}",
    "£": r"\text{pound}", "∠": r"\angle ", "△": r"\triangle ",
}  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_SCALE = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "百万": 6, "千万": 7, "亿": 8,
}  # fmt: skip
_WORDS = {
    "pi": r"\pi ", "inf": r"\infty ", "infinity": r"\infty ", "oo": r"\infty ",
    "theta": r"\theta ", "alpha": r"\alpha ", "beta": r"\beta ",
    "sqrt": r"\sqrt ", "union": r"\cup ", "cup": r"\cup ", "emptyset": r"\emptyset ",
    **{f: f"\\{f} " for f in (
        "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "lg", "exp", "arcsin",
        "arccos", "arctan", "sinh", "cosh", "tanh")},
}  # fmt: skip
_NUMERALS = {
    word: str(n) for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen "
        "fourteen fifteen sixteen seventeen eighteen nineteen twenty".split())
}  # fmt: skip
_DIGITS = "零一二三四五六七八九十"
_NUMERALS |= {char: str(n) for n, char in enumerate(_DIGITS)} | {"两": "2"}
# One name for each unit; "square" and "cubic" become powers below.
_UNITS = {
    "cm": "cm centimeter centimetre 厘米 公分", "m": "m meter metre 米",
    "mm": "mm millimeter millimetre 毫米", "km": "km kilometer kilometre 千米 公里",
    "dm": "dm decimeter decimetre 分米", "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺", "yd": "yd yard 码", "mi": "mi mile 英里",
    "kg": "kg kilogram 千克 公斤", "g": "g gram 克", "mg": "mg milligram 毫克",
    "t": "t ton tonne 吨", "lb": "lb lbs pound", "oz": "oz ounce",
    "l": "l liter litre 升", "ml": "ml milliliter millilitre 毫升",
    "s": "s sec second 秒 秒钟", "min": "min minute 分 分钟", "h": "h hr hour 小时 时",
    "day": "day 天 日", "week": "week 周 星期", "month": "month 月 个月",
    "year": "year yr 年", "dollar": "dollar usd buck 美元", "cent": "cent ¢ 美分",
    "yuan": "yuan rmb 元 块 块钱 人民币", "euro": "euro eur 欧元",
    "degree": r"degree deg 度 ^\circ", "°C": r"°c ^\circc celsius 摄氏度 degreescelsius",
    "°F": r"°f ^\circf fahrenheit degreesfahrenheit", "%": "% percent pct 百分之",
    "mph": "mph mi/h", "person": "person people 人", "": "unit 单位 approximately "
    "about around answer total approx 约 大约 共 一共",
}  # fmt: skip
_UNIT_NAMES = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_SHORT = {
    n for n in _UNIT_NAMES if n.isascii() and n.isalpha() and 2 <= len(n) <= 3
} - {"in", "deg", "hr", "yr", "oz", "lb", "lbs", "sec"} | {
    "sec", "hr", "yr", "oz", "lb", "lbs", "deg", "yes", "no", "odd", "am", "pm",
    "sq", "hrs", "per", "all", "red", "dogs", "day", "is",
}  # fmt: skip
_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)"
ROW = "\ue000"  # the end of a matrix row while a text is cleaned and read
_CJK = r"\u3040-\u30ff\u3400-\u9fff"


def clean(text: str) -> str:
    r"""The canonical spelling of an answer.

    >>> clean(r" $\dfrac{1}{2}\,\mathrm{cm}$. "), clean("３½ 厘米")
    ('\\frac{1}{2}\\text{cm}', '(3+\\frac{1}{2})\\text{厘米}')
    >>> clean("1,000 dollars"), clean("x≥5"), clean("1.5e3")
    ('1,000\\text{dollars}', 'x\\ge5', '1.5\\times10^{3}')
    """
    text = _unicode(text)
    text = _latex(text)
    text = _prose(text)
    text = _numbers(text)
    return _squeeze(text)


def _unicode(text: str) -> str:
    for char in _VULGAR:
        if char in text:
            top, _, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
            text = text.replace(char, rf"\frac{{{top}}}{{{bottom}}}")
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: f"^{{{m.group().translate(_SUPER)}}}", text
    )
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m.group().translate(_SUB)}}}", text)
    text = re.sub("[①-⑳][①-⑳、,， ]*", _circled, text)
    text = unicodedata.normalize("NFKC", text.replace("º", "°").replace("′", "'"))
    text = re.sub(r"√\s*(\d+|[a-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    return text


def _circled(match: re.Match) -> str:
    # ①②④ is the list of statements 1, 2, 4 and not 124.
    return ",".join(
        str(ord(c) - ord("①") + 1) for c in match.group() if "①" <= c <= "⑳"
    )


def _latex(text: str) -> str:
    text = text.replace(r"\\", ROW if r"\begin" in text else " ")
    text = re.sub(r"^\s*\*\*(.*?)\*\*\s*$", r"\1", text, flags=re.S)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{", "{", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*\.?", "", text)
    text = re.sub(r"\{,\}|,\\!\s*", "\u2063", text)  # a comma inside one number
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|~)+(?=\d{3}(?!\d))", "\u2063", text)
    text = re.sub(r"(?<=\d)\u2063(?=\d{3})", "", text).replace("\u2063", ",")
    text = re.sub(
        r"\\!|\\displaystyle|\\limits|\\nolimits|\\hfill|\\phantom\{\}", "", text
    )
    text = re.sub(
        r"\\(?:q?quad|enspace|thinspace|space)(?![a-zA-Z])|\\[,;:> ]|~", " ", text
    )
    text = text.replace(r"\$", " $ ").replace(r"\%", "%").replace("**", "^")
    text = re.sub(r"\$\s*\$|\\[()\[\]](?!\d*(?:pt|em|ex)\])", " ", text)
    text = re.sub(r"^\s*\$([^$]*)\$\s*[.,]?\s*$", r"\1", text)
    text = re.sub(r"\$\s*(?=[\d.({\\])", r"\\text{dollar}", text).replace("$", " ")
    text = re.sub(r"\\(?:d|t|c)frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\(?:leqslant|leq)(?![a-z])", r"\\le ", text)
    text = re.sub(r"\\(?:geqslant|geq)(?![a-z])", r"\\ge ", text)
    text = re.sub(r"\\lt(?![a-z])", "<", re.sub(r"\\gt(?![a-z])", ">", text))
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = re.sub(r"\\neq(?![a-z])", r"\\ne ", text)
    text = re.sub(
        r"\\l(?:brace|vert)\b", lambda m: {"e": r"\{", "t": "|"}[m.group()[-1]], text
    )
    text = re.sub(
        r"\\r(?:brace|vert)\b", lambda m: {"e": r"\}", "t": "|"}[m.group()[-1]], text
    )
    text = re.sub(r"\\(?:langle|lparen)\b", "(", text)
    text = re.sub(r"\\(?:rangle|rparen)\b", ")", text)
    text = re.sub(r"\\colon(?![a-z])", ":", text)
    text = re.sub(r"\\(?:degree|deg)(?![a-z])", r"^\\circ ", text)
    text = re.sub(r"\\operatorname\*?\{(\w+)\}", r" \1 ", text)
    text = re.sub(r"\{\s*([^{}]*?)\\choose\s*([^{}]*?)\s*\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\d?t?binom(?![a-z])", r"\\binom", text)
    style = r"\\(?:text(?:bf|it|rm|normal|sf|tt|up|sc)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|rm)"
    text = re.sub(style + r"\s*\{\s*([a-zA-Z\d])\s*\}", _single, text)
    text = re.sub(style + r"\s*\{([^{}]*)\}", r"\\text{\1}", text)
    text = re.sub(
        r"\\(?:overline|overrightarrow|overleftrightarrow)\{([A-Z]+)\}", r"\1", text
    )
    text = re.sub(r"\\text\{\s*([-+]?[\d.][^{}]*)\}", r" \1 ", text)
    return re.sub(r"\\text\{([-+.,:/()\[\]<>=\s]*)\}", r" \1 ", text)


def _single(match: re.Match) -> str:
    # A lone letter in \mathbf is a vector, in \mathrm a constant or a unit.
    letter = match.group(1)
    if match.group().startswith(r"\mathbf"):
        return rf"\mathbf{{{letter}}}"
    if match.group().startswith(r"\mathrm") and letter in "ei":
        return letter
    return letter if letter.isdigit() else rf"\text{{{letter}}}"


def _prose(text: str) -> str:
    r"""Words become \text{…}; and / or / 或 between answers become commas."""
    text = re.sub(
        r"(?<=\d)\s*(\\text\{)?\s*([ap])\.?\s?m\b\.?\s*(?(1)\})",
        lambda m: rf"\text{{{m[2].lower()}m}}", text, flags=re.I,
    )  # fmt: skip
    text = re.sub(rf"(?<=[\d}}])\s*(百万|千万|[百千万亿])", _scale, text)
    text = re.sub(
        r"(?<=[\d}])\s*(?:\\text\{)?\s*(hundred|thousand|million|billion|trillion)"
        r"(?![a-z])", _scale, text)  # fmt: skip
    text = re.sub(
        r"^\s*(?:故?选项?|option|choice)\s*:?\s*(?=\(?[A-J]\b)", "", text, flags=re.I
    )
    text = re.sub(r"^\s*\(?([A-J])\)?\s*选项\s*$", r"\1", text)
    text = re.sub(rf"([\d{_DIGITS}]+)分之([\d{_DIGITS}]+)", _fraction, text)
    text = re.sub(r"百分之\s*([\d.]+)", r"\1%", text)
    text = re.sub(
        r"\\text\{[^{}]*?(?:答案|answer)\s*(?:is|是|为|:)+\s*\}", "", text, flags=re.I
    )
    text = re.sub(r"^[^=<>]*?(?:答案|answer)\s*(?:is|是|为|:)+", "", text, flags=re.I)
    text = re.sub(r"\\text\{\s*(and|or|或|和|及|与|以及|或者|且)\s*\}", ",", text)
    text = re.sub(
        r"(?<=[\d}\s)\]])(?:\s*\b(?:and|or)\b|\s*(?:或者?|以及|和|及))\s*", ",", text
    )
    text = re.sub(r"\\text\{([^{}]*)\}", _listed, text)
    text = re.sub(r"(?:,\s*)+", ", ", text) if re.search(r",\s*,", text) else text
    pieces = re.split(
        r"(\\text\{[^{}]*\}|\\(?:begin|end|mathbb|mathbf|vec)\{[^{}]*\}|\\[A-Za-z]+)",
        text,
    )
    pieces[::2] = [_wrap_words(piece) for piece in pieces[::2]]
    text = "".join(pieces)
    while (merged := re.sub(r"(\\text\{[^{}]*)\}\s*\\text\{", r"\1 ", text)) != text:
        text = merged
    text = re.sub(r"(?<=[\d}])\s*\(\s*(\\text\{[^{}]*\})\s*\)\s*$", r"\1", text)
    return re.sub(r"(\\text\{[^{}]*)\}\s*/\s*([a-z]+)(?![a-z}])", r"\1/\2}", text)


def _fraction(match: re.Match) -> str:
    bottom, top = (_NUMERALS.get(part, part) for part in match.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


def _listed(match: re.Match) -> str:
    inner = match.group(1)
    parts = re.split(r"\s*(?:,|\b(?:and|or)\b|或)\s*", inner)
    if len(parts) > 1 and all(len(p.split()) <= 1 for p in parts):
        return ",".join(rf"\text{{{p}}}" if p else "" for p in parts)
    return rf"\text{{{inner}}}"


def _scale(match: re.Match) -> str:
    closing = " \\text{" if "{" in match.group() else " "
    return rf"\times 10^{{{_SCALE[match.group(1)]}}}{closing}"


def _wrap_words(piece: str) -> str:
    def word(match: re.Match) -> str:
        w = match.group()
        low = w.lower()
        if low in _WORDS and (w == low):
            return _WORDS[low]
        known = low.rstrip("s") in _SHORT or low in _SHORT
        return rf"\text{{{w}}}" if len(w) > 3 or known else w

    piece = re.sub(
        r"(?<![A-Za-z\\_])(sqrt|sin|cos|tan|ln|log|pi)(?=[\d(x])", r"\\\1 ", piece
    )
    piece = re.sub(
        r"(?<=[\d}])\s+([msghLlNJWVAKCF])(?=[.,]?\s*$)", r"\\text{\1}", piece
    )
    parts = re.split(r"(\\[A-Za-z]+|\\text\{[^{}]*\})", piece)
    parts[::2] = [re.sub(r"[A-Za-z]{2,}", word, part) for part in parts[::2]]
    piece = "".join(parts)
    piece = re.sub(rf"([{_CJK}]+)", r"\\text{\1}", piece)
    return piece


def _numbers(text: str) -> str:
    text = re.sub(r"([\^_])\s*(\d)\s+(?=\d)", r"\1{\2}", text)  # \int_0^1 2x
    text = re.sub(r"(?<=\d)\s*[eE]([+-]?\d+)(?![\d.])", r"\\times10^{\1}", text)
    text = re.sub(
        r"(?<![\d.,])(\d{1,3})((?:[ ]\d{3})+)(?![\d])",
        lambda m: m.group().replace(" ", ""),
        text,
    )
    frac = r"\\frac\s*(?:(\d)\s*(\d)|\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*\{\s*(\d+)\s*\}|\{\s*(\d+)\s*\}\s*(\d))"
    text = re.sub(r"(?<![\d.^_}\\a-zA-Z])(\d+)\s*" + frac, _mixed, text)
    text = re.sub(
        r"(?<![\d.^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"(\1+\\frac{\2}{\3})", text
    )
    text = re.sub(
        r"(?<![\d.^_/])(\d+)\s*\\text\{又\}\s*(\d+)\s*/\s*(\d+)",
        r"(\1+\\frac{\2}{\3})",
        text,
    )
    return re.sub(r"0?\.(\d*)\\dot\{?(\d+)\}?", r"0.\1\\overline{\2}", text)


def _mixed(match: re.Match) -> str:
    top, bottom = (group for group in match.groups()[1:] if group is not None)
    return rf"({match.group(1)}+\frac{{{top}}}{{{bottom}}})"


def _squeeze(text: str) -> str:
    parts = re.split(r"(\\text\{[^{}]*\})", text)
    parts[::2] = [
        re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1 ", p).strip("\n\t")
        for p in parts[::2]
    ]
    parts[::2] = [re.sub(r"(?<!\\[A-Za-z])\s+(?![A-Za-z])", "", p) for p in parts[::2]]
    # A space stays only between a command and a letter.
    parts[::2] = [
        re.sub(
            r"(\\[A-Za-z]+)?\s+([A-Za-z])?",
            lambda m: (m[1] or "") + (" " if m[1] and m[2] else "") + (m[2] or ""),
            p,
        )
        for p in parts[::2]
    ]
    parts[1::2] = [
        re.sub(r"\s+", " ", p).replace("{ ", "{").replace(" }", "}")
        for p in parts[1::2]
    ]
    text = "".join(p for p in parts if p != r"\text{}")
    text = re.sub(r"\}\s*\\text\{", lambda m: m.group(), text)
    return unwrap(re.sub(r"(?<!\.)[.,;:]+$", "", text))


def unwrap(text: str) -> str:
    """Without one pair of braces that encloses everything."""
    text = text.strip()
    while text[:1] == "{" and closes(text, "{", "}"):
        text = text[1:-1].strip()
    return text


def closes(text: str, opening: str = "", closing: str = "") -> bool:
    """Whether the first bracket's partner is the last character."""
    if opening and not (text.startswith(opening) and text.endswith(closing)):
        return False
    depth, at = 0, 0
    for at, token in _brackets(text):
        depth += 1 if token in ("(", "[", "{", r"\{") else -1
        if depth == 0:
            return at == len(text) - len(token)
    return False


def _brackets(text: str):
    for match in re.finditer(r"\\[{}]|\\.|[(){}\[\]]", text):
        if match.group() in (r"\{", r"\}") or len(match.group()) == 1:
            yield match.start(), match.group()


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that no bracket encloses."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        two = text[at : at + 2]
        if depth <= 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            at += len(separator)
            start = at
            continue
        if two in (r"\{", r"\}"):
            depth += 1 if two == r"\{" else -1
            at += 2
            continue
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        at += 1
    return [*parts, text[start:]]


def join_thousands(text: str) -> str:
    """12,345 outside brackets is one number."""
    found = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
    joined, depth = "", 0
    last = 0
    for match in found.finditer(text):
        before = text[: match.start()]
        depth = sum(before.count(c) for c in "([") - sum(before.count(c) for c in ")]")
        depth += before.count(r"\{") - before.count(r"\}")
        joined += text[last : match.start()]
        joined += match.group().replace(",", "") if depth <= 0 else match.group()
        last = match.end()
    return joined + text[last:]


def matrix(text: str) -> list[list[str]] | None:
    """The entries of one LaTeX matrix that is the whole text."""
    found = re.fullmatch(r"\\begin\{([bBp]?matrix)\}(.*)\\end\{\1\}", text, re.S)
    if not found or r"\begin" in found.group(2):
        return None
    rows = [row for row in found.group(2).split(ROW) if row.strip()]
    return [[cell for cell in row.split("&")] for row in rows]


def relation(text: str) -> tuple[list[str], list[str]] | None:
    """The sides and the signs of an equation or inequality, or None."""
    sides, signs, depth, start, at = [], [], 0, 0, 0
    while at < len(text):
        sign = re.match(r"\\(?:le|ge|ne)(?![a-z])|[<>=]", text[at:])
        if sign and depth <= 0:
            sides.append(text[start:at])
            signs.append(sign.group())
            at += sign.end()
            start = at
            continue
        if text[at] == "\\":
            at += 1
        elif text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        at += 1
    sides.append(text[start:])
    if not signs or not all(side.strip() for side in sides):
        return None
    return [side.strip() for side in sides], signs


def is_name(text: str) -> bool:
    """x, a_{12}, f(2), P(X=1), AB, V_1:V_2, (x,y), \\angle A: something to assign to."""
    text = re.sub(
        r"\\text\{[^{}]*\}|\\(angle|triangle|overline|mathbf|vec)\b", "w", text
    )
    text = re.sub(r"_(\{[^{}]*\}|\w)", "", text)
    text = re.sub(
        r"\\frac\{([A-Za-z]+)\}\{([A-Za-z]+)\}|\b([A-Z]+)/([A-Z]+)\b", "w:w", text
    )
    text = re.sub(r"(?<=[A-Za-z}'])\([^()]*\)", "", text)
    if re.fullmatch(r"\([A-Za-z](,[A-Za-z])+\)", text):
        return True
    if text in ("i", "e", r"\pi", r"\infty"):
        return False
    return bool(
        re.fullmatch(r"(\\[a-zA-Z]+|[A-Za-z\s{}:']|\\circ)+", text)
    ) and not re.search(
        r"\\(frac|sqrt|infty|pi|sin|cos|tan|log|ln|cdot|times|sum|pm)", text
    )


def has_unknown(text: str) -> bool:
    """Whether a name other than e and i appears."""
    text = re.sub(
        r"\\(pi|infty|sqrt|frac|cdot|times|div|ln|log|sin|cos|tan)(?![a-z])", "", text
    )
    return bool(re.search(r"[A-Za-df-hj-z\\]", re.sub(r"\\text\{[^{}]*\}", "", text)))


def plain(text: str) -> str:
    """Letters for comparing words: no wrappers, spaces or case; 条件 may be missing."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if re.search(rf"[A-Za-z{_CJK}]$", text.strip(" .,;:!?")):
        text = re.sub(r"[\s.,;:!?'\"]+$|^the\s+|(?<=.)条件[.]?$", "", text.strip())
    word = re.sub(r"(?<!\\)\{(\w)\}", r"\1", re.sub(r"\s+", "", text))
    word = _NUMERALS.get(word.lower(), word)
    lone = re.fullmatch(r"\(?([A-Ja-j])\)?", word)
    if lone:
        return lone.group(1).lower()
    return word.lower() if re.fullmatch(rf"[A-Za-z{_CJK}\s]{{2,}}", word) else word


def leaf_kind(text: str) -> str:
    """text | time | base | ratio | number, by spelling."""
    bare = re.sub(r"\\text\{[^{}]*\}", "", text)
    if not re.search(r"[\dA-Za-z]", bare) and r"\text" in text:
        return "text"
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?(\\text\{[ap]\.?m\.?\})?", text.lower()):
        minutes = int(re.split(r"\D", text)[1])
        return "time" if minutes < 60 else "ratio"
    if re.fullmatch(r"-?[\dA-Z.]+_(\{.*\}|\d)", text) and re.search(
        r"\d", text.partition("_")[0]
    ):
        return "base"
    return "ratio" if ":" in bare else "number"


def same_time(a: str, b: str) -> bool:
    """4:30 pm; a missing am or pm is a missing unit."""
    both = []
    for text in (a, b):
        found = re.fullmatch(
            r"(\d+:\d+(?::\d+)?)(?:\\text\{([ap])\.?m\.?\})?", text.lower()
        )
        if not found:
            return False
        both.append((found.group(1).lstrip("0"), found.group(2)))
    (t, half_t), (u, half_u) = both
    return t == u and (half_t == half_u or not (half_t and half_u))


def same_base(a: str, b: str) -> bool:
    """1011_2; a missing base is a missing unit."""
    digits, bases = [], []
    for text in (a, b):
        digit, _, base = text.partition("_")
        base = re.sub(r"\\text|[{}\s]", "", base).lower()
        digits.append(digit)
        bases.append(_NUMERALS.get(base, base))
    return digits[0] == digits[1] and (bases[0] == bases[1] or not all(bases))


def quantity(text: str) -> tuple[str, str]:
    r"""The expression and its unit's one name ("" if it has none).

    >>> quantity(r"15\text{centimeters}^2"), quantity(r"20%"), quantity(r"60^\circ")
    (('15', 'cm^2'), ('20', '%'), ('60', 'degree'))
    """
    rest = text
    units = []
    if lead := re.match(r"(-?)((?:\\text\{[^{}]*\})+)(?=[-\d.(\\])", rest):
        units += re.findall(r"\{([^{}]*)\}", lead.group())
        rest = lead.group(1) + rest[lead.end() :]
    tail = re.search(
        r"((?:%|\^\\circ|\^\{\\circ\}|(?<=[\d})])/?\\text\{[^{}]*\}(?:\^\{?[23]\}?)?"
        r"|/?\\text\{[^{}]*\}(?:\^\{?[23]\}?)?)+)[A-Z]?$", rest
    )  # fmt: skip
    trigonometric = tail and "circ" in tail.group() and re.search(_TRIG, rest)
    if tail and tail.start() > 0 and not trigonometric:
        unit = tail.group()
        rest = rest[: tail.start()]
        units.append(re.sub(r"\\text\{([^{}]*)\}", r"\1 ", unit))
    if word := re.fullmatch(r"\\text\{(.*)\}", rest):
        rest = _NUMERALS.get(word.group(1).lower(), rest)
    names = [name for name in map(_unit, units) if name]
    return rest, "%" if "%" in names else "*".join(names)


def _unit(words: str) -> str:
    words = words.lower().replace("{", "").replace("}", "").strip(" .")
    power = ""
    if found := re.search(r"\^?([23])$", words):
        power, words = found.group(1), words[: found.start()].strip()
    for pattern, n in (
        (r"^(square|sq\.?|平方)\s*|\s*squared$", "2"),
        (r"^(cubic|cu\.?|立方)\s*|\s*cubed$", "3"),
    ):
        if re.search(pattern, words):
            power, words = n, re.sub(pattern, "", words).strip()
    words = re.sub(r"\s+per\s+|\s*/\s*|每", "/", words)
    names = []
    for word in words.split("/"):
        word = re.sub(r"^(of|the|a|an)\s+", "", word.strip())
        compact = re.sub(r"[\s.]+", "", word)
        single = compact[:-1] if compact.endswith("s") and len(compact) > 2 else compact
        names.append(_UNIT_NAMES.get(compact, _UNIT_NAMES.get(single, single)))
    unit = "/".join(names)
    unit = _UNIT_NAMES.get(unit, unit)
    return unit + (f"^{power}" if power and unit else "")
