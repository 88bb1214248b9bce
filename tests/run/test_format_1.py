"""Checkpoints of format 1 can still be continued, with a warning that names their version.

tests/checkpoint/format_1 holds one between two steps and one inside a step, and the metrics of the run that was not
stopped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gspo_megatron.monitor.catalogue import OF_THE_MACHINE
from gspo_megatron.testing.commands import forked, metrics

WRITTEN = Path(__file__).parents[1] / "checkpoint" / "format_1"


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", ["step_000002", "step_000002_update_001"])
def test_a_run_continues_from_the_first_format(name: str, num_processes: int, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)
    arguments = ["--config", str(WRITTEN / "config.yaml"), f"run.dir={tmp_path / 'run'}", "checkpoint.load=latest"]
    for status, errors in forked(num_processes, [*arguments, f"parallel.ep={num_processes}"]):
        assert status == 0, errors
    expected = [json.loads(line) for line in (WRITTEN / "metrics.jsonl").read_text().splitlines()][3:]
    found = metrics(tmp_path / "run")
    assert [row["step"] for row in found] == [3, 4]
    for row, same in zip(found, expected, strict=True):
        for key in row.keys() & same.keys():  # metrics that came later have no expected value
            assert row[key] == pytest.approx(same[key], rel=1e-3, abs=1e-5), f"step {row['step']}, {key}"
        assert not [key for key in same.keys() - row.keys() if not key.startswith(OF_THE_MACHINE)]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_000004" / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["written_by"]


def test_an_older_checkpoint_says_which_version_wrote_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from gspo_megatron.train import main

    name = "step_000002"
    shutil.copytree(WRITTEN / "checkpoints" / name, tmp_path / "checkpoints" / name)
    command = ["--config", str(WRITTEN / "config.yaml"), f"run.dir={tmp_path}", "checkpoint.load=latest"]
    assert main([*command, "train.steps=2", "logging.tensorboard=false"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"{name} has format 1, written by gspo_megatron 0.1.0; it is loaded, and the next save has format 2" in said
