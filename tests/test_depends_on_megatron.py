"""What `make test-next` leaves out: tests that no import leads to Megatron-Core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import ALIKE, ROOT, TESTS, depends_on_megatron, reached


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("mcore/test_model.py", "imports gspo_megatron.mcore"),
        ("mcore/test_optimizer.py", "imports a test beside it that does"),
        ("tools/test_layout_grid.py", "imports a tool that starts runs"),
        ("test_golden.py", "imports the command, which imports mcore in a function"),
        ("test_doctor.py", "starts the command"),
    ],
)
def test_what_reaches_megatron_is_repeated(file: str, how: str) -> None:
    assert depends_on_megatron(TESTS / file), how


@pytest.mark.parametrize("folder", ["objective", "data", "rewards", "rollout", "checkpoint", "models"])
def test_a_room_below_megatron_is_left_out(folder: str) -> None:
    assert not any(depends_on_megatron(file) for file in (TESTS / folder).glob("test_*.py"))


def test_others_that_have_nothing_to_show_there() -> None:
    assert not depends_on_megatron(TESTS / "test_packaging.py") and not depends_on_megatron(TESTS / "test_layers.py")
    assert not depends_on_megatron(TESTS / "run" / "test_trainer.py")
    # `make test-triton` runs those with every Triton.
    assert not any(depends_on_megatron(file) for file in (TESTS / "log_probs").glob("test_triton*.py"))
    assert {"torch", "numpy"} <= reached(TESTS / "run" / "test_trainer.py")


@pytest.mark.parametrize("file", ALIKE)
def test_what_is_alike_with_every_megatron_would_be_repeated_otherwise(file: str) -> None:
    assert "megatron" in reached(TESTS / file) and not depends_on_megatron(TESTS / file)


def test_the_option_leaves_files_out_unless_they_are_named() -> None:
    arguments = ["--depends-on-megatron", "tests/objective", "tests/device", "tests/rewards/test_rewards.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line.split("::")[0]).name for line in done.stdout.splitlines() if "::" in line}
    assert files == {"test_cpu.py", "test_rewards.py"}
