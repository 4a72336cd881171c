r"""Brings answers into one spelling.

`normalize_notation` converts an answer, as a model or a dataset writes it, to LaTeX
without spaces; prose stays inside `\text{…}`. The other functions classify and compare
cleaned text that is a word, a time, a ratio or a number in a base. The rules of
`normalize_notation` are regular expressions, applied in order, each to the whole text.
"""

import functools
import re
import unicodedata

from grpo_jax.data.brackets import strip_braces
from grpo_jax.rewards.grading.units import TEXT, UNIT_NAMES
from grpo_jax.rewards.grading.wording import NUMERALS, compile_rules, words_to_operators

_CJK = r"\u3040-\u30ff\u3400-\u9fff"
_DIGITS = "零一二三四五六七八九十"
END = "(?![A-Za-z])"  # the end of a LaTeX command
ROW = "\ue000"  # the end of a matrix row; LaTeX writes \\
APART = "\ue001"  # follows a comma that does not group thousands: 3, 141
OR = r"\lor"  # separates alternative answers or inequalities

_SYMBOLS = str.maketrans({
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "∙": r"\cdot ", "⋅": r"\cdot ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ",
    "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "ω": r"\omega ", "φ": r"\phi ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "−": "-", "–": "-", "—": "-",
    "‐": "-", "ℝ": r"\mathbb{R}", "、": ", ", "。": ".", "∶": ":", "′": "'", "’": "'",
    "⟨": "(", "⟩": ")", "¥": r"\text{yuan}", "€": r"\text{euro}", "∠": r"\angle ",
    "£": r"\text{pound}", "△": r"\triangle ",
})  # fmt: skip
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SCALE = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "百万": 6, "千万": 7, "亿": 8,
}  # fmt: skip
_WORDS = {
    "pi": r"\pi ", "inf": r"\infty ", "infinity": r"\infty ", "oo": r"\infty ",
    "theta": r"\theta ", "alpha": r"\alpha ", "beta": r"\beta ", "cup": r"\cup ",
    "union": r"\cup ", "emptyset": r"\emptyset ",
    **{f: f"\\{f} " for f in (
        "sqrt sin cos tan cot sec csc ln log lg exp arcsin arccos arctan sinh cosh tanh"
    ).split()},
}  # fmt: skip
# Short words that are prose. Other runs of up to three letters are products: abc.
_SHORT = {
    name for name in UNIT_NAMES if re.fullmatch("[a-z]{2,3}", name) and name != "in"
} | set("yes no odd am pm sq per all hrs".split())


def _circled(match: re.Match) -> str:  # ①②④ are statements 1, 2, 4 and not 124
    found = re.findall("[①-⑳]", match.group())
    return ",".join(str(ord(char) - ord("①") + 1) for char in found)


def _vulgar(match: re.Match) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _styled(match: re.Match) -> str:
    style, letter = match.groups()
    if style == "mathbf":  # \mathbf marks a vector; e and i in \mathrm are constants
        return rf"\mathbf{{{letter}}}"
    constant = letter.isdigit() or (style == "mathrm" and letter in "ei")
    return letter if constant else rf"\text{{{letter}}}"


def _root(match: re.Match) -> str:
    degree = {"√": "", "∛": "[3]", "∜": "[4]"}[match[1]]
    return rf"\sqrt{degree}{{{match[2]}}}" if match[2] else rf"\sqrt{degree}"


def _matrix(match: re.Match) -> str:
    """Writes a matrix of any LaTeX environment as pmatrix, or vmatrix for bars."""
    before, name, body, after = match.groups()
    bars = before == after == "|" or "v" in name.lower()
    if name == "cases" or before == r"\{" or (not bars and "=" in body):
        rows = [row.strip(" ,;") for row in body.replace("&=", "=").split(ROW)]
        return ", ".join(filter(None, rows)) if "&" not in "".join(rows) else match[0]
    name = "vmatrix" if bars else "pmatrix"
    return rf"\begin{{{name}}}{body}\end{{{name}}}"


def _goes_on(match: re.Match) -> str:
    r"""Writes 0.1666… as 0.1\overline{6}; 1.41421… keeps its dots."""
    whole, digits, repeating = match.groups()
    for period in (1, 2, 3):
        for start in range(len(digits) - 2 * period + 1):
            tail = digits[start:]
            if (tail[:period] * len(tail)).startswith(tail):
                return rf"{whole}.{digits[:start]}\overline{{{tail[:period]}}}"
    if repeating:
        return rf"{whole}.\overline{{{digits}}}"
    return rf"{whole}.{digits}\ldots "


def _scale(match: re.Match) -> str:
    return rf"\times 10^{{{_SCALE[match[2]]}}} {match[1] or ''}"


def _ratio(match: re.Match) -> str:  # 五分之二 is two fifths
    bottom, top = (NUMERALS.get(part, part) for part in match.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


def _listed(match: re.Match) -> str:
    parts = re.split(r"\s*(?:,|\b(?:and|or)\b|或)\s*", match[1])
    if len(parts) > 1 and all(len(part.split()) <= 1 for part in parts):
        return ",".join(rf"\text{{{part}}}" if part else "" for part in parts)
    return match.group()


def _word(match: re.Match) -> str:
    word = match[1]
    if word is None:  # a command or prose already
        return match.group()
    if word in _WORDS:
        return _WORDS[word]
    low = word.lower()
    prose = len(word) > 3 or low in _SHORT or low.rstrip("s") in _SHORT
    return rf"\text{{{word}}}" if prose else word


def _merged(match: re.Match) -> str:
    return re.sub(r"\} ?\\text\{", " ", match.group())


_STYLE = r"(text(?:bf|it|rm|normal|sf|tt|up|sc)?|mathrm|mathbf|mathit|mathsf|mbox|hbox)"
_CR = r"\\cr(?![A-Za-z])"
_CHOOSE_C, _CHOOSE_A = (
    rf"(?<![A-Za-z\\}}])(?:{x}|\\(?:mathrm|text|rm) ?\{{{x}\}}) ?" for x in "CA"
)  # C_5^2 and A_5^2, as Chinese textbooks write combinations and permutations
_ONE = r"(?:(\d)|\{ ?(\d+) ?\})"
_RULES = compile_rules(
    # Unicode to LaTeX, where NFKC would lose the meaning
    ("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]", _vulgar),
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: f"^{{{m.group().translate(_SUPER)}}}"),
    ("[₀-₉]+", lambda m: f"_{{{m.group().translate(_SUB)}}}"),
    ("[①-⑳][①-⑳、,， ]*", _circled),
    (r"([√∛∜]) ?(\d+|[a-z]|(?=\())", _root),
), compile_rules(
    # wrappers
    (r"^(\*\*|`)([^*`]*)\1$", r"\2"),
    (r"^ ?(?:\\(?:approx|sim|simeq)(?![A-Za-z])|≈|~)", ""),
    (r"\\f?box(?:ed)? ?\{", "{"),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z]) ?\.?", ""),
    # matrices and systems of equations
    (rf"{ROW} ?\[-?[\d.]+ ?(?:pt|em|ex|mm|cm)\]", ROW),
    (r"\\([pbv]?matrix) ?\{((?:[^{}]|\{[^{}]*\})*)\}",
     lambda m: rf"\begin{{{m[1]}}}{re.sub(_CR, ROW, m[2])}\end{{{m[1]}}}"),
    (r"\\begin\{(\w*matrix)\*?\} ?\[[^\[\]]*\]", r"\\begin{\1}"),
    (r"(\\begin\{array\}) ?(?:\[[tbc]\])? ?\{[^{}]*\}", r"\1"),
    (r"(\\\{|[(\[|]?) ?\\begin\{(array|\w*matrix|cases|aligned|gathered)\*?\}"
     r"(.*?)\\end\{\2\*?\} ?([)\]|]?)", _matrix),
    # spaces, and commas inside one number
    (r"(?<=\d)(?:\{,\}|,\\! ?|(?:\\[,!;: ]|~)+)(?=\d{3}(?!\d))", ""),
    (r"\{,\}", ","),
    (r"\\(?:!|displaystyle" + END + "|limits" + END + r"|phantom\{\})", ""),
    (r"\\(?:(?:q?quad|enspace|thinspace|space)" + END + "|[,;:> ])|~", " "),
    # mathematics mode and money
    (r"\\\$", " $ "),
    (r"\\%", "%"),
    (r"\*\*", "^"),
    (r"\$ ?\$|\\[()\[\]]", " "),
    (r"^ ?\$([^$]*)\$ ?[.,]? ?$", r"\1"),
    (r"\$ ?(?=[\d.({\\])", r"\\text{dollar}"),
    (r"\$", " "),
    # one command for each meaning
    (r"\\[dtc]frac" + END, r"\\frac"),
    (r"(\\(?:frac|binom)) ?(\d) (?=\d)", r"\1{\2}"),
    (r"\\(mathbb|mathbf) ?([A-Z])" + END, r"\\\1{\2}"),
    (r"\\(?:lor|vee)" + END, r" \\lor "),
    (r"\\(?:land|wedge)" + END, ", "),
    (r"(?<=[)\]}]) ?U ?(?=[(\[]|\\\{)", r"\\cup "),
    (r"\\leq(?:slant)?" + END + "|<=", r"\\le "),
    (r"\\geq(?:slant)?" + END + "|>=", r"\\ge "),
    (r"\\neq" + END + "|!=", r"\\ne "),
    (r"\\lt" + END, "<"),
    (r"\\gt" + END, ">"),
    (r"\\lbrace" + END, r"\\{"),
    (r"\\rbrace" + END, r"\\}"),
    (r"\\[lr]vert" + END, "|"),
    (r"\\(?:langle|lparen)" + END, "("),
    (r"\\(?:rangle|rparen)" + END, ")"),
    (r"\\colon" + END, ":"),
    (r"\\deg(?:ree)?" + END, r"^\\circ "),
    (r"\\operatorname\*?\{(\w+)\}", r" \1 "),
    (r"\{([^{}\\]*)\\choose([^{}\\]*)\}", r"\\binom{\1}{\2}"),
    (r"\\[dt]binom" + END, r"\\binom"),
    (rf"{_CHOOSE_C}_{_ONE}\^{_ONE}", r"\\binom{\1\2}{\3\4}"),
    (rf"{_CHOOSE_A}_{_ONE}\^{_ONE}", r"\\frac{\1\2!}{(\1\2-\3\4)!}"),
    (r"\\" + _STYLE + r" ?\{ ?([A-Za-z\d]) ?\}", _styled),
    (r"\\" + _STYLE + r" ?\{([^{}]*)\}", r"\\text{\2}"),
    (r"\\(?:over(?:line|(?:left)?rightarrow)|vec)\{([A-Z]+)\}", r"\1"),
    (r"\\text\{ ?([-+]?[\d.][^{}]*|[-+.,:/()\[\]<>= ]*)\}", r" \1 "),
    # prose: times, large numbers, options, what introduces an answer
    (r"(?i)(?<=\d) ?(\\text\{)? ?([ap])\.? ?m\b\.? ?(?(1)\})",
     lambda m: rf"\text{{{m[2].lower()}m}}"),
    (r"(?<=[\d}]) ?(\\text\{)? ?(百万|千万|[百万亿]|千(?![克米瓦卡])|"
     rf"(?:hundred|thousand|million|billion|trillion){END})", _scale),
    (r"(?i)^ ?(?:故?选项?|option|choice) ?:? ?(?=\(?[A-J]\b)", ""),
    (r"^ ?\(?([A-J])\)? ?选项 ?$", r"\1"),
    (r"百分之 ?([\d.]+)", r"\1%"),
    (rf"([\d{_DIGITS}]{{1,9}})分之([\d{_DIGITS}]{{1,9}})", _ratio),
    (r"(?i)\\text\{[^{}]*(?:答案|answer) ?(?:is|是|为|:)+ ?([^{}]*)\}", r" \1 "),
    (r"(?i)^[^=<>]{,200}?(?:答案|answer) ?(?:is|是|为|:)+", ""),
), compile_rules(
    # and, or, 或 between answers
    (r",? ?\\text\{ ?(?:or|或者?) ?\}|,? ?(?<=[\d} )\],]) ?(?:\bor\b|或者?) ?",
     r"\\lor "),
    (r"\\text\{ ?(?:and|和|及|与|以及|且|并且) ?\}", ","),
    (r"(?<=[\d} )\]]) ?(?:\band\b|以及|和|及|并?且) ?", ","),
    (r"\\text\{([^{}]*)\}", _listed),
    (", ?(?:, ?)+", ", "),
    (r", ?(?=\\lor )", ""),
    (r"(?<=\d) ?, (?=\d{3}(?!\d))", "," + APART),
    (r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])", ""),
    # words become prose; prose becomes one piece
    (r"(?<![A-Za-z\\_])sqrt ?(\d+)", r"\\sqrt{\1}"),
    (r"(?<![A-Za-z\\_])(sqrt|sin|cos|tan|ln|log|pi)(?=[\d(x])", r"\\\1 "),
    (r"(?<=[\d}]) (in|[msghLlNJWVAKCF])(?=[.,]? ?$)", r"\\text{\1}"),
    (TEXT + r"|\\(?:begin|end|mathbb|mathbf|vec)\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z]{2,})",
     _word),
    (rf"{TEXT}|([{_CJK}]+)", lambda m: rf"\text{{{m[1]}}}" if m[1] else m.group()),
    (rf"{TEXT}(?: ?{TEXT})+", _merged),
    (rf"(?<=[\d}}]) ?\( ?({TEXT}) ?\) ?$", r"\1"),
    (r"(\\text\{[^{}]*)\} ?/ ?([a-z]+)(?![a-z}])", r"\1/\2}"),
    # numbers
    (r"([\^_]) ?(\d) (?=\d)", r"\1{\2}"),  # \int_0^1 2x
    (r"(?<=\d) ?[eE]([+-]?\d+)(?![\d.])", r"\\times10^{\1}"),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda m: m.group().replace(" ", "")),
    (rf"(?<![\d.^_}}\\A-Za-z])(\d+) ?\\frac ?{_ONE} ?{_ONE}",
     r"(\1+\\frac{\2\3}{\4\5})"),
    (r"(?<![\d.^_/])(\d+)(?: |\\text\{又\} ?)(\d+) ?/ ?(\d+)(?!\d)",
     r"(\1+\\frac{\2}{\3})"),
    (r"(?<=\d) (?=\d)", ","),  # 3 4 is two numbers
    # decimals that repeat
    (r"(?<!\d)(?=\.\d*\\(?:dot|bar|overline))", "0"),
    (r"\.(\d*)\\dot ?\{? ?(\d+) ?\}?(?:(\d*)\\dot ?\{? ?(\d) ?\}?)?",
     lambda m: rf".{m[1]}\overline{{{m[2]}{m[3] or ''}{m[4] or ''}}}"),
    (r"(\.\d*)\\(?:bar|overline) ?\{? ?(\d+) ?\}?", r"\1\\overline{\2}"),
    (r"(\d\.)\((\d+)\)$", r"\1\\overline{\2}"),
    (r"(\d*)\.(\d+) ?(?:\\(?:l|c)?dots[bcm]?" + END + r"|\.{2,}|⋯"
     r"|\\text\{ ?\(?(repeating|recurring|循环)[^{}]*\})", _goes_on),
    # a space stays in prose, and between a command and a letter
    (rf"({TEXT})|(\\[A-Za-z]+)? ([A-Za-z])?", lambda m: m[1] or (
        (m[2] or "") + (" " if m[2] and m[3] else "") + (m[3] or ""))),
    (r"\\text\{ ?([^{}]*?) ?\}", lambda m: rf"\text{{{m[1]}}}" if m[1] else ""),
    (r"[.,;:]+$", ""),
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def normalize_notation(text: str) -> str:
    r"""Returns the canonical spelling of an answer.

    >>> (normalize_notation(r" $\dfrac{1}{2}\,\mathrm{cm}$. "),
    ...  normalize_notation("３½ 厘米"))
    ('\\frac{1}{2}\\text{cm}', '(3+\\frac{1}{2})\\text{厘米}')
    >>> (normalize_notation("1,000 dollars"),
    ...  normalize_notation("x≥5"),
    ...  normalize_notation("1.5e3"))
    ('1,000\\text{dollars}', 'x\\ge5', '1.5\\times10^{3}')
    """
    unicode, then, last = _RULES
    if not text.isascii():
        text = _apply(unicode, text)
        text = text.translate(str.maketrans({"º": "°", "′": "'", "，": ", "}))
        text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    text = text.replace(r"\\", ROW if "matrix" in text or r"\begin" in text else " ")
    text = re.sub(r"\s+", " ", text).strip()  # the rules expect single spaces
    text = _apply(last, words_to_operators(_apply(then, text)))
    return strip_braces(text)


def _apply(rules: list, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
        while "  " in text:
            text = text.replace("  ", " ")
    return text


def normalize_words(text: str) -> str:
    """Returns cleaned text in a form for comparing words.

    Wrappers, spaces, case, final punctuation and a final 条件 are removed.
    """
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if re.search(rf"[A-Za-z{_CJK}]$", text.strip(" .,;:!?")):
        text = re.sub(r"[\s.,;:!?'\"]+$|^the\s+|(?<=.)条件[.]?$", "", text.strip())
    word = re.sub(r"(?<!\\)\{(\w)\}", r"\1", re.sub(r"\s+", "", text))
    word = NUMERALS.get(word.lower(), word)
    if lone := re.fullmatch(r"\(?([A-Ja-j])\)?", word):
        return lone[1].lower()
    return word.lower() if re.fullmatch(rf"[A-Za-z{_CJK}\s]{{2,}}", word) else word


def leaf_kind(text: str) -> str:
    """Returns the kind of a leaf by its spelling: text, time, base, ratio or number."""
    bare = re.sub(TEXT, "", text)
    if not re.search(r"[\dA-Za-z]", bare) and r"\text" in text:
        return "text"
    if re.fullmatch(r"\d{1,2}:[0-5]\d(:\d{2})?(\\text\{[ap]\.?m\.?\})?", text.lower()):
        return "time"
    if re.fullmatch(r"-?[A-Z.]*\d[\dA-Z.]*_(\{.*\}|\d)", text):
        return "base"
    return "ratio" if ":" in bare else "number"


def same_time(a: str, b: str) -> bool:
    """Returns whether two times are equal; am or pm may be missing in one of them."""
    pattern = re.compile(r"0*(\d*:\d+(?::\d+)?)(?:\\text\{([ap])\.?m\.?\})?")
    found, other = (pattern.fullmatch(text.lower()) for text in (a, b))
    if not found or not other or found[1] != other[1]:
        return False
    return found[2] == other[2] or not (found[2] and other[2])


def same_base(a: str, b: str) -> bool:
    """Returns whether two numbers such as 1011_2 are equal; one base may be missing."""
    (digits, _, base), (others, _, other) = (text.partition("_") for text in (a, b))
    bases = [re.sub(r"\\text|[{}\s]", "", name).lower() for name in (base, other)]
    base, other = (NUMERALS.get(name, name) for name in bases)
    return digits == others and (base == other or not (base and other))
