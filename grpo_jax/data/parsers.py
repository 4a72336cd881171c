"""Parsers for the files of the sets.

Readers (`json_lines`, `json_list`, `tsv`) yield the line number and row of a file.
Converters (`gsm8k`, `parse_math`, …) turn a row into an `Example`. They raise KeyError,
TypeError or ValueError for an invalid row; `registry.read_examples` adds file and line.
Columns of the example tell how its answer is graded: `options` (the answer is a
letter), `blanks` (the number of answers, in order), `tolerance` (a rounded number).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.data.brackets import find_boxed
from grpo_jax.data.example import Example
from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import parse_json

Row = Any  # what a file holds for one example: a JSON object, or a line's columns
LONGEST = 1 << 26  # bytes per line; a longer line is refused before it fills memory


# -- the rows of each file ---------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise GrpoError(f"{path}:{number}: longer than {LONGEST} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = error.reason
                raise GrpoError(f"{path}:{number}: not UTF-8 ({reason})") from None
            yield number, text.rstrip("\r\n")


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise GrpoError(
            f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    except ValueError as error:  # huge integers, deep nesting
        reason = one_line(error)
        raise GrpoError(f"{path}:{number}: not readable as JSON ({reason})") from None


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number, JSON value) for each line that is not blank."""
    for number, line in _lines(path):
        if line.strip():
            yield number, _parse(path, number, line)


def json_list(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (1, item) for each item of a file that holds one JSON list.

    Raises:
      GrpoError: it is not one.
    """
    rows = _parse(path, 1, "\n".join(line for _, line in _lines(path)))
    if not isinstance(rows, list):
        raise GrpoError(f"{path}:1: expected a JSON list, found {type_name(rows)}")
    return ((1, row) for row in rows)  # json does not report a row's line


def tsv(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number, {question, answer}) for each line with two columns.

    Raises:
      GrpoError: a line has another number of columns.
    """
    for number, line in _lines(path):
        columns = line.split("\t")
        if not line.strip():
            continue
        if len(columns) != 2:
            raise GrpoError(
                f"{path}:{number}: {len(columns)} columns; expected question, tab, "
                "answer"
            )
        yield number, {"question": columns[0], "answer": columns[1]}


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number, row) for each row of a .jsonl, .json or .tsv file.

    Raises:
      GrpoError: a line is not readable; the message names the file and the line.
    """
    return {".json": json_list, ".tsv": tsv}.get(path.suffix, json_lines)(path)


# -- from a row to an example ------------------------------------------------------


def type_name(value: Any) -> str:
    """Returns the name of a value's type, for error messages."""
    return type(value).__name__


def _text(row: Row, key: str) -> str:
    """Returns a field as text; whole numbers are written without `.0`."""
    value = row[key]
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"field {key!r} is {type_name(value)}; expected text or a number")


def _other_columns(row: Row, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def gsm8k(row: Row) -> Example:
    """Converts a row of GSM8K, whose final answer follows "####"."""
    worked, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("field 'answer' has no '####' before the final answer")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # calculator annotations
    return Example(_text(row, "question"), answer.strip(), worked)


def last_boxed(text: str) -> str:
    r"""Returns the content of the last \boxed{…}, or "" if there is none.

    >>> last_boxed(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> last_boxed(r"It is $\boxed 9$.")
    '9'
    """
    boxes = find_boxed(text[max(0, text.rfind("\\boxed")) :])
    return " ".join(boxes[0].split()) if boxes else ""  # on one line


# Two solutions of the published file end in an empty \boxed{}; both answers are 0.
_MATH_BLANKS = ("train/number_theory/7115.json", "train/number_theory/7117.json")


def parse_math(row: Row) -> Example:
    r"""Converts a row of MATH; without an answer field, the last \boxed{} counts."""
    solution = _text(row, "solution")
    name = _text(row, "unique_id" if "unique_id" in row else "id")
    if name in _MATH_BLANKS:
        solution = solution.replace("\\boxed{}", "\\boxed{0}")
    answer = _text(row, "answer") if "answer" in row else last_boxed(solution)
    if not answer:
        raise ValueError("field 'solution' has no \\boxed{} answer")
    level = str(row.get("level", "")).removeprefix("Level ")
    columns = {
        "subject": row["subject"] if "subject" in row else row["type"],
        "level": int(level) if level.isdigit() else None,  # a few are "Level ?"
    }
    return Example(_text(row, "problem"), answer, solution, id=name, columns=columns)


def cmath(row: Row) -> Example:
    """Converts a row of CMATH."""
    columns = _other_columns(row, "question", "golden")
    question, answer = _text(row, "question"), _text(row, "golden")
    return Example(question, answer, language="zh", columns=columns)


def mgsm(language: str) -> Callable[[Row], Example]:
    """Returns the converter for the MGSM rows of a language."""
    return lambda row: Example(
        _text(row, "question"), _text(row, "answer"), language=language
    )


def svamp(row: Row) -> Example:
    """Converts a row of SVAMP, whose text is split into a body and a question."""
    question = f"{_text(row, 'Body').rstrip('.')}. {_text(row, 'Question')}"
    columns = {"type": row["Type"], "equation": row["Equation"]}
    return _computed_answer(question, _text(row, "Answer"), columns)


def mawps(row: Row) -> Example:
    """Converts a row of MAWPS."""
    columns = _other_columns(row, "input", "target")
    return _computed_answer(_text(row, "input"), _text(row, "target"), columns)


def gsm_hard(row: Row) -> Example:
    """Converts a row of GSM-Hard, whose answer a program computed."""
    columns = {"program": row["code"]}
    return _computed_answer(_text(row, "input"), _text(row, "target"), columns)


def _computed_answer(question: str, answer: str, columns: dict[str, Any]) -> Example:
    return Example(question, answer, columns=columns | tolerance_column(answer))


def tolerance_column(answer: str) -> dict[str, Any]:
    """Returns the tolerance column for an answer that a program computed.

    The tolerance is 0.001 absolute and 1 % relative. Integers get none.

    >>> tolerance_column("6.333333333"), tolerance_column("7")
    ({'tolerance': [0.001, 0.01]}, {})
    """
    return {} if re.fullmatch(r"-?\d+", answer) else {"tolerance": [1e-3, 1e-2]}


def ocw(row: Row) -> Example:
    """Converts a row of OCW: a number, an expression or an equation.

    Numbers are compared with a relative tolerance of 1e-5.
    """
    answer = _text(row, "answer").replace("np.arcsin", "\\arcsin").replace("$", "")
    columns = {}
    try:
        float(answer)
        columns["tolerance"] = [None, 1e-5]
    except ValueError:
        answer = re.sub(r"^(-?\d+)\./(\d+)$", r"\1/\2", answer)  # -1./3
    solution, name = _text(row, "solution"), f"ocw/{_text(row, 'id')}"
    return Example(_text(row, "problem"), answer, solution, id=name, columns=columns)


CHOOSE = "What of the following is the right choice? Explain your answer."
CHOOSE_ZH = "从以下选项中选择："


def _choice(
    question: str,
    options: list[str],
    label: Any,
    columns: Mapping[str, Any],
    *,
    ask: str = CHOOSE,
    between: str = " ",
    **fields: str,
) -> Example:
    """Returns a question with its lettered options, as the papers write it."""
    lettered = [f"({x}) {o}" for x, o in zip("ABCDEFGH", options, strict=False)]
    question = f"{question}\n{ask}\n{between.join(lettered)}"
    columns = {"options": options, **columns}
    return Example(question, _label(label, options), columns=columns, **fields)


def mmlu(row: Row) -> Example:
    """Converts a multiple-choice row of MMLU-STEM."""
    options = [str(option).strip() for option in row["options"]]
    columns, name = {"subject": row["topic"]}, f"mmlu_stem/{_text(row, 'id')}"
    text = _text(row, "question")
    return _choice(text, options, row["answer"], columns, between=", ", id=name)


def sat(row: Row) -> Example:
    """Converts a row of SAT, whose options are one text: "A) … B) …" or "A. … B. …"."""
    parts = [_text(row, "options")]
    for count, label in enumerate("ABCD", 2):
        parts[-1:] = re.split(rf"(?:^|\s){label}[).]\s", parts[-1], maxsplit=1)
        if len(parts) < count:
            raise ValueError(f"field 'options' has no option {label}")
    options = [part.strip() for part in parts[1:]]
    name = f"sat/{_text(row, 'id')}"
    return _choice(_text(row, "question"), options, row["Answer"], {}, id=name)


def gaokao_mathqa(row: Row) -> Example:
    """Converts a multiple-choice row of AGIEval's Gaokao-MathQA."""
    options = [re.sub(r"^\([A-H]\)", "", option).strip() for option in row["options"]]
    text = _text(row, "question").rstrip("\\").rstrip()
    columns = {"source": row["other"]["source"]}
    return _choice(text, options, row["label"], columns, ask=CHOOSE_ZH, language="zh")


def _label(label: Any, options: list[str]) -> str:
    """Returns the letters of the right options; a few questions have several."""
    letters = re.sub(r"[\s,]", "", str(label))
    known = "ABCDEFGH"[: len(options)]
    if not letters or not set(letters) <= set(known):
        shown = one_line(repr(label))
        raise ValueError(f"the answer {shown} is none of the options {known}")
    return letters


def gaokao_mathcloze(row: Row) -> Example:
    """Converts a fill-in row of AGIEval's Gaokao-MathCloze; ";" separates answers."""
    answers = [part.strip().strip("$") for part in _text(row, "answer").split(";")]
    columns = {"source": row["other"]["source"], "blanks": len(answers)}
    question = _text(row, "question")
    return Example(question, "; ".join(answers), language="zh", columns=columns)


def _chat(messages: Any) -> tuple[str, str, dict[str, Any]]:
    """Returns a chat's last question, its answer, and columns for what is before."""
    shape = (
        "expected [system,] user[, assistant, user, …][, assistant], each with role "
        "and content"
    )
    if not isinstance(messages, list):
        raise TypeError(f"field 'messages' is {type_name(messages)}; {shape}")
    turns: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"field 'messages': {shape}")
        turns.append({"role": message["role"], "content": _text(message, "content")})
    roles = [turn["role"] for turn in turns]
    columns: dict[str, Any] = {}
    if roles[:1] == ["system"]:
        columns["system"] = turns.pop(0)["content"]
    expected = ["user", "assistant"] * len(turns)
    if not turns or [turn["role"] for turn in turns] != expected[: len(turns)]:
        shown = one_line(repr(roles))
        raise ValueError(f"field 'messages' has the roles {shown}; {shape}")
    solution = turns.pop()["content"] if len(turns) % 2 == 0 else ""
    question = turns.pop()["content"]
    return question, solution, columns | ({"messages": turns} if turns else {})


def parse_local_row(row: Row) -> Example:
    """Converts a row of a user's own file.

    Only the documented field names are read; other fields become columns.
    """
    texts = ("question", "answer", "solution", "language", "id")
    fields = {key: _text(row, key) for key in texts if key in row}
    columns = _other_columns(row, "messages", *texts)
    if columns.get("system") is not None:
        columns["system"] = _text(row, "system")
    if "messages" in row:
        if "question" in row:
            raise ValueError("has both 'question' and 'messages'; keep one")
        question, solution, before = _chat(row["messages"])
        fields = {"question": question, "solution": solution} | fields
        columns |= before
    else:
        fields["question"] = _text(row, "question")
    if not fields.get("answer") and not fields.get("solution"):
        raise ValueError("has neither an 'answer' nor a 'solution'")
    return Example(**fields, columns=columns)


_BAD_TEXT = re.compile("[\x00\ud800-\udfff]")  # JSON can hold them as \\u escapes


def check_text(value: Any) -> None:
    """Raises ValueError for NUL and lone surrogates, which no tokenizer accepts."""
    if isinstance(value, str) and (found := _BAD_TEXT.search(value)):
        lone = "lone surrogate, which is not valid Unicode"
        raise ValueError(f"holds a {'NUL character' if found[0] == chr(0) else lone}")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for item in value if isinstance(value, list) else ():
        check_text(item)
