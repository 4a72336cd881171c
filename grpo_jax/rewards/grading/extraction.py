r"""Extracts the final answer that a completion states.

`extract` returns the answer's text, or None. Only the text after a model's thoughts
counts. The time is linear in the length of the text, whatever it contains.
"""

import re
from collections.abc import Iterator

from grpo_jax.data.brackets import find_boxed

MAX_CHARS = 1000  # a longer answer must be identical to the reference
_WINDOW = 2 * MAX_CHARS  # characters after "the answer is", or before the last digit
_TRIES = 64  # statements examined, from the last one backwards

# ---- which part of the text ----------------------------------------------------------
_THOUGHTS = "think|thinking|thought|thoughts|reasoning"
_THOUGHTS_END = re.compile(
    rf"</(?:{_THOUGHTS})>|<\|end_of_thoughts?\|>|◁/think▷|\[/THINK\]", re.I
)
_THOUGHTS_BEGIN = re.compile(
    rf"\s*(?:<(?:{_THOUGHTS})>|<\|begin_of_thoughts?\|>|◁think▷|\[THINK\])", re.I
)
# End-of-turn tokens that a tokenizer has decoded as text.
_END_TOKENS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|</?s>|<eos>|<(?:end|start)_of_turn>"
    r"|\[/?INST\]",
    re.I,
)
_NOTES = re.compile(r"<<[^<>\n]{0,99}>>")  # GSM8K's calculator annotations

# ---- where an answer is stated -------------------------------------------------------
_TAGGED = re.compile(r".*<answer>(.*?)(?:</answer>|\Z)", re.S | re.I)  # the last one
_I_HOPE = re.compile(r"\$\.? I hope")
_HASHES = re.compile(r"####[ \t]{0,99}([^\n]+)")
_OUTPUT = re.compile(r"```output[ \t]{0,99}\n(.*?)(?:\n?```|\Z)", re.S)
_MARK = r"[*_]{0,3}"  # bold, in Markdown
_FOR = (
    r"(?:\s(?:to|for|of)\s(?:the|this|that|your|part|question|problem|exercise|[#\d(q])"
    r"[^.:=\n]{0,80}?)?(?:\s?\([^()\n]{1,20}\))?"
)
_THEREFORE = (
    r"(?:\s(?:therefore|thus|then|hence|so|simply|just|indeed|also|clearly)\b,?)?"
)
# "The answer is": the answer follows, whatever it looks like.
_IS = re.compile(
    rf"answers?{_FOR}{_MARK}\s{{1,3}}(?:is|are|was|equals|(?:should|would|will|must) be"
    rf"|comes (?:out )?to)\b{_THEREFORE}{_MARK}\s{{0,3}}:?"
    r"|答案\s{0,3}(?:应该?|就)?(?:是|为|為|：|:|=){1,2}\s{0,3}[：:]?"
    r"|答え\s{0,3}(?:は|：|:){1,2}",
    re.I,
)
# "Answer:" may also start a whole solution, so the text must look like an answer.
_COLON = re.compile(
    rf"answer{_FOR}{_MARK}\s?[:=：]\s?{_MARK}|ans\s?[.:=]|答{_MARK}\s?[：:]{_MARK}"
    r"|answer\s?(?:\*\*)?\s?\n",
    re.I,
)
_HEADING = re.compile(r"(?:#|\*\*)\s?(?:final |correct )?$", re.I)
_IS_ELSEWHERE = {
    language: re.compile(rf"{words}{_MARK}\s?:?{_MARK}", re.I)
    for language, words in (
        ("de", r"(?:antwort|lösung)\b[^.:=\n]{0,30}?(?:\b(?:ist|lautet|beträgt)\b|:)"),
        ("es", r"respuesta\b[^.:=\n]{0,30}?(?:\bes\b|\s?:)"),
        ("fr", r"réponse\b[^.:=\n]{0,30}?(?:\best\b|\s?:)"),
    )
}
_KEYWORDS = ("answer", "ans", "答", "antwort", "lösung", "respuesta", "réponse")
_NO_ANSWER = re.compile(
    r"(?:\b(?:indeed|thus|also|now|probably|therefore)\b )?(?:"
    r"(?:correct|right|wrong|incorrect|consistent|reasonable|verified|clear|unique|valid)"
    r"(?=\s*(?:[,;:.!)]|$|\b(?:and|because|as|since|with|for)\b))"
    r"|(?:not|n't)\s+(?:[-$(\\]?\d|\(?(?-i:[A-H])\b|correct|right|yet|in\b|the\b|unique)"
    r"|(?:the same|as follows|given by|found by|obtained|in the form)\b"
    r"|(?:a|an|to|in|found|that|what) (?!\d)[a-z]{2,}"
    r")|(?:不(?:是|对|正确|唯一)|正确的|错误的|对的)",
    re.I,
)
_SEVERAL = re.compile(
    r"\$[^$]{1,99}\$(?:\s?(?:,|，|、)?\s?(?:and|or|和|或|及|，|、|,)\s?\$[^$]{1,99}\$){1,9}"
)
# Words that a sentence puts before a number.
_ARTICLE = re.compile(
    r"(?:an?|the|also|somit|daher|donc|de|entonces) (?=[-−$\\]?\d)", re.I
)
_VALUE = re.compile(
    r"[-−+±(\[{<>≤≥$€£\\|]*\s?(?:\d|[A-Za-z]\b|[A-Za-z]\s?[=(<>]|\\|π|√|∞|∅)"
)
_SHORT_WORDS = 5  # the longest answer in words: "all real numbers", "Friday"

# ---- numbers -------------------------------------------------------------------------
_DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\}|\\[,!]|[\u00a0\u2009\u202f])\d{3})+(?!\d)|\d+)"
_DOTS = r"(?:\.{3,}|…|\s?\\[lc]?dots)?"  # 0.333... goes on
_FRACTION = r"\\[dtc]?frac\s?(?:\{-?\d+\}|\d)\s?(?:\{-?\d+\}|\d)"
_NUMBER = re.compile(
    rf"(?:百分之\s?)?(?:(?<![\d\w)}}])[-−])?(?:(?<![A-Za-z_^\\\d.])\d*{_FRACTION}"
    rf"|(?<![A-Za-z_^\d])(?<![_^]\{{)(?:{_DIGITS}(?:\.\d+{_DOTS})?|\.\d+)"
    r"(?::\d+(?!\d))?(?:\^\{?-?\d+\}?)?"
    r"(?:\s?(?:\\times|×|\*)\s?10\s?\^\s?\{?-?\d+\}?|e[-+]?\d+(?!\w))?"
    r"(?: \d+/\d+(?!\d|\.\d)|/\d+(?!\d|\.\d))?(?:\s?\\?%)?)"
)
_FORMULA = re.compile(
    r"\$\$?([^$\n]{1,500})\$|\\\(([^\n]{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.S
)
_EQUALS = re.compile(
    r"=|≈|\\(?:approx|sim|Right[a-z]*arrow|right[a-z]*arrow|implies|iff|to)(?![A-Za-z])"
)
_LAST_DIGIT = re.compile(r".*\d", re.S)
_WIDE = str.maketrans("０１２３４５６７８９，．－％／", "0123456789,.-%/")
# How other languages group digits: 1.234,5 and 1 234,5.
_GROUPED = re.compile(
    r"(?<![\d.,])([1-9]\d{0,2})((?:[.,\u202f\u00a0 ]\d{3})+)(?!\d)(?:,(\d+))?"
)
_COMMA = re.compile(r"(?<![\d.,(\[])(\d+),(\d+)(?![\d.,]*\d)")
COMMA_LANGUAGES = ("de", "es", "fr")


def final_part(text: str) -> str:
    """Returns the text after a model's thoughts; "" if the thoughts do not end.

    >>> final_part("<think>so 5</think> It is 6."), final_part("<think>so 5")
    (' It is 6.', '')
    """
    if ends := list(_THOUGHTS_END.finditer(text)):
        return text[ends[-1].end() :]
    return "" if _THOUGHTS_BEGIN.match(text) else text


def _plain(text: str) -> str:
    """Removes calculator annotations, and turns end-of-turn tokens into newlines."""
    if "<<" in text:
        text = _NOTES.sub("", text)
    return _END_TOKENS.sub("\n", text) if "<" in text or "[" in text else text


def extract(text: str, language: str = "en") -> str | None:
    r"""Returns the final answer that a completion states, or None.

    The search has the order of DeepSeekMath's evaluation: `final answer is $…$. I
    hope`, the last complete `\boxed{…}`, `the answer is …` (or 答案是 …), GSM8K's
    `#### …`, the last ```output block, the last number. Thoughts, up to `</think>`, do
    not count.

    Args:
      text: the completion.
      language: "de", "es" and "fr" write 1.234,5 or 1 234,5 for 1,234.5.

    >>> extract(r"First \boxed{1}. So it is \boxed{\frac{1}{2}}."), extract("Hm.")
    ('\\frac{1}{2}', None)
    >>> extract("He pays 3 + 4 = 7. The answer is $7.00."), extract("so 1,234 in all")
    ('7.00', '1,234')
    >>> extract("<think>\\boxed{1}</think> It is 3/4."), extract("#### 1.234", "de")
    ('3/4', '1234')
    """
    stated = stated_answer(text, language)
    if stated is not None:
        return stated or None
    text = final_part(text)
    if _OUTPUT.search(text):
        return printed_answer(text)
    found = last_number(_plain(text), language)
    return found and _trim(found)


def stated_answer(text: str, language: str = "en") -> str | None:
    """Returns the answer that a completion names as such; see `extract` for the order.

    Returns:
      None if no answer is named. "" if an answer is announced but does not follow;
      then no earlier number counts as the answer.

    >>> (stated_answer("He answers 3. The answer is 4."),
    ...  stated_answer("so 3 in all"),
    ...  stated_answer("#### "))
    ('4', None, '')
    """
    text = _plain(final_part(text))
    tagged = _TAGGED.match(text)
    text = tagged[1] if tagged else text
    if (minerva := _minerva_answer(text)) is not None:
        return _clean_answer(minerva, language)
    if boxes := [box for box in find_boxed(text) if box.strip()]:
        return _clean_answer(boxes[-1], language)
    hashes = "####" in text
    for end, spoken, sure in _statements(text):
        if hashes and not sure:
            continue
        window = text[end : end + _WINDOW]
        if stated := _statement(window, spoken or language, sure):
            return stated
    for at in _last_places(text, "####"):
        if found := _HASHES.match(text, at):
            return _clean_answer(found[1], language)
    if tagged and text and _looks_like_answer(text.strip()):
        return _clean_answer(text, language)
    return None


def printed_answer(text: str) -> str | None:
    """Returns the last line of the last ```output block; None if the program failed.

    >>> (printed_answer("```output\\n1\\n2\\n```"),
    ...  printed_answer("```output\\nRuntime errors: x"))
    ('2', None)
    """
    outputs = _OUTPUT.findall(text) or [""]
    lines = [line.strip() for line in outputs[-1].splitlines() if line.strip()]
    if not lines or re.match(r"Runtime errors?:|Traceback|Timeout", lines[0]):
        return None
    return lines[-1]


def last_number(text: str, language: str = "en") -> str | None:
    r"""Returns the last number of a text, or the formula that contains it.

    Args:
      text: the text.
      language: as for `extract`.

    >>> last_number("The probability is 3/4."), last_number(r"so $2\sqrt{3}$ cm long.")
    ('3/4', '2\\sqrt{3}')
    >>> last_number("an area of 12 m^2"), last_number("1 234 Eier", "de")
    ('12', '1234')
    """
    if not (digits := _LAST_DIGIT.match(text)):
        return None
    last = digits.end()
    # A window bounds the time; a number that exceeds it is no real answer.
    window = text[max(0, last - _WINDOW) : last + 300]
    window = window.translate(_WIDE)
    if language[:2] in COMMA_LANGUAGES:
        window = _to_points(window)
    numbers = list(_NUMBER.finditer(window))
    if not numbers:
        return None
    number = numbers[-1]
    for found in _FORMULA.finditer(window):
        inside = found[found.lastindex or 0]
        holds = found.start() <= number.start() and number.end() <= found.end()
        inside = _EQUALS.split(inside)[-1].strip()
        if holds and re.search(r"\\(?!text|mathrm|quad|[,;!% ])|\^", inside):
            return inside
    return number.group()


# ---- statements ----------------------------------------------------------------------
def _minerva_answer(text: str) -> str | None:
    """Returns the last `final answer is $…$. I hope`, from Minerva's prompt."""
    words = "final answer is $"
    for at in _last_places(text, words):
        start = at + len(words)
        if found := _I_HOPE.search(text, start + 1, start + 520):
            return text[start : found.start()]
    return None


def _statements(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yields (end, language, sure) of each announcement of an answer, the last first.

    `sure` is true for "is", and false for a mere colon.
    """
    low = text.lower()
    low = low if len(low) == len(text) else text  # İ has two characters in lower case
    places = {at for word in _KEYWORDS for at in _last_places(low, word)}
    for at in sorted(places, reverse=True)[:_TRIES]:
        before = text[max(0, at - 20) : at]
        if found := _IS.match(text, at):
            yield found.end(), "", True
        elif (found := _COLON.match(text, at)) and not re.search(
            r"[A-Za-z回解作]$", before
        ):
            if not found.group().endswith("\n") or _HEADING.search(before):
                yield found.end(), "", False
        for language, pattern in _IS_ELSEWHERE.items():
            if found := pattern.match(text, at):
                yield found.end(), language, False


def _last_places(text: str, word: str) -> Iterator[int]:
    at = len(text)
    for _ in range(_TRIES):
        at = text.rfind(word, 0, at)
        if at < 0:
            return
        yield at


def _statement(text: str, language: str, sure: bool) -> str | None:
    """Returns the answer in the text after "the answer is", or None.

    This is the formula at the start of the clause, or the clause up to its full stop.

    Args:
      text: the text after the announcement.
      language: as for `extract`.
      sure: the announcement says "is". After a mere colon ("Answer: First we add …"),
        the clause must look like an answer.
    """
    line = next((part for part in text.splitlines() if part.strip(" :：*$#>")), "")
    line = line.strip().lstrip(":：").strip().strip("*").strip()
    if several := _SEVERAL.match(line):
        return _clean_answer(several.group().replace("$", ""), language)
    if formula := re.match(r"\$\$?([^$]+)\$", line) or re.match(
        r"\\[(\[](.+?)\\[)\]]", line
    ):
        return _clean_answer(formula[1], language) or None
    if language[:2] in COMMA_LANGUAGES:
        line = _to_points(line)
    clause = re.split(r"(?<!\b[ap])(?<!\.[am])(?<!\.)[.!](?:\s|\*|$)|。|！", line)[0]
    clause = _without_reason(clause.replace("**", ""))
    if _NO_ANSWER.match(clause):
        return None
    stated = _trim(
        _ARTICLE.sub("", clause, count=1) if _ARTICLE.match(clause) else clause
    )
    if sure or not stated:
        return stated or None
    return stated if _looks_like_answer(stated) else None


def _without_reason(clause: str) -> str:
    """Removes remarks such as "(see step 3)" and "because …"."""
    while remark := re.search(r"\s?[(（][^()（）]*[)）]\s*$", clause):
        if not re.search(r"[a-z]{2,}[\s.]|[见由第共即]", remark.group(), re.I):
            break
        clause = clause[: remark.start()]
    return re.split(
        r",?\s(?:because|since|which|i\.e\.|that is,|so that|as (?:shown|we|in|above|"
        r"required|desired|needed))\b|[,，]?(?:因为|所以|即)",
        clause,
    )[0]


def _looks_like_answer(text: str) -> bool:
    words = len(re.findall(r"[A-Za-z]{2,}|[\u3400-\u9fff]", text))
    if _VALUE.match(text):
        return words <= 12
    return words <= (_SHORT_WORDS if not re.search(r"\d", text) else 2)


def _trim(text: str) -> str:
    text = text.strip()
    if len(text) > MAX_CHARS:
        return text
    if not re.search(r"\.\d+\.{3,}$", text):  # 0.333... goes on
        text = re.sub(r"(?<![apm])[.。,，;；:：]+$", "", text)
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return re.sub(r"^\$(?=[\d.])", "", text).strip()


# ---- numbers of other languages ------------------------------------------------------
def _clean_answer(text: str, language: str) -> str:
    """Returns an answer without its punctuation, with numbers in English notation."""
    text = _trim(text)
    local = language[:2] in COMMA_LANGUAGES and len(text) <= MAX_CHARS
    return _to_points(text) if local else text


def _to_points(text: str) -> str:
    r"""Converts 1.234,5 and 1 234,5 to 1234.5, and 3,5 to 3.5.

    >>> _to_points("1.234 €, 1 234,50 €, 3,5 kg und 2 oder 3")
    '1234 €, 1234.50 €, 3.5 kg und 2 oder 3'
    """

    def joined(match: re.Match[str]) -> str:
        groups, rest = match[2], match[3]
        if len({groups[at] for at in range(0, len(groups), 4)}) > 1:
            return match.group()
        whole = match[1] + re.sub(r"\D", "", groups)
        return f"{whole}.{rest}" if rest else whole

    return _COMMA.sub(r"\1.\2", _GROUPED.sub(joined, text))
