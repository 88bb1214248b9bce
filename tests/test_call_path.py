"""docs/architecture.md: the call path is the stack of a real run, and the tree names every file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.objective import PolicyObjective
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.rooms import FOLDER, PACKAGE, package_files
from gspo_megatron.train import main

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MEGATRON = ("Megatron-Core", "")
SMALL = (
    "precision.device=cpu",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_experts=2",
    "model.max_sequence_length=24",
    "rollout.max_new_tokens=4",
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "algorithm.updates_per_rollout=1",
    "data.eval_size=2",
    "data.task.max_length=6",
    "data.tokenizer=characters:0123456789>",
    "algorithm.entropy_coef=0.01",  # every sequence takes part in the update, whatever its reward
    "train.steps=1",
    "train.warm_start_steps=0",
    "checkpoint.save_every=0",
    "logging.tensorboard=false",
)


def table() -> list[tuple[str, str]]:
    """(file, function) of every row of the table under "The call path"."""
    section = PAGE.read_text().partition("## The call path\n")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[2:4]] for line in section.splitlines() if "|" in line]
    return [(file, function) for file, function in rows if re.search(r"\.py$|^Megatron-Core$", file)]


def stack_of_a_run(arguments: list[str]) -> list[tuple[str, str]]:
    """(file, function) of the frames from `main` to the objective, in one process. The frames of Megatron-Core are one
    entry; those of other libraries are left out."""
    stacks: list[list[tuple[str, str]]] = []
    objective = PolicyObjective.__call__

    def recorder(self: PolicyObjective, *args: Any, **kwargs: Any) -> Any:
        code = objective.__code__
        frames = [named(code.co_filename, "PolicyObjective.__call__")]
        frame = sys._getframe(1)
        while frame.f_code is not main.__code__:
            owner = frame.f_locals.get("self")
            prefix = f"{type(owner).__qualname__}." if owner is not None else ""
            frames.append(named(frame.f_code.co_filename, prefix + frame.f_code.co_name))
            frame = frame.f_back
        frames.append(named(main.__code__.co_filename, "main"))
        stacks.append([f for f in frames[::-1] if f])
        return objective(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyObjective, "__call__", recorder)
        assert main(arguments) == 0
    first = stacks[0]
    assert all(stack == first for stack in stacks)
    return [f for i, f in enumerate(first) if f != MEGATRON or first[i - 1] != MEGATRON]


def named(path: str, function: str) -> tuple[str, str] | None:
    if Path(path).is_relative_to(FOLDER):
        return Path(path).relative_to(FOLDER).as_posix(), function
    return MEGATRON if "/megatron/core/" in path else None


def test_the_call_path_is_the_stack_of_a_run(tmp_path: Path) -> None:
    (stack,) = run_distributed(stack_of_a_run, 1, [*SMALL, f"run.dir={tmp_path}"], timeout_s=120, like_torchrun=True)
    assert table() == stack, "the table of docs/architecture.md on the left, the stack of a run on the right"


def test_the_tree_names_every_file() -> None:
    """Indented by two spaces a level; a line of a file ends in .py, that of a folder in /."""
    tree = PAGE.read_text().partition("## The tree\n")[2].partition("\n## ")[0]
    names, path = set(), {0: Path()}
    for indent, name in re.findall(r"^( *)([\w/]+(?:/|\.py))(?= |$)", tree, re.MULTILINE):
        path[len(indent) + 2] = here = path[len(indent)] / name
        if name.endswith(".py"):
            names.add(here.as_posix())
    files = {f"{PACKAGE}/{file}" for file in package_files() if not file.endswith("__init__.py")}
    files |= {f"tools/{path.name}" for path in (PAGE.parents[1] / "tools").glob("*.py")}
    assert names == files
