"""vLLM in the run's own processes: the rollouts, losses and weights of the product's own sampler to the last bit, also
with two processes to an engine, and after a stop in the middle of a run."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gspo_megatron.rollout.weight_channels import SHARED
from gspo_megatron.testing.commands import metrics, rollouts, torchrun
from gspo_megatron.testing.time_limits import time_factor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)

from tests.engine.test_served import OWN, SETTINGS, STEPS, pytestmark, weights_in  # noqa: F401

COLOCATED = ("rollout.engine=vllm_colocated", "train.warm_start_steps=40")


def trained(directory: Path, *settings: str) -> Path:
    status, output = torchrun(2, [*SETTINGS, f"run.dir={directory}", *COLOCATED, *settings], timeout_s=300)
    assert status == 0, output[-5000:]
    return directory


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("own") / "run", *OWN)


def assert_equal(run: Path, own: Path) -> None:
    assert len(rollouts(own)) == STEPS
    for of_engine, of_sampler in zip(rollouts(run), rollouts(own), strict=True):
        assert len(of_engine) == 64
        assert [r["tokens"] for r in of_engine] == [r["tokens"] for r in of_sampler]
    for row, of_own in zip(metrics(run)[1:], metrics(own)[1:], strict=True):
        assert (row["loss"], row["grad_norm"]) == (of_own["loss"], of_own["grad_norm"])
        assert row["grad_norm"] > 0
        assert 0 < row["engine/probe_gap"] < 1e-5
        assert abs(row["sampler/kl"]) < 1e-5
    for name, tensor in weights_in(own).items():
        assert torch.equal(weights_in(run)[name], tensor), name


def test_two_processes_are_one_engine(own: Path, tmp_path: Path) -> None:
    before = set(SHARED.iterdir())
    assert_equal(trained(tmp_path / "run", "engine.tensor_parallel=2"), own)
    assert not [path for path in set(SHARED.iterdir()) - before if "cpushm" in path.name]


def test_every_process_is_an_engine_and_a_stopped_run_continues(own: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = [*SETTINGS, f"run.dir={directory}", *COLOCATED, f"train.steps={STEPS}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gspo_megatron.train", *arguments]
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(command, stdout=log, stderr=log)
    until = time.monotonic() + 300 * time_factor()
    while not (directory / "rollouts" / "step_000001.jsonl").exists():
        assert program.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-5000:]
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    program.wait(120 * time_factor())
    done = len(rollouts(directory))
    assert done < STEPS, "the signal came too late for this test"
    trained(directory, "checkpoint.load=latest")
    assert_equal(directory, own)


def test_a_wrong_engine_stops_all_processes(tmp_path: Path) -> None:
    """A limit that no two programs keep."""
    settings = [*SETTINGS, f"run.dir={tmp_path / 'run'}", *COLOCATED, "engine.probe_limit=1e-12", "train.steps=1"]
    status, output = torchrun(2, [*settings, "train.warm_start_steps=1"], timeout_s=300)
    assert status != 0
    assert "the engine in process 0: it does not compute with the trainer's weights" in output
    assert "status 70" in output or "exitcode  : 70" in output, output[-3000:]
