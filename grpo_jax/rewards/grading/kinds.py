r"""Grades answers that are not one expression: options, blanks, rounded numbers.

`extract_prediction` extracts the answer of a completion, and `grade_examples` compares
answers. The columns of an example tell its kind:

- `options`: the stated letter, or the single option that equals the stated value. A
  letter elsewhere counts only as (B), or after "option", 选 and the like.
- `blanks` k: k answers in order, in one box or in the last k boxes.
- `tolerance` [absolute, relative]: a number that is within both of the reference. An
  answer that is not a number is compared as usual.
"""

import re
from collections.abc import Sequence

from grpo_jax.data.brackets import find_boxed, split_outside_brackets
from grpo_jax.data.example import Example
from grpo_jax.rewards.grading import equality, extraction, worker_pool
from grpo_jax.rewards.grading.expressions import Unreadable, evaluate_rational
from grpo_jax.rewards.grading.notation import normalize_notation
from grpo_jax.rewards.grading.paper import AND
from grpo_jax.rewards.grading.units import split_quantity

LETTERS = "ABCDEFGH"  # of options
_COMMA = re.compile("[,，、和]")
_STYLE = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|rm|bf)\b|[{}$*\\]")
# Text that may follow a letter that is the answer: "B) 12", "B: 12", "B because …".
_AFTER = r"(?=$|[).:：、，。]|\s+(?:is|as|since|because|which)\b)"
_REFUSED = (
    r"(?!\s*(?:(?:is|are|was)\s*)?(?:not\b|n't|wrong|incorrect|false|fail|不|错))"
)
_HINT = re.compile(
    r"(?:[故应就]选|选择|选项?|答案\s*[是为為]?|\b(?:option|choice|answer|choose|pick"
    r"|select)(?:\s+(?:is|letter|option))?)\s*[:：]?\s*"
    rf"\(?([A-H]{{1,4}})\)?(?![A-Za-z]){_REFUSED}",
    re.I,
)
_RIGHT = re.compile(
    r"(?<![A-Za-z])\(?([A-H])\)?(?:(?:\s*(?:,|and|、|和|及)\s*)+\(?([A-H])\)?)?\s*"
    r"(?:(?:is|are|must be)\s+(?:therefore\s+|thus\s+|indeed\s+|the\s+)?(?:only\s+)?"
    r"(?:correct|right|best|answer)\b|(?:选?项)?\s*(?:是|为)?\s*(?:正确|对的))"
    r"|\b(?:hence|therefore|thus|so)[,:]?\s+\(?([A-H])\)?\s*[.。]?\s*$",
    re.M | re.I,
)


def extract_prediction(text: str, example: Example, rule: str = "strict") -> str | None:
    r"""Returns the answer of a completion, or None.

    Args:
      text: the completion.
      example: the question, whose columns tell the kind of answer.
      rule: "strict" or "paper"; see `worker_pool.grade_answers`.

    Returns:
      An expression, the letters of options, or the answers to blanks joined by "; ".

    >>> which = Example("?", "B", columns={"options": ["3", "4"]})
    >>> (extract_prediction(r"so \boxed{\text{(B)}}.", which),
    ...  extract_prediction("So (A) is right.", which))
    ('B', 'A')
    >>> two = Example("?", "5; 10", columns={"blanks": 2})
    >>> extract_prediction("答案是 $5$, $10$", two)
    '5; 10'
    """
    if options := options_of(example):
        return extract_choice(text, len(options))
    if (count := blanks_of(example)) > 1:
        return extract_blanks(text, count)
    boxes = find_boxed(extraction.final_part(text)) if rule == "paper" else []
    if len(boxes) > 1 and "final answer is $" not in text:
        return AND.join(boxes)  # the paper's rule looks at all boxes
    return extraction.extract(text, example.language)


def grade_examples(
    examples: Sequence[Example],
    predictions: Sequence[str | None],
    rule: str = "strict",
) -> list[bool]:
    """Returns whether each prediction is the right answer to its example.

    Args:
      examples: the questions.
      predictions: results of `extract_prediction`, one per example; None is wrong.
      rule: "strict" or "paper"; see `worker_pool.grade_answers`.

    Raises:
      GrpoError: a worker process does not start.

    >>> which = Example("?", "B", columns={"options": ["3", "4"]})
    >>> near = Example("?", "4.5e33", columns={"tolerance": [None, 1e-5]})
    >>> grade_examples([which, which, near], ["B", "4.0", r"4.5\\times10^{33} W"])
    [True, True, True]
    """
    right = [False] * len(examples)
    pairs: list[tuple[str, str]] = []  # (prediction, reference)
    owners: list[int] = []  # the example of each pair
    for i, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        options, tolerance = options_of(example), tolerance_of(example)
        if prediction is None:
            continue
        given, wanted = [prediction], [example.answer]
        if options:
            spelled = [normalize_notation(option) for option in options]
            if is_letters(prediction, len(options)):
                right[i] = prediction == example.answer
                continue
            if len(example.answer) > 1:
                continue
            if spelled.count(normalize_notation(prediction)) == 1:
                chosen = spelled.index(normalize_notation(prediction))
                right[i] = LETTERS[chosen] == example.answer
                continue
            given, wanted = [prediction] * len(options), options
        elif blanks_of(example) > 1:
            given, wanted = split_blanks(prediction), split_blanks(example.answer)
            if len(given) != len(wanted):
                continue
        elif tolerance and (x := parse_number(prediction)) is not None:
            y = parse_number(example.answer)
            absolute, relative = tolerance
            if y is not None:
                within = relative * abs(y)
                within = within if absolute is None else min(within, absolute)
                right[i] = abs(x - y) <= within
            if right[i] or rule == "strict":
                continue
        pairs += zip(given, wanted, strict=True)
        owners += [i] * len(given)
    lists = [p for p, _ in pairs], [r for _, r in pairs]
    equal: dict[int, list[bool]] = {}
    for i, same in zip(owners, worker_pool.grade_answers(*lists, rule), strict=True):
        equal.setdefault(i, []).append(same)
    for i, found in equal.items():
        right[i] = all(found)
        if options_of(examples[i]):  # exactly one option must have that value
            right[i] = found[LETTERS.index(examples[i].answer)] and sum(found) == 1
    return right


# A user's own columns may hold anything under these names, so their types are checked.


def options_of(example: Example) -> list[str]:
    """Returns the options; [] if the answer is not letters of options."""
    options = example.columns.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= 8:
        return []
    return [str(o) for o in options] if is_letters(example.answer, len(options)) else []


def blanks_of(example: Example) -> int:
    """Returns the number of blanks; 1 by default."""
    count = example.columns.get("blanks")
    return count if isinstance(count, int) else 1


def tolerance_of(example: Example) -> tuple[float | None, float] | None:
    """Returns the absolute and the relative tolerance, or None."""
    match example.columns.get("tolerance"):
        case [(None | int() | float()) as absolute, (int() | float()) as relative]:
            return absolute, relative
    return None


def is_letters(text: str, options: int) -> bool:
    """Returns whether a text consists of letters of the first `options` options."""
    return bool(text) and set(text) <= set(LETTERS[:options])


def extract_choice(text: str, options: int) -> str | None:
    r"""Returns the letter of the chosen option, or the value that is stated instead.

    Args:
      text: the completion.
      options: the number of options.

    Returns:
      One letter, several as "ACD", another stated value, or None.

    >>> (extract_choice("The answer is B. It fits.", 4),
    ...  extract_choice(r"\boxed{A, C}", 4))
    ('B', 'AC')
    >>> (extract_choice(r"\boxed{12}", 4),
    ...  extract_choice("A dog has (D) four legs; 故选：C", 4))
    ('12', 'C')
    """
    known = LETTERS[:options]
    if stated := extraction.stated_answer(text):
        if letters := _letters(stated, known) or _hinted(stated, known):
            return letters
        marked = set(re.findall(rf"(?<![A-Za-z])\(([{known}])\)", stated))
        return marked.pop() if len(marked) == 1 else stated
    text = extraction.final_part(text).strip()
    if hinted := _hinted(text, known):
        return hinted
    if marks := re.findall(rf"\(([{known}])\)", text):
        return marks[-1]
    return _letters(text.rpartition("\n")[2], known)


def _hinted(text: str, known: str) -> str | None:
    """Returns the last letters called right, or else the last called an option."""
    for pattern in (_RIGHT, _HINT):
        found = ["".join(filter(None, m.groups())) for m in pattern.finditer(text)]
        if found := [letters for letters in found if set(letters) <= set(known)]:
            return "".join(sorted(set(found[-1])))
    return None


def _letters(text: str, known: str) -> str | None:
    text = _STYLE.sub("", text).strip()
    letter = rf"\(?([{known}])\)?"
    if several := re.fullmatch(rf"{letter}(?:(?:[\s,、;和及]|and)*{letter})*", text):
        found = re.findall(f"[{known}]", several.group())
        return "".join(sorted(set(found)))
    letter = rf"(?:\(([{known}]{{1,4}})\)|([{known}]){_AFTER}){_REFUSED}"
    one = re.match(letter, text)
    return one[1] or one[2] if one else None


def extract_blanks(text: str, count: int) -> str | None:
    r"""Returns the answers to `count` blanks, joined by "; ".

    Returns None if the completion states another number of answers.

    >>> (extract_blanks(r"\boxed{1}, then \boxed{(2, 3)}", 2),
    ...  extract_blanks(r"\boxed{5, 10}", 2))
    ('1; (2, 3)', '5; 10')
    """
    text = extraction.final_part(text)
    if boxes := [box for box in find_boxed(text) if box.strip()]:
        parts = split_blanks(boxes[-1])
        parts = parts if len(parts) == count else boxes[-count:]
    else:
        clause = re.split(r"(?:答案|answers?)\s*(?:are|is|[是为為])?\s*[:：]?", text)
        parts = split_blanks(clause[-1].strip().partition("\n")[0])
    return "; ".join(parts) if len(parts) == count else None


def split_blanks(text: str) -> list[str]:
    """Splits answers at semicolons, or else at commas and 和 outside brackets."""
    parts = [part for part in re.split(r"[;；]", text) if part.strip(" $")]
    if len(parts) < 2:
        parts = split_outside_brackets(text, _COMMA)
    return [part.strip().strip("$.。").strip() for part in parts if part.strip(" $.。")]


def parse_number(text: str) -> float | None:
    r"""Returns the value of a numeric answer, or None if it is not a number.

    The unit and the text before "=" are ignored.

    >>> (parse_number(r"r = 4.5\times10^{3} \text{ m}"),
    ...  parse_number("1,200 kg"),
    ...  parse_number("x+1"))
    (4500.0, 1200.0, None)
    """
    if len(text) > equality.MAX_CHARS:
        return None
    text = re.split(r"=|\\approx|\\sim", normalize_notation(text))[-1]
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", split_quantity(text)[0])
    text = re.sub(r"/?\\text\{[^{}]*\}(?:\^\{?-?\d+\}?)?", "", text)
    try:
        return float(evaluate_rational(text))
    except (Unreadable, OverflowError):
        return None
