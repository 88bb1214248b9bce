"""Which modules of this repository a test reaches, read from the source text, so that nothing is imported to find out.

`make test-next` repeats the suite with another Megatron-Core. What never reaches Megatron cannot come out otherwise
there, and `--depends-on-megatron` (tests/conftest.py) leaves it out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FOLDERS = ("gspo_megatron", "benchmarks", "tools", "tests")
ALIKE = {
    # Whole runs: what is saved, loaded and continued is in tests/mcore/test_saving*.py, layouts in test_layouts.py.
    "test_kills.py": "signals, and commands that start again",
    "test_layouts.py": "runs on layouts, whose gradients and weights tools/test_layout_grid.py compares one by one",
    "test_lean_step.py": "what an update saves and overlaps; the gradients are in tools/test_layout_grid.py",
    "test_serve.py": "the command that keeps an engine up",
    "test_launching.py": "scripts that start commands",
    "test_readme.py": "commands as printed",
    "monitor/test_watchdog.py": "notes of processes that hang or end",
    "device/test_processes.py": "processes that do not meet",
    "device/test_torchrun.py": "torchrun's report",
    "config/test_declarations.py": "settings",
    "config/test_settings_are_read.py": "which settings a run reads",
    "rewards/test_code.py": "the sandbox of programs",
    "tools/test_plan_layout.py": "the planner, which test_measured_memory.py holds against Megatron",
    "layout/test_measured_memory.py": "the planner of memory, which is measured with the older one",
    # Tools: the scorer, the kernels and the comparison that they start have tests of their own, in tests/mcore,
    # tests/test_score.py and tests/tools/test_check_layout.py.
    "test_convert.py": "folders converted without Megatron; tests/mcore/test_hugging_face.py has what Megatron writes",
    "test_mutations.py": "whether the comparison of layouts notices faults",
    "tools/test_check_layout.py": "the command; tools/test_layout_grid.py has the comparison",
    "benchmarks/test_gpu_hour.py": "rehearsals",
    "benchmarks/test_numerics.py": "tables of several runs",
    "benchmarks/test_stability_tables.py": "tables of several runs",
    "benchmarks/test_ratio_spread.py": "tables of several runs",
}
"""Test files that reach Megatron-Core and ask nothing of it, and what they are about."""


def depends_on_megatron(test: Path) -> bool:
    """Whether a test file imports Megatron, itself or by way of our own modules, also in functions; or starts a command
    that does. Not those that are ALIKE with every Megatron."""
    alike = test.is_relative_to(TESTS) and test.relative_to(TESTS).as_posix() in ALIKE
    return not alike and "megatron" in reached(test)


def reached(file: Path) -> set[str]:
    """The top-level names of all packages that are not ours, which `file` imports or has imported."""
    outside, seen, coming = set(), {file}, [file]
    while coming:
        for name in _direct(coming.pop()):
            if path := _modules().get(name):
                coming += [path] if path not in seen else []
                seen.add(path)
            else:
                outside.add(name.split(".")[0])
    return outside


@cache
def _modules() -> dict[str, Path]:
    """The file of every module of ours. tools/ is on sys.path itself (pyproject.toml)."""
    found = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
        if parts[0] == "tools":
            found[name.removeprefix("tools.")] = path
    return found


@cache
def _direct(file: Path) -> frozenset[str]:
    """The modules that `file` names in its import statements, with the packages they are in; those of another package
    as they stand. `from a import b` counts as `a` and `a.b`."""
    tree = ast.parse(file.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = file.relative_to(ROOT).parent.parts if node.level else ()
            origin = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [node.module])])
            names.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
    names.update(_started(tree))
    # pytest puts the folder of a test on sys.path.
    siblings = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in file.parent.glob("*.py")}
    names = {siblings.get(name.split(".")[0], name) if file.is_relative_to(ROOT / "tests") else name for name in names}
    found = {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts) + 1)}
    # An attribute of one of our modules is no module.
    return frozenset(name for name in found if name in _modules() or name.split(".")[0] not in FOLDERS)


def _started(tree: ast.AST) -> Iterator[str]:
    """In a file that starts Python (sys.executable): our modules, and the scripts in tools/, that its texts name."""
    nodes = list(ast.walk(tree))
    if not any(isinstance(node, ast.Attribute) and node.attr == "executable" for node in nodes):
        return
    scripts = {path.name: name for name, path in _modules().items() if path.parent == ROOT / "tools"}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in _modules():
                yield node.value
            if name := scripts.get(node.value.split("/")[-1]):
                yield name
