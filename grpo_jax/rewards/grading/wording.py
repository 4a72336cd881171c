r"""Converts English and Chinese words for signs and operations to mathematics.

`words_to_operators` turns `negative 7` into -7, `at least 7` into x\ge 7, and `7
squared` into 7^2. Words that match no rule stay prose. `changes_value` finds prose that
is not a unit but changes the answer's value.
"""

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ENGLISH = {word: n for n, word in enumerate(_ONES)}
_ENGLISH |= {word: 20 + 10 * n for n, word in enumerate(_TENS)}
_CHINESE = {char: n for n, char in enumerate("零一二三四五六七八九")} | {
    "两": 2,
    "〇": 0,
}
NUMERALS = {word: str(n) for word, n in (_ENGLISH | _CHINESE | {"十": 10}).items()}
_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10_000}
_SPELLED = (
    rf"(?:{'|'.join(_TENS)})[- ](?:{'|'.join(_ONES[1:10])})\b"
    rf"|(?:{'|'.join(reversed(_ONES))}|{'|'.join(_TENS)})\b"
    rf"|[{''.join(_CHINESE)}十百千万]+"
)
# Chinese measure words and units at the end of an answer: 两个, 三十元.
_COUNTED = (
    "(?:[个只条张本支件名位次倍岁人元块米克吨升天年页棵头辆台袋箱盒瓶组种根把颗粒间层度"
    "月周秒]|厘米|千米|公里|千克|公斤|小时|分钟)$"
)
_PARTS = {
    name: n for n, name in enumerate(
        "half third fourth fifth sixth seventh eighth ninth tenth".split(), 2)
} | {"hundredth": 100, "thousandth": 1000}  # fmt: skip

_NUMBER = r"[\d.,]*\d"
_BASE = rf"(?:{_NUMBER}|\\sqrt ?(?:\{{[^{{}}]*\}}|\d)|\([^()]*\)|^ ?[a-z](?![A-Za-z]))"
_TERM = rf"(?:{_BASE}|(?<![A-Za-z\\])[a-z](?![A-Za-z]))"
_AFTER, _BEFORE = r"(?<=[\d)}]) ?", r" ?(?=[\d(\\])(?!\\text)"
# What may follow an operator in words: a number, a formula or one letter.
_N = (
    r"(?!a [A-Za-z])(?= ?[-+]? ?(?:\.?\d|[(|$∞]"
    r"|\\(?!text|lor|cup|cap|le|ge|ne|in\b|mid)"
    r"|[A-Za-z](?![A-Za-z])|infinity))"
)
_OPERATORS = {
    r"\ge ": r"(?:greater|more|larger|bigger|higher) than or equal(?: to)?|at least"
    r"|(?:no|not) (?:less|fewer|smaller|lower) than|(?:a )?minimum of"
    r"|大于或?等于|不小于|不少于|不低于|至少|最少|起码",
    r"\le ": r"(?:less|fewer|smaller|lower) than or equal(?: to)?|at most|up to"
    r"|(?:no|not) (?:more|greater|larger|higher) than|(?:a )?maximum of"
    r"|(?:not|does not|doesn't) exceed(?:ing)?"
    r"|小于或?等于|不大于|不多于|不超过|不高于|至多|最多",
    ">": r"(?:strictly )?(?:greater|more|larger|bigger|higher) than|above|over|exceed"
    r"(?:s|ing)?|大于|多于|高于|超过",
    "<": r"(?:strictly )?(?:less|fewer|smaller|lower) than|below|under|小于|少于|低于"
    r"|不足|不到|未满",
    r"\ne ": r"not(?: equal(?: to)?)?|unequal to|不等于|不是|不为|≠",
}
_MORE = r"more|greater|above|higher|larger|bigger|over|up|upwards?|longer|later"
_LESS = r"less|fewer|below|lower|smaller|under|down|shorter|earlier"
_FOLDS = {"twice": "2", "double": "2", "triple": "3", "thrice": "3"}


def compile_rules(*rules, flags: int = 0):
    """Returns (pattern, replacement) pairs with compiled patterns."""
    return [(re.compile(pattern, flags), replacement) for pattern, replacement in rules]


def _spelled(word: str) -> str:
    """Returns a number in words as digits.

    >>> _spelled("twenty-five"), _spelled("二百零五"), _spelled("十二")
    ('25', '205', '12')
    """
    if word[0] in _CHINESE or word[0] in _POWERS:
        total = section = digit = 0
        for char in word:
            if char in _CHINESE:
                digit = digit * 10 + _CHINESE[char] if digit else _CHINESE[char]
            elif char == "万":
                total, section, digit = ((total + section + digit) or 1) * 10_000, 0, 0
            else:
                section, digit = section + (digit or 1) * _POWERS[char], 0
        return str(total + section + digit)
    return str(sum(_ENGLISH[part] for part in re.split("[- ]", word.lower())))


def _part(match: re.Match[str]) -> str:
    name = match[2].lower()
    name = "half" if name == "halves" else name.rstrip("s")
    return rf"\frac{{{match[1]}}}{{{_PARTS[name]}}}"


def _digits(word: str) -> str:
    return word if word.isdigit() else _spelled(word)


def _power(match: re.Match[str]) -> str:
    base, *degrees = match.groups()
    degree = next(filter(None, degrees))
    return f"{base}^{{{degree if degree.isascii() else _spelled(degree)}}}"


_RULES = compile_rules(
    # signs
    (rf"({_NUMBER})([^\d<>=]{{,30}}?)\bbelow zero\b", r"-\1\2"),
    (r"(?:plus ?(?:or|/) ?minus|(?:positive|plus) (?:or|and) (?:negative|minus)"
         rf"|正负|^ ?\+ ?/? ?-){_N}", r"\\pm "),
    (rf"(?<![A-Za-z\\])(?:negative|minus|负|零下) ?({_SPELLED})",
         lambda m: f"-{_spelled(m[1])}"),
    (rf"^ ?({'|'.join(_ONES[1:10])})[- ]hundred(?:(?: and|-)? ({_SPELLED}))? ?$",
         lambda m: str(100 * _ENGLISH[m[1].lower()] + int(_spelled(m[2] or "zero")))),
    (rf"^ ?({_SPELLED})(?= ?$|{_COUNTED})", lambda m: _spelled(m[1])),
    (rf"百分之([{''.join(_CHINESE)}十百]+)", lambda m: f"{_spelled(m[1])}%"),
    (r"^ ?(\d+)(个|天|年|小时)?半", r"\1.5\2"),
    (r"^(?:.{0,12}(?:方程|不等式))?(?:no (?:real )?solutions?(?: exists?)?"
         r"|(?:the )?empty set|无(?:实数?)?解|无实根|空集)$", r"\\emptyset "),
    (r"(?:负|negative |minus )(?:无穷大?|infinity)", r"-\\infty "),
    (r"(?:正|positive )?(?:无穷大?|infinity)", r"\\infty "),
    (r"(?<![A-Za-z\\])(?:negative |minus )(?=negative |minus )", "-"),
    (rf"(?<![A-Za-z\\])(?:negative|minus) ?{_N}|(?:负|零下) ?{_N}", "-"),
    (rf"(?<![A-Za-z\\])positive {_N}|^ ?正(?=[\d.\\])", ""),
    (rf"(?<=[\d)}}]) ?\bplus {_N}", "+"),
    (rf"^ ?({_NUMBER}) ?\( ?negative ?\) ?$", r"-\1"),
    (rf"({_NUMBER}) and (?:a|one) half\b", r"(\1+1/2)"),
    # powers, roots and other operations
    (rf"(?:the )?(?:(?:positive|principal) )?square root of ({_TERM})"
         rf"|根号 ?({_TERM})|({_TERM})的算术平方根",
         lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}"),
    (rf"(?:the )?(?:cube|cubic|third) root of ({_TERM})|三次根号({_TERM})"
         rf"|({_TERM})的立方根", lambda m: rf"\sqrt[3]{{{m[1] or m[2] or m[3]}}}"),
    (rf"({_BASE}) ?(?:squared(?! ?[A-Za-z\\])|的平方(?![根米厘分千公]))",
         r"\1^{2}"),
    (rf"({_BASE}) ?(?:cubed(?! ?[A-Za-z\\])|的立方(?![根米厘分]))", r"\1^{3}"),
    (rf"({_BASE}) ?(?:(?:raised )?to the (?:power(?: of)? ?({_NUMBER}|[a-z])"
         r"|(\d+)(?:st|nd|rd|th)(?: power)?)|的(\d+|[二三四五六七八九十])次方)",
         _power),
    (rf"({_BASE}) ?to the (third|fourth|fifth|sixth|seventh|eighth|ninth|tenth)"
         r"(?: power)?\b", lambda m: rf"{m[1]}^{{{_PARTS[m[2].lower()]}}}"),
    (rf"(?:the )?square of ({_TERM})", r"(\1)^{2}"),
    (rf"(?:the )?cube of ({_TERM})", r"(\1)^{3}"),
    (r"(\d+) choose (\d+)", r"\\binom{\1}{\2}"),
    (rf"({_TERM}) ?(?:factorial\b|的阶乘)", r"\1!"),
    (rf"(?:the )?reciprocal of ({_TERM})|({_TERM})的倒数", r"1/(\1\2)"),
    (rf"(?:the )?(?:opposite|negation) of ({_TERM})|({_TERM})的相反数", r"-(\1\2)"),
    (rf"(?:one )?half (?:of )?({_TERM})|({_TERM})的一半", r"(\1\2)/2"),
    (rf"\b({'|'.join(_FOLDS)}) ({_TERM})",
         lambda m: rf"{_FOLDS[m[1].lower()]}\times {m[2]}"),
    (rf"({_TERM})的(\d+|[一二两三四五六七八九十])倍",
         lambda m: rf"{m[1]}\times {_digits(m[2])}"),
    (r"(?<![\d.])(\d+)[- ](halves|(?:third|fourth|fifth|sixth|seventh|eighth|ninth"
         r"|tenth|hundredth|thousandth)s?)\b", _part),
    (rf"{_AFTER}(?:times|multiplied by|乘以?){_BEFORE}", r"\\times "),
    (rf"{_AFTER}(?:divided by|over|除以){_BEFORE}", "/"),
    (r"(?<=\d) ?‰", r"\\times10^{-3}"),
    # comparisons
    (rf"^ ?([a-z]?) ?(?:的值)? ?(?:约?等于|(?<=的值)[是为]) ?{_N}",
         lambda m: f"{m[1]}=" if m[1] else ""),
    (r"\bbetween (.{1,40}?) and (.{1,40})$", r"\1<x<\2"),
    (rf"(?:在|介于)? ?(-?{_NUMBER}) ?(?:和|与|到|至|~) ?(-?{_NUMBER}) ?之间",
         r"\1<x<\2"),
    (rf"^ ?(?:从|from )?(-?{_NUMBER}) ?(?:到|至|~) ?(-?{_NUMBER})(?!.*[\d:])",
         r"\1\\le x\\le \2"),
    (r"^ ?(\d+) to (\d+) ?$", r"\1:\2"),
    (rf"^ ?(.{{1,60}}?) ?(?:\b(?:or|and) (?:{_MORE})\b.*|[及或]?以上.*)$",
         r"x\\ge \1"),
    (rf"^ ?(.{{1,60}}?) ?(?:\b(?:or|and) (?:{_LESS})\b.*|[及或]?以[下内].*)$",
         r"x\\le \1"),
    (rf"^ ?({_NUMBER}) ?\+$", r"x\\ge \1"),
    (r"^ ?(?:the set of )?all (?:real numbers|reals)(?: x)?,? (?:except|other than|"
         r"excluding|but)(?: for| not)? ?(.+)$", r"x\\ne \1"),
    (r"^ ?除了?(.+?)以?外的?(?:所有|全体|一切|任意)?(?:的)?实数$", r"x\\ne \1"),
    *(
        (rf"(?<![A-Za-z\\])(?:(?:is|are|be|must be) )?(?:{words}) ?{_N}",
             operator.replace("\\", r"\\"))
        for operator, words in _OPERATORS.items()
    ),
    flags=re.I,
)  # fmt: skip
_WORDS = re.compile(
    r"negative|minus|plus|positive|below zero|root|square|cubed|power|to the|factorial"
    r"|cube|choose|hundred|reciprocal|opposite|negation|half|halves|twice|double|triple|thrice|ths?\b|third"
    r"|times|multiplied|divided|over|between|infinity|than|least|most|up to|imum of"
    r"|exceed|above|below|under|not|unequal|all real| (?:and|or) |\d ?\+ ?$|^ ?\+"
    r"|\bto\b|solution|empty|[解集根半负正零下无穷根号的乘除大小等于不多少高低超过足到满未至以上内介起码‰]|"
    + _SPELLED,
    re.I,
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_SIDE = re.compile(
    r"(?:^|(?<=,)|(?<=\\lor)) ?(?=<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z]))"
)
# Prose that makes an answer differ from the number beside it.
_CHANGES = re.compile(
    r"\b(?:not?|n't|non|never|neither|nor|except|excluding|without|negative|minus|plus"
    r"|half|double|twice|triple|reciprocal|inverse|opposite|root|factorial|power"
    r"|least|most|between|exceeds?|at minimum|at maximum|wrong|incorrect|false"
    r"|maybe|perhaps|either|if|unless|or|but|mod|minimum of|maximum of)\b"
    r"|(?<![或与])不(?!同)|^非|^未|^除|大于|小于|等于|以[上下内外]|之间|平方根|立方根|阶乘|倒数"
    r"|相反数|一半|次方|错|负|的平方$|的立方$|^(?:squared|cubed)$",
    re.I,
)


def words_to_operators(text: str) -> str:
    r"""Returns the text with words replaced by signs and operators.

    Args:
      text: an answer whose LaTeX is in one spelling, from within
        `notation.normalize_notation`.

    >>> (words_to_operators(r"\text{negative }7"),
    ...  words_to_operators("大于3"),
    ...  words_to_operators(r"7 \text{ squared}"))
    ('-7', 'x>3', '7^{2}')
    >>> (words_to_operators(r"7\text{ square feet}"),
    ...  words_to_operators("7 more than Bob"))
    ('7\\text{ square feet}', '7 more than Bob')
    """
    if not _WORDS.search(text):
        return _SIDE.sub("x", text)
    plain = _TEXT.sub(r" \1 ", text)
    plain = re.sub("  +", " ", plain).strip()
    spelled = plain
    for pattern, replacement in _RULES:
        spelled = pattern.sub(replacement, spelled)
    spelled = spelled if spelled != plain else text
    return _SIDE.sub("x", spelled)


def changes_value(text: str) -> bool:
    r"""Returns whether prose in a cleaned answer changes the value of its number.

    >>> changes_value(r"\text{except}7"), changes_value(r"7\text{cm}")
    (True, False)
    """
    return any(_CHANGES.search(words) for words in _TEXT.findall(text))
