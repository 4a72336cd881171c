"""Files of completions: written batch by batch, or made elsewhere and read.

A file has one JSON object a line:

    {"set": "gsm8k", "id": "gsm8k/test/7", "completions": ["… \\\\boxed{18}"]}

    set           a name as in --sets; optional if there is only one set
    id            the question: set/split/row from 0, or the set's own id
    index         instead of id: the question's row, from 0
    question      instead of id: the question's text
    completions   a list of texts, or `completion` with one; further lines of a question
                  add samples
    mode          "cot" (default) or "tool"
    temperature   0 is greedy; by default one completion is greedy, several are not

Other fields are ignored. The files that `CompletionLog` writes begin with a line
{"settings": …}, which readers skip, and hold the answers; they may be concatenated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.data.example import Example
from grpo_jax.data.parsers import json_lines
from grpo_jax.distributed import processes
from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import to_json, write_whole

Key = tuple[str, str]  # mode, and greedy or sampled
KINDS = ("greedy", "sampled")


class Completion(NamedTuple):
    """One completion of a question."""

    text: str
    cut_off: bool | None = None  # it reached the length limit; None: not known


class Group(NamedTuple):
    """Completions of every question of a set, in one mode at one temperature."""

    completions: list[list[Completion]]
    temperature: float | None  # None: not known


Rows = dict[int, list[Completion]]  # by the question's place in its set
_Lines = dict[tuple[int, ...], list[list[Completion]]]


def completions_file_name(name: str, mode: str, kind: str) -> str:
    """Returns the name of the file of a set's completions.

    >>> completions_file_name("data/my questions.jsonl", "cot", "greedy")
    'data_my_questions.jsonl.cot.greedy.jsonl'
    """
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '_', name)}.{mode}.{kind}.jsonl"


class CompletionLog:
    """One model's completions of one set, appended a batch at a time.

    A line that a kill cut off at the end of the file is dropped. If there are several
    processes, the first writes and all read; they must see the same rows before any
    question is asked.

    Args:
      file: created, with its folder, if it does not exist.
      settings: everything that the completions depend on.
      restart: replace a file of other settings, instead of raising.

    Attributes:
      rows: the completions that the file has, by the question's place in its set.

    Raises:
      GrpoError: the file has other settings or a damaged line, or the processes do not
        share it.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], *, restart: bool):
        self.file = file
        self.rows: Rows = {}
        self.settings = json.loads(json.dumps(settings))
        if processes.is_first_process():
            self._open(restart)
        if processes.process_count() > 1:
            self._share()

    def _open(self, restart: bool) -> None:
        file = self.file
        if file.exists() and self._read(restart):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_json({"settings": self.settings}))

    def _share(self) -> None:
        there = processes.broadcast(lambda: sorted(self.rows))
        if there and not processes.is_first_process() and self.file.exists():
            self._read(restart=False)
        if sorted(self.rows) != there:
            raise GrpoError(
                f"{self.file}: process {processes.process_index()} does not see what "
                "process 0 wrote there; choose a folder on a disk that all of them "
                "share"
            )

    def _read(self, restart: bool) -> bool:
        """Reads the rows; returns False if the file has to be started again."""
        whole = self.file.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(self.file, end)
        lines = json_lines(self.file)
        _, first = next(lines, (1, None))
        before = first.get("settings") if isinstance(first, dict) else None
        if before != self.settings:
            if restart or not end:
                return False
            raise GrpoError(f"{self.file}: {_difference(before, self.settings)}")
        for number, row in lines:
            found = _parse_log_line(row)
            if found is None:
                raise GrpoError(
                    f"{self.file}:{number}: not a line of this file's making; delete "
                    "the file to ask all its questions again"
                )
            self.rows[found[0]] = found[1]
        return True

    def append(self, found: Mapping[int, Sequence[Completion]], examples, **more):
        """Appends a batch in one write, which is on disk when this returns.

        Args:
          found: completions by the question's place in the set.
          examples: the questions of the set.
          **more: further fields of each line.
        """
        lines = []
        for index, completions in found.items():
            if index in self.rows:  # the batch was written in part before a kill
                continue
            example = examples[index]
            row = {"index": index, "id": example.id, "question": example.question}
            row |= {"answer": example.answer}
            row |= {"completions": [c.text for c in completions]}
            row |= {"cut_off": [c.cut_off for c in completions]}
            lines.append(to_json(more | row))
            self.rows[index] = list(completions)
        if not processes.is_first_process():
            return
        with open(self.file, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _parse_log_line(row: Any) -> tuple[int, list[Completion]] | None:
    """Returns place and completions of a line of `CompletionLog`, or None."""
    try:
        index, completions = row["index"], _completions(row)
    except (KeyError, TypeError, ValueError):
        return None
    whole = type(index) is int and index >= 0
    cut_off = [c.cut_off for c in completions]
    return (index, completions) if whole and row.get("cut_off") == cut_off else None


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return (
            "it is no file of this program's completions; take another --out, or "
            "move it away"
        )
    names = [n for n in {**now, **before} if before.get(n) != now.get(n)]
    shown = ", ".join(f"{n} {before.get(n)!r} → {now.get(n)!r}" for n in names)
    return (
        f"made with other settings ({shown}); take another --out, or delete the file "
        "to ask its questions again"
    )


# -- files made elsewhere --------------------------------------------------------------


def read_completions(
    file: Path, sets: Mapping[str, Sequence[Example]], *, questions: int = 0
) -> dict[str, dict[Key, Group]]:
    """Reads a file of completions.

    Args:
      file: JSON lines, as described at the top of the file.
      sets: the questions of each set, by its name.
      questions: how many questions of each set must be answered, the first ones; 0
        means all.

    Returns:
      set → (mode, "greedy" or "sampled") → completions of every question, in order.

    Raises:
      GrpoError: a line cannot be used, or a set is not answered completely.
    """
    places = {name: _places(examples) for name, examples in sets.items()}
    # set → (mode, temperature) → the places that a line answers → its completions
    found: dict[str, dict[tuple[str, float | None], _Lines]] = {n: {} for n in sets}
    others: set[str] = set()
    for number, row in json_lines(file):
        if isinstance(row, dict) and set(row) == {"settings"}:
            continue
        try:
            name = _set(row, sets)
            if name not in sets:
                others.add(name)
                continue
            group = (_mode(row), _temperature(row))
            completions = _completions(row)
            where = tuple(_questions(row, places[name], name))
            found[name].setdefault(group, {}).setdefault(where, []).append(completions)
        except ValueError as error:
            raise GrpoError(f"{file}:{number}: {error}") from None
    result: dict[str, dict[Key, Group]] = {}
    for name, examples in sets.items():
        if not found[name]:
            known = ", ".join(map(one_line, sorted(others)[:8]))
            has = f"; it has {known}" if others else ""
            raise GrpoError(f"{file}: no completions of the set {name}{has}")
        result[name] = {}
        for (mode, temperature), lines in found[name].items():
            rows = _share(lines)
            every, samples = _complete(file, name, rows, examples[: questions or None])
            greedy = temperature == 0 or (temperature is None and samples == 1)
            key = mode, KINDS[not greedy]
            if key in result[name]:
                raise GrpoError(
                    f"{file}: set {name}: {mode} completions at several temperatures; "
                    "give a file for each"
                )
            result[name][key] = Group(every, 0.0 if greedy else temperature)
    return result


def _share(lines: _Lines) -> Rows:
    """Returns each place's completions; repeated questions share lines in turn."""
    rows: Rows = {}
    for places, answers in lines.items():
        for n, index in enumerate(places):
            for completions in answers[n :: len(places)] or answers[:1]:
                rows.setdefault(index, []).extend(completions)
    return rows


def _places(examples: Sequence[Example]) -> dict[tuple[str, Any], list[int]]:
    places: dict[tuple[str, Any], list[int]] = {}
    for index, example in enumerate(examples):
        places[("index", index)] = [index]
        if example.id:
            places.setdefault(("id", example.id), []).append(index)
        text = " ".join(example.question.split())
        places.setdefault(("question", text), []).append(index)
    return places


def _set(row: Any, sets: Mapping[str, Any]) -> str:
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    if "set" in row:
        if not isinstance(row["set"], str):
            raise ValueError(f"set {one_line(repr(row['set']))} is not a name")
        return row["set"]
    if len(sets) > 1:
        raise ValueError("no 'set', and --sets names several")
    return next(iter(sets))


def _mode(row: Mapping[str, Any]) -> str:
    mode = row.get("mode", "cot")
    if mode not in ("cot", "tool"):
        raise ValueError(f"mode {one_line(repr(mode))} is neither 'cot' nor 'tool'")
    return mode


def _temperature(row: Mapping[str, Any]) -> float | None:
    value = row.get("temperature")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= 1e6:
        shown = one_line(repr(value))
        raise ValueError(f"temperature {shown} is not a number from 0 to 1e6")
    return float(value)


def _completions(row: Mapping[str, Any]) -> list[Completion]:
    if ("completion" in row) == ("completions" in row):
        raise ValueError("give either 'completion' or 'completions'")
    texts = row["completions"] if "completions" in row else [row["completion"]]
    if not isinstance(texts, list) or not texts:
        raise ValueError("'completions' is not a list with one text or more")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a completion is not a text")
    cut = row.get("cut_off")
    known = isinstance(cut, list) and all(c in (True, False, None) for c in cut)
    if not known or len(cut) != len(texts):
        cut = [None] * len(texts)
    return list(map(Completion, texts, cut))


def _questions(
    row: Mapping[str, Any], places: Mapping[tuple[str, Any], list[int]], name: str
) -> list[int]:
    for field in ("id", "index", "question"):
        value = row.get(field)
        if value is None:
            continue
        if field == "question" and isinstance(value, str):
            value = " ".join(value.split())
        known = isinstance(value, str | int) and not isinstance(value, bool)
        if not known or (field, value) not in places:
            shown = ascii(value)[:80]
            raise ValueError(f"the set {name} has no question with {field} {shown}")
        return places[field, value]
    raise ValueError("none of 'id', 'index' and 'question' says which it answers")


def _complete(
    file: Path, name: str, rows: Rows, examples: Sequence[Example]
) -> tuple[list[list[Completion]], int]:
    missing = [i for i in range(len(examples)) if i not in rows]
    if missing:
        raise GrpoError(
            f"{file}: set {name}: {len(missing)} of {len(examples)} questions have no "
            f"completion (the first: index {missing[0]}, id {examples[missing[0]].id});"
            " add them, or ask for fewer by --questions"
        )
    every = [rows[i] for i in range(len(examples))]
    samples = len(every[0])
    uneven = next((i for i, row in enumerate(every) if len(row) != samples), None)
    if uneven is not None:
        raise GrpoError(
            f"{file}: set {name}: index {uneven} has {len(every[uneven])} completions "
            f"and index 0 has {samples}; every question needs as many"
        )
    return every, samples
