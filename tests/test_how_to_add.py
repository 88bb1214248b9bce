"""Every diff of docs/how_to_add.md applies to this tree, and the commands below it pass with it and fail without."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/how_to_add.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Addition(NamedTuple):
    """A diff of the page, the section it is in, and the commands that check it."""

    section: str
    diff: str
    commands: list[str]

    @property
    def new_files(self) -> list[str]:
        return re.findall(r"^--- /dev/null\n\+\+\+ b/(.+)$", self.diff, re.MULTILINE)


def additions(page: str) -> list[Addition]:
    blocks = list(BLOCK.finditer(page))
    assert [block[1] for block in blocks] == ["diff", "bash"] * (len(blocks) // 2), "a diff is followed by its commands"
    return [
        Addition(page[page.rindex("\n## ", 0, diff.start()) :].split("\n")[1][3:], diff[2], commands[2].splitlines())
        for diff, commands in zip(blocks[::2], blocks[1::2], strict=True)
    ]


def run(command: list[str], folder: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """In a copy of the tree, whose code comes before that of the environment."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    # A copy below another repository would have git apply paths to that one.
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    return subprocess.run(command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True)


def check(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "python", f"{command!r}: the page writes its commands with python"
    return run([sys.executable, *arguments], folder)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the tree is unknown")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture
def tree(tracked: list[str], tmp_path: Path) -> Path:
    """A copy of the tree."""
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


@pytest.mark.parametrize("addition", additions(PAGE), ids=lambda addition: addition.section)
def test_it_applies_and_is_checked(addition: Addition, tree: Path) -> None:
    assert addition.commands
    # A command that runs a new test file cannot pass without it.
    if not any(file in addition.commands[0] for file in addition.new_files):
        assert check(addition.commands[0], tree).returncode != 0, f"passes without the diff: {addition.commands[0]}"
    applied = run(["git", "apply", "-"], tree, addition.diff)
    assert applied.returncode == 0, applied.stderr
    for command in addition.commands:
        done = check(command, tree)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_a_diff_without_a_command_is_found() -> None:
    with pytest.raises(AssertionError, match="followed by its commands"):
        additions("```diff\n+x\n```\n")
