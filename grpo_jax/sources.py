"""The known sets of questions: where each file lies and how its rows are read.

In: a set's name and split, or the path of a user's JSON-lines file.
Out: `Source` (file, public address, SHA-256, reader, converter), and `examples`, which
turns a file into `Example`s or says file, line and row of what is wrong.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.data import Example
from grpo_jax.errors import GrpoError

Row = Any  # what a file holds for one example: a JSON object, or a line's columns


# -- the rows of each file ---------------------------------------------------------


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise GrpoError(f"{path}:{number}: not UTF-8 ({error.reason})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _decode(path, number, line).rstrip("\r\n")


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise GrpoError(
            f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # huge integers, deep nesting
        raise GrpoError(f"{path}:{number}: not readable as JSON ({error})") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        yield number, _parse(path, number, line)


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
    text = "\n".join(
        _decode(path, number, line)
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
    )
    rows = _parse(path, 1, text)
    if not isinstance(rows, list):
        raise GrpoError(f"{path}:1: expected a JSON list, found {_kind(rows)}")
    return ((1, row) for row in rows)  # json does not tell a row's line


def _tsv(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        columns = line.split("\t")
        if len(columns) != 2:
            raise GrpoError(
                f"{path}:{number}: {len(columns)} columns; expected question, tab, "
                "answer"
            )
        yield number, {"question": columns[0], "answer": columns[1]}


# -- from a row to an example ------------------------------------------------------


def _kind(value: Any) -> str:
    return type(value).__name__


def _text(row: Row, key: str) -> str:
    """A field as text; a number is written without a needless `.0`."""
    value = row[key]
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value) if value.is_integer() else value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise TypeError(f"field {key!r} is {_kind(value)}; expected text or a number")


def _rest(row: Row, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def _gsm8k(row: Row) -> Example:
    worked, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("field 'answer' has no '####' before the final answer")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # calculator annotations
    return Example(_text(row, "question"), answer.strip(), worked)


def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{…} ("" without one).

    >>> last_boxed(r"so \boxed{1}, no, \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> last_boxed(r"It is $\boxed 9$.")
    '9'
    """
    start = text.rfind("\\boxed")
    rest = text[start + len("\\boxed") :].lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        return rest[:1]  # TeX: without braces, the next token
    depth = 0
    for end, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return " ".join(rest[1:end].split())  # on one line
    return ""


# Two solutions of the published file end in an empty \\boxed{}; both come to 0.
_MATH_BLANKS = ("train/number_theory/7115.json", "train/number_theory/7117.json")


def _math(row: Row) -> Example:
    solution = _text(row, "solution")
    name = row["unique_id"] if "unique_id" in row else row["id"]
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


def _cmath(row: Row) -> Example:
    columns = _rest(row, "question", "golden")
    question, answer = _text(row, "question"), _text(row, "golden")
    return Example(question, answer, language="zh", columns=columns)


def _mgsm(language: str) -> Callable[[Row], Example]:
    return lambda row: Example(
        _text(row, "question"), _text(row, "answer"), language=language
    )


def _svamp(row: Row) -> Example:
    body = _text(row, "Body")
    question = f"{body.rstrip('.')}. {_text(row, 'Question')}"
    columns = {"type": row["Type"], "equation": row["Equation"]}
    return Example(question, _text(row, "Answer"), columns=columns)


def _mawps(row: Row) -> Example:
    columns = _rest(row, "input", "target")
    return Example(_text(row, "input"), _text(row, "target"), columns=columns)


def _chat(messages: Any) -> dict[str, str]:
    """question, solution and system of a chat of one turn."""
    shape = "expected [system,] user[, assistant], each with role and content"
    if not isinstance(messages, list):
        raise TypeError(f"field 'messages' is {_kind(messages)}; {shape}")
    roles = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"field 'messages': {shape}")
        roles.append(message["role"])
    if roles[:1] == ["system"]:
        roles, names = roles[1:], ["system", "question", "solution"]
    else:
        names = ["question", "solution"]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(f"field 'messages' has the roles {roles}; {shape}")
    return {
        name: _text(message, "content")
        for name, message in zip(names, messages, strict=False)
    }


def _local(row: Row) -> Example:
    """A row of a user's own file: these names and no guesses at others."""
    used = ("messages", "question", "answer", "solution", "language", "id")
    columns = _rest(row, *used)
    fields = {"question": "", "solution": ""}
    if "messages" in row:
        if "question" in row:
            raise ValueError("has both 'question' and 'messages'; keep one")
        fields |= _chat(row["messages"])
        if "system" in fields:
            columns["system"] = fields["system"]
    else:
        fields["question"] = _text(row, "question")
    if "solution" in row:
        fields["solution"] = _text(row, "solution")
    answer = _text(row, "answer") if "answer" in row else ""
    if not answer and not fields["solution"]:
        raise ValueError("has neither an 'answer' nor a 'solution'")
    language = _text(row, "language") if "language" in row else "en"
    name = _text(row, "id") if "id" in row else ""
    question, solution = fields["question"], fields["solution"]
    return Example(question, answer, solution, language, name, columns)


_BAD_TEXT = re.compile("[\x00\ud800-\udfff]")  # JSON can hide them behind \\u


def _check_text(value: Any) -> None:
    """Refuses NUL and lone surrogates, which no tokenizer can take."""
    if isinstance(value, str):
        if found := _BAD_TEXT.search(value):
            raise ValueError(
                "holds a NUL character"
                if found[0] == "\0"
                else "holds a lone surrogate, which is not valid Unicode"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def examples(source: Source, path: Path) -> Iterator[Example]:
    """Every row of the file as an example, or an error with file, line and row."""
    for index, (number, row) in enumerate(source.read(path)):
        where = f"{path}:{number}: row {index}"
        try:
            if not isinstance(row, dict):
                raise TypeError(f"is {_kind(row)}; expected an object with fields")
            _check_text(row)
            example = source.convert(row)
            if not example.question:
                raise ValueError("has an empty question")
        except KeyError as error:
            raise GrpoError(f"{where} has no field {error}") from None
        except (TypeError, ValueError) as error:
            raise GrpoError(f"{where} {error}") from None
        yield example


# -- the sets ----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a set lies and how it is read."""

    slug: str
    file: str  # below the data directory
    read: Callable[[Path], Iterator[tuple[int, Row]]]
    convert: Callable[[Row], Example]
    url: str = ""  # "": nowhere to download it from
    sha256: str = ""


GITHUB = "https://raw.githubusercontent.com"
_GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
_CMATH = "deepseek-ai/DeepSeek-Math/b8b0f8ce093d80bf8e9a641e44142f06d092c305"
_MGSM = "google-research/url-nlp/452a21ad3dae5668c06ceeac21ff073e1e40f9be/mgsm"
_SVAMP = "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
_MAWPS = "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
# (set, split): file, reader, converter, address on GitHub, SHA-256. MATH has no
# address: a takedown notice of its owner removed it from the hub.
_TABLE: dict[tuple[str, str], tuple] = {
    ("gsm8k", "train"): (
        "gsm8k/train.jsonl",
        _json_lines,
        _gsm8k,
        f"{_GSM8K}/grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    ("gsm8k", "test"): (
        "gsm8k/test.jsonl",
        _json_lines,
        _gsm8k,
        f"{_GSM8K}/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    ("math", "train"): ("math/train.jsonl", _json_lines, _math),
    ("math", "test"): ("math/test.jsonl", _json_lines, _math),
    ("math500", "test"): ("math/math500.jsonl", _json_lines, _math),
    ("cmath", "test"): (
        "cmath/test.jsonl",
        _json_lines,
        _cmath,
        f"{_CMATH}/evaluation/datasets/cmath/test.jsonl",
        "cabe17c127c3227912b3384f4755e180f3aa0d9e5865677e7e5e223439bf15eb",
    ),
    ("svamp", "test"): (
        "svamp/SVAMP.json",
        _json_list,
        _svamp,
        f"{_SVAMP}/SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    ),
    ("mawps", "test"): (
        "mawps/test.jsonl",
        _json_lines,
        _mawps,
        f"{_MAWPS}/data/mawps/test.jsonl",
        "00ffe31161be8623a3d36741830edbba87a3aee0109f693810fe40b9d5d91b8b",
    ),
}
for _language, _sha256 in {
    "de": "4dfea30fede44b813e2e496f5f0534049e83c7cc8aed6e00600b30ec62053626",
    "en": "50021d0f28cc957edcb44e7806425b1c7fbd648ddcb9e0a8ec689d10e57d40fa",
    "es": "5bd27ebdf00140cec845c5298dc17715f5cd57d8edda6df1976db40bf3f0750a",
    "fr": "36207c1c03fd7cd3ea491441eb755408199f94e4a647851df531bbaedc99d606",
    "ja": "59a2b50debe77981fd784cb3b2bef1505e3abf2a37116dc9d7a366ab029b4637",
    "zh": "b2fa63151022370a0de1f4211c8c284eae74b0f5a3b003b1d5982c0d4a73f661",
}.items():
    _file = f"mgsm_{_language}.tsv"
    _TABLE[f"mgsm_{_language}", "test"] = (
        f"mgsm/{_file}",
        _tsv,
        _mgsm(_language),
        f"{_MGSM}/{_file}",
        _sha256,
    )
SOURCES = {
    (name, split): Source(f"{name}-{split}", *fields)
    for (name, split), fields in _TABLE.items()
}


def is_file(name: str) -> bool:
    """Whether the name of a set is the path of a user's own file."""
    return name.endswith(".jsonl")


def local(name: str) -> Source:
    """A user's own JSON-lines file."""
    return Source("jsonl", name, _json_lines, _local)


def find(name: str, split: str) -> Source:
    if (name, split) in SOURCES:
        return SOURCES[name, split]
    splits = [s for n, s in SOURCES if n == name]
    if splits:
        raise GrpoError(
            f"data {name!r}: no split {split!r}; it has {' and '.join(splits)}"
        )
    names = sorted({n for n, _ in SOURCES})
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise GrpoError(
        f"data {name!r}: no such set; {hint}give the path of a .jsonl file or one of "
        f"{', '.join(names)}"
    )
