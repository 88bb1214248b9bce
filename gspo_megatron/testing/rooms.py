"""The rooms of the package and their floors. tests/test_layers.py checks the imports; tools/draw_rooms.py draws them.

A room is a folder of the package, or a command: the files directly in the package are commands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "gspo_megatron"
FOLDER = Path(__file__).parents[1]

COMMANDS = ("train", "evaluate", "score", "serve", "convert", "report", "doctor")
LAYERS = (
    (*COMMANDS, "testing"),
    ("build",),
    ("run", "mcore"),
    ("rollout", "layout", "monitor"),
    ("data", "rewards", "environments", "objective", "log_probs", "checkpoint", "device", "config"),
    ("models",),
    ("base",),
)
"""Top to bottom. A file imports its own room and rooms on lower floors."""

HEIGHT = {room: -depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def package_files() -> dict[str, Path]:
    """The package's Python files by their path relative to it, such as `run/trainer.py`."""
    return {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*.py"))}


def room_of(file: str) -> str:
    """`run/trainer.py` -> `run`, `train.py` -> `train`."""
    return file.split("/")[0].removesuffix(".py")


def imports(file: str, source: str) -> Iterator[tuple[str, bool]]:
    """(module, whether the import is inside a function). `from a import b` gives `a.b`, which may be a module."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    folder = [PACKAGE, *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = [*folder[: len(folder) - node.level + 1], node.module] if node.level else [node.module]
            names = [".".join([*filter(None, origin), alias.name]) for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def imports_of_rooms(file: str, source: str) -> Iterator[tuple[str, str]]:
    """(room, module) for every import of another room. The package itself, which holds the version, is not a room."""
    for name, _ in imports(file, source):
        root, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if root == PACKAGE and room not in ("", "__version__", room_of(file)):
            yield room, name
