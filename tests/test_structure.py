"""The package's structure: which room may import from which, and no circles.

The imports are read from the source, lazy ones and those under TYPE_CHECKING too.
"""

import ast
import graphlib
import pathlib

import grpo_jax

PACKAGE = pathlib.Path(grpo_jax.__file__).parent
# Low to high: a room imports from those before it, and from nothing after it.
ROOMS = (
    "errors files arguments algorithms config_fields config distributed models data "
    "sandbox rewards checkpoints generation environments evaluation report training "
    "plan train census evaluate export convert"
).split()


def module_name(file: pathlib.Path) -> str:
    parts = ["grpo_jax", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imported_modules(name: str) -> set[str]:
    """The package's modules that a module imports, wherever in its source."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {x for x in found if x in MODULES and x not in ("grpo_jax", name)}


# The package's own __init__ names the public functions, which it imports when asked.
IMPORTS = {name: imported_modules(name) for name in MODULES if name != "grpo_jax"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_known_room():
    assert {room_of(name) for name in IMPORTS} == set(ROOMS)


def test_no_import_goes_upwards():
    rank = {room: i for i, room in enumerate(ROOMS)}
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if rank[room_of(other)] > rank[room_of(name)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_circle_of_modules():
    tuple(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError
