"""What a failed run says under a real torchrun: the error once, and last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_megatron.device import torchrun
from gspo_megatron.testing import commands
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[2]


def test_the_processes_of_a_node_say_a_message_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for rank, message in enumerate(["one", "one", "another", "one"]):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv(torchrun.ERROR_FILE, str(tmp_path / str(rank) / "error.json"))
        said.append(torchrun.leave_message(message))
    assert said == [True, False, True, False]
    left = [json.loads((tmp_path / str(rank) / "error.json").read_text())["message"] for rank in range(4)]
    assert [m["message"] for m in left] == ["one", "the same as the root cause below", "another", left[1]["message"]]
    assert int(left[1]["extraInfo"]["timestamp"]) > int(left[2]["extraInfo"]["timestamp"])


def test_without_torchrun_everything_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(torchrun.ERROR_FILE, raising=False)
    assert torchrun.leave_message("one") and torchrun.leave_message("one")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.hidden_size=0", "ConfigError: model.hidden_size=0 must be at least 1; the default is 64"),
        ("--stray", "ConfigError: unrecognized arguments: --stray"),
    ],
)
def test_a_user_error_is_printed_once_and_stands_last(tmp_path: Path, wrong: str, message: str) -> None:
    status, output = commands.torchrun(2, [f"run.dir={tmp_path}", "precision.device=cpu", wrong])
    assert status == 1
    printed, _, report = output.partition("FAILED")
    assert printed.count(message) == 1
    cause = report.partition("Root Cause")[2]
    assert message in cause and report.count(message) == 1


def test_the_command_alone_prints_its_usage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron.train"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60 * time_factor(),
    )
    assert done.returncode == 2
    assert "no settings" in done.stderr and "usage: gspo_megatron.train" in done.stderr
