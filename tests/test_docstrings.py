"""Public functions say what they take, return and raise."""

import ast
import re
from collections.abc import Iterator

import pytest
from test_structure import MODULES, ROOMS, room_of

import grpo_jax

ARRAYS = ("Array", "ndarray", "Float[", "Int[", "Bool[", "Num[", "Shaped[")


class Function:
    """A function or method, with the class's docstring for __init__."""

    def __init__(self, path: str, node: ast.FunctionDef, owner: ast.ClassDef | None):
        self.path, self.node, self.method = path, node, owner is not None
        self.initial = owner is not None and node.name == "__init__"
        holder = owner if owner and self.initial else node
        self.docstring = ast.get_docstring(holder) or ""
        given = node.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        parameters += [x for x in (given.vararg, given.kwarg) if x]
        self.parameters = [x for x in parameters if x.arg not in ("self", "cls")]

    def public(self) -> bool:
        names = self.path.split(".")[: -1 if self.initial else None]
        return not any(name.startswith("_") for name in names)

    def takes_arrays(self) -> bool:
        kinds = [ast.unparse(x.annotation) for x in self.parameters if x.annotation]
        return any(name in kind for name in ARRAYS for kind in kinds)

    def raises(self) -> bool:
        """Whether its own code, not a nested function's, raises a GrpoError."""
        return any(
            isinstance(x, ast.Raise) and x.exc and "GrpoError" in ast.unparse(x.exc)
            for x in own_nodes(self.node)
        )


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from own_nodes(child)


def functions(module: str) -> Iterator[Function]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield Function(f"{module}.{node.name}", node, None)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    path = f"{module}.{node.name}.{inner.name}"
                    yield Function(path, inner, node)


PUBLIC = {room: [] for room in ROOMS}
for name in MODULES:
    if name != "grpo_jax":
        PUBLIC[room_of(name)] += [f for f in functions(name) if f.public()]


def without_docstring(f: Function, room: str) -> bool:
    return bool(f.parameters) and not f.docstring


def without_shapes(f: Function, room: str) -> bool:
    exported = not f.method and f.node.name in grpo_jax.__all__
    if f.initial or not (room in ("algorithms", "generation") or exported):
        return False
    if not f.takes_arrays() or f.docstring.startswith("Raises"):
        return False
    told = f.docstring.startswith("Returns") or "Returns:" in f.docstring
    kinds = [ast.unparse(x.annotation) for x in f.parameters if x.annotation]
    typed = all("Array, '" in k for k in kinds if any(a in k for a in ARRAYS))
    return not (told and (typed or "Args:" in f.docstring))


def without_raises(f: Function, room: str) -> bool:
    return f.raises() and not re.search(r"^Raises", f.docstring.strip(), re.M)


CHECKS = {
    "docstring": without_docstring,
    "shapes": without_shapes,
    "raises": without_raises,
}


@pytest.mark.parametrize("what", CHECKS)
def test_public_functions_say_what_they_take_return_and_raise(what):
    found = [
        f"{f.path}: {what}"
        for room in ROOMS
        for f in PUBLIC[room]
        if CHECKS[what](f, room)
    ]
    assert not found, "\n".join(found)
    assert sum(map(len, PUBLIC.values())) > 500  # it did find the package's functions
