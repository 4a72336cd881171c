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
from collections.abc import Iterable, Iterator, Mapping

from grpo_jax.plan.loop_trip_counts import conditional_share, loop_trip_count

_BITS = {"pred": 8, "c64": 64, "c128": 128}  # of types that do not end in theirs
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
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
    inside: str  # the operands, or the value of a constant
    text: str  # what follows the operands

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def find(self, pattern: str) -> str:
        """Returns the first group of a pattern in the text; "" if it is not there."""
        found = re.search(pattern, self.text)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value`; "" if it is absent."""
        return self.find(rf"\b{name}=%?([\w.\-]+)")

    @property
    def scope(self) -> str:
        """The path of `jax.named_scope`s that it was traced in."""
        return self.find(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: named computations, and the name of the one that is its entry."""

    computations: dict[str, dict[str, Instruction]]  # each by its instructions' names
    roots: dict[str, Instruction]  # of each computation, the one whose value it returns
    entry: str


def parse_module(text: str) -> Module:
    """Reads the text of a program.

    >>> module = parse_module('''
    ... ENTRY main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} add(%x, %x)
    ... }''')
    >>> module.entry, [i.op for i in module.computations["main"].values()]
    ('main', ['parameter', 'add'])
    """
    module = Module({}, {}, "")
    current = entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head.group(2)
            module.computations[current] = {}
            entry = current if head.group(1) else entry
        elif current and (found := _LINE.match(line)):
            root, name, rest = found.groups()
            instruction = _parse_instruction(name, rest)
            module.computations[current][name] = instruction
            if root:
                module.roots[current] = instruction
    return dataclasses.replace(module, entry=entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing_bracket(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing_bracket(rest, len(op))
    return Instruction(name, shape, op, rest[len(op) + 1 : close], rest[close:])


def _closing_bracket(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def array_sizes(shape: str) -> list[int]:
    """Returns the size in bytes of each array of a written shape.

    >>> array_sizes("(bf16[4,128]{1,0:T(8,128)(2,1)}, u32[])")
    [1024, 4]
    """
    return [
        -(-math.prod(map(int, filter(None, sizes.split(",")))) * _bits(*kind) // 8)
        for *kind, sizes in _SHAPE.findall(shape)
    ]


def _bits(kind: str, digits: str) -> int:
    return _BITS.get(kind, int(digits or 0))


def count_runs(module: Module, trips: Mapping[str, float]) -> dict[str, float]:
    """Returns how often each computation runs in one run of the program.

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
    for i in module.computations[name].values():
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
    """Returns how often a loop runs, by XLA, by its condition, or by its scope.

    Raises:
      KeyError: neither of the first two is there, and `trips` lacks its scope.
    """
    known = loop.find(r'known_trip_count[":{\s]+n[":\s]+(\d+)')
    if known:
        return float(known)
    counted = _length_of_range(module, computation, loop)
    if counted is not None:
        return counted
    return loop_trip_count(loop.scope or loop.name, trips)


def _length_of_range(
    module: Module, computation: str, loop: Instruction
) -> float | None:
    """Returns the length of a counted loop; None if its stop is no constant.

    A start or a step that is not found counts as 0 or 1.
    """
    condition, body = loop.attribute("condition"), loop.attribute("body")
    test = module.roots.get(condition)
    if test is None or test.op != "compare" or "direction=LT" not in test.text:
        return None
    sides = _operands(module, condition, test)
    stop = _constant(sides)
    index = next((i.attribute("index") for i in sides if i.attribute("index")), None)
    if index is None or stop is None:
        return None
    start = step = None
    for made in _operands(module, computation, loop):
        first = _element(module, computation, made, int(index))
        while first and first[0].op in ("copy", "bitcast"):
            first = _operands(module, computation, first[0])
        start = _constant(first)
    for added in _element(module, body, module.roots[body], int(index)):
        if added.op == "add":
            step = _constant(_operands(module, body, added))
    return float(max(0, -(-(stop - (start or 0)) // (step or 1))))


def _operands(
    module: Module, computation: str, instruction: Instruction
) -> list[Instruction]:
    lines = module.computations[computation]
    return [lines[name] for name in instruction.operands if name in lines]


def _element(
    module: Module, computation: str, made: Instruction, index: int
) -> list[Instruction]:
    """Returns the element of a tuple, alone in a list; [] if it is no tuple."""
    operands = _operands(module, computation, made) if made.op == "tuple" else []
    return operands[index : index + 1]


def _constant(instructions: Iterable[Instruction]) -> int | None:
    """Returns the value of the first constant among these instructions."""
    return next((int(i.inside) for i in instructions if i.op == "constant"), None)


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
    """Returns the bytes that a device sends in one run of a program.

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
    for name, computation in module.computations.items():
        for i in computation.values():
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES and times[name]:
                moved = bytes_sent(i, kind, group_size(i, devices))
                sent[kind] = sent.get(kind, 0.0) + times[name] * moved
    return sent


def bytes_sent(instruction: Instruction, kind: str, n: int) -> float:
    """Returns the bytes that a device sends in one collective over n devices."""
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
