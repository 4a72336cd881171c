"""Counts the bytes between devices from the text of a compiled program.

The text (`compiled.as_text()`) is the program of one device, in XLA's HLO. Each
collective counts as often as the loops around it run. The length of a loop is read from
the text where it is a constant; otherwise the caller gives it, by the name of the
loop's scope (`jax.named_scope`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from grpo_jax.plan.loop_trip_counts import conditional_share, loop_trip_count

_BYTES = {"pred": 1, "c64": 8, "c128": 16}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # as written, with its layout
    op: str
    operands: tuple[str, ...]
    text: str  # what follows the operands
    root: bool
    literal: str = ""  # of a constant or a parameter

    def attribute(self, name: str) -> str:
        """The value of `name=value`; "" if it is absent."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else ""

    @property
    def scope(self) -> str:
        """The path of `jax.named_scope`s that it was traced in."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: named computations, and the name of the one that is its entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    def find_instruction(self, computation: str, name: str) -> Instruction | None:
        """The instruction of this name; None if there is none."""
        lines = self.computations.get(computation, ())
        return next((i for i in lines if i.name == name), None)

    def root_instruction(self, computation: str) -> Instruction | None:
        """The instruction whose value the computation returns."""
        lines = self.computations.get(computation, ())
        return next((i for i in lines if i.root), None)


def parse_module(text: str) -> Module:
    """Reads the text of a program.

    >>> module = parse_module('''
    ... ENTRY main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} add(%x, %x)
    ... }''')
    >>> module.entry, [i.op for i in module.computations["main"]]
    ('main', ['parameter', 'add'])
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _LINE.match(line)):
            current.append(_parse_instruction(*found.groups()))
    return Module(computations, entry)


def _parse_instruction(root: str | None, name: str, rest: str) -> Instruction:
    end = _closing_bracket(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing_bracket(rest, len(op))
    inside = rest[len(op) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, op, operands, rest[close:], bool(root), inside)


def _closing_bracket(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def array_sizes(shape: str) -> list[int]:
    """The size in bytes of each array of a written shape.

    >>> array_sizes("(bf16[4,128]{1,0:T(8,128)(2,1)}, u32[])")
    [1024, 4]
    """
    found = []
    for kind, numbers in _SHAPE.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = (
            8 * _BYTES[kind] if kind in _BYTES else int(digits.group()) if digits else 0
        )
        count = 1
        for n in filter(None, numbers.split(",")):
            count *= int(n)
        found.append(-(-count * bits // 8))
    return found


def count_runs(module: Module, trips: Mapping[str, float]) -> dict[str, float]:
    """How often each computation runs in one run of the program.

    Every branch of a conditional counts as taken, or by its share in `trips`.

    Args:
      module: the program.
      trips: scope → trip count, of the loops whose length is a value.

    Returns:
      computation → runs.

    Raises:
      KeyError: the length of a loop is neither in the program nor in `trips`.
    """
    total: dict[str, float] = dict.fromkeys(module.computations, 0.0)
    for name, times in _called_computations(module, module.entry, 1.0, trips):
        total[name] += times
    return total


def _called_computations(
    module: Module, name: str, times: float, trips: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    yield name, times
    for i in module.computations.get(name, ()):
        if i.op == "while":
            inner = times * loop_length(module, name, i, trips)
        elif i.op == "conditional":
            inner = times * conditional_share(i.scope, trips)
        else:
            inner = times
        branches = _BRANCHES.findall(i.text)
        taken = [b.strip().lstrip("%") for x in branches for b in x.split(",")]
        for called in [*_CALLS.findall(i.text), *taken]:
            if called in module.computations:
                yield from _called_computations(module, called, inner, trips)


def loop_length(
    module: Module, computation: str, loop: Instruction, trips: Mapping[str, float]
) -> float:
    """How often a loop runs: as XLA states it, as its condition says, or by its scope.

    Raises:
      KeyError: neither of the first two is there, and `trips` lacks its scope.
    """
    known = re.search(r'known_trip_count[":{\s]+n[":\s]+(\d+)', loop.text)
    if known:
        return float(known.group(1))
    counted = _length_of_range(module, computation, loop)
    if counted is not None:
        return counted
    return loop_trip_count(loop.scope or loop.name, trips)


def _length_of_range(
    module: Module, computation: str, loop: Instruction
) -> float | None:
    """The length of `for i in range(start, stop, step)`; None if stop is no constant.

    A start or a step that is not found counts as 0 or 1.
    """
    condition, body = loop.attribute("condition"), loop.attribute("body")
    test = module.root_instruction(condition)
    if test is None or test.op != "compare" or "direction=LT" not in test.text:
        return None
    index = stop = None
    for operand in test.operands:
        where = module.find_instruction(condition, operand)
        if where is not None and where.op == "constant":
            stop = int(where.literal)
        elif where is not None and where.op == "get-tuple-element":
            index = int(where.attribute("index"))
    if index is None or stop is None:
        return None
    start = _start_of_range(module, computation, loop.operands[0], index)
    step = _step_of_range(module, body, index)
    return float(max(0, -(-(stop - (start or 0)) // (step or 1))))


def _start_of_range(module: Module, computation: str, tuple_name: str, index: int):
    made = module.find_instruction(computation, tuple_name)
    if made is None or made.op != "tuple":
        return None
    value = module.find_instruction(computation, made.operands[index])
    while value is not None and value.op in ("copy", "bitcast"):
        value = module.find_instruction(computation, value.operands[0])
    return int(value.literal) if value is not None and value.op == "constant" else None


def _step_of_range(module: Module, body: str, index: int) -> int | None:
    root = module.root_instruction(body)
    if root is None or root.op != "tuple":
        return None
    value = module.find_instruction(body, root.operands[index])
    if value is None or value.op != "add":
        return None
    for operand in value.operands:
        added = module.find_instruction(body, operand)
        if added is not None and added.op == "constant":
            return int(added.literal)
    return None


def group_size(instruction: Instruction, devices: int) -> int:
    """Returns how many devices take part in a collective together.

    XLA writes groups as a list of lists, as their shape (an iota), or in newer
    versions as axes of a mesh, `'a'`, or `'a':(1)2` for a part of one.

    Raises:
      ValueError: a form that this does not know.
    """
    text = instruction.text
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        mesh, axes = found.groups()
        of = dict(re.findall(r"'([^']*)'=(\d+)", mesh))
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes)
        return math.prod(int(part or of[name]) for name, part in parts)
    if found := re.search(r"replica_groups=(?!\{\})\S+", text):
        raise ValueError(f"{instruction.name}: {found.group()}: a form not known here")
    return devices


def collective_bytes(
    text: str, devices: int, trips: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Bytes that a device sends in one run of a program.

    Over n devices in a ring, an all-gather sends (n-1)/n of its result, a
    reduce-scatter and an all-to-all (n-1)/n of their operand, an all-reduce twice that.

    Args:
      text: the compiled program (`compiled.as_text()`).
      devices: how many devices run it.
      trips: scope → trip count, of the loops whose length is a value.

    Returns:
      kind of collective → bytes.

    Raises:
      KeyError: the length of a loop is neither in the text nor in `trips`.
    """
    module = parse_module(text)
    times = count_runs(module, trips or {})
    sent: dict[str, float] = {}
    for name, instructions in module.computations.items():
        for i in instructions:
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES and times[name]:
                moved = bytes_sent(i, kind, group_size(i, devices))
                sent[kind] = sent.get(kind, 0.0) + times[name] * moved
    return sent


def bytes_sent(instruction: Instruction, kind: str, n: int) -> float:
    """Bytes that a device sends in one collective of this kind over n devices."""
    arrays = array_sizes(instruction.shape)
    if instruction.op.endswith("-start") and kind in (
        "all-gather",
        "collective-permute",
    ):
        out = max(arrays)  # the operand is among them
    else:
        out = sum(arrays)
    if kind in ("collective-permute", "collective-broadcast"):
        return out
    share = (n - 1) / n
    if kind == "all-reduce":
        return 2 * share * out
    if kind == "reduce-scatter":
        return share * out * n
    return share * out
