"""An engine apart from its runs: the command serve with a real vLLM, which serves one run after another.

The engine listens where other machines would reach it, where this machine has such an address, and weights take that
way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.base.errors import EngineError
from gspo_megatron.device.private_group import own_address
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.http import Address, call, exchange
from gspo_megatron.rollout.lease import Lease
from gspo_megatron.rollout.weight_channels import SHARED, SharedFile
from gspo_megatron.rollout.weight_stream import pack
from gspo_megatron.testing.commands import metrics, rollouts, torchrun
from gspo_megatron.testing.time_limits import time_factor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)

ROOT = Path(__file__).parents[2]
TOKEN = "known-to-both"
SETTINGS = (
    *("model.preset=tiny_moe", "model.num_layers=2", "model.head_dim=32", "model.max_sequence_length=16"),
    *("model.init_std=0.08", "precision.device=cpu", "precision.dtype=fp32", "data.train=task:sort_digits"),
    *("data.task={min_length: 3, max_length: 4}", "data.tokenizer=characters:0123456789>", "data.eval_size=4"),
    *("rollout.engine=vllm", "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=6"),
    *("algorithm.updates_per_rollout=2", "train.steps=2", "train.warm_start_steps=20", "train.eval_every=0"),
    *("train.hf_at_end=on", "train.hf_dtype=fp32", "logging.rollouts_per_step=-1", "logging.tensorboard=false"),
)


def host() -> str:
    with contextlib.suppress(OSError):
        return own_address("198.51.100.1")
    return "127.0.0.1"


class Serving:
    """The command serve, while it runs."""

    def __init__(self, folder: Path) -> None:
        (folder / "run.yaml").write_text("{}")
        command = [sys.executable, "-m", "gspo_megatron.serve", "--config", str(folder / "run.yaml"), "--host", host()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GSPO_ENGINE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *SETTINGS, f"run.dir={folder / 'run'}"], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        try:
            first, said = self.process.stdout.readline(), self.process.stdout.readline()
            logs = "".join(path.read_text()[-3000:] for path in folder.glob("run/engine/*/engine.log"))
            assert said.startswith("ready: engine.addresses=[http://"), first + said + logs
        except BaseException:
            self.end()
            raise
        self.url = said.partition("[")[2].partition("]")[0]
        self.address = Address.of("engine", self.url, TOKEN)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        return call(self.address, method, route, body, timeout_s=60 * time_factor())


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("serving"))
    yield serving
    serving.end()


def trained(directory: Path, *settings: str) -> Path:
    config = directory.with_name(f"{directory.name}.yaml")
    config.write_text("{}")
    # Not forked: those ranks have the environment of an earlier moment.
    status, said = torchrun(1, ["--config", str(config), *SETTINGS, f"run.dir={directory}", *settings], 600)
    assert status == 0, said
    return directory


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the training model's own sampler."""
    return trained(tmp_path_factory.mktemp("own") / "run", "rollout.engine=collective")


def assert_same(run: Path, own: Path) -> None:
    drawn = [[[(r["tokens"], r["reward"]) for r in step] for step in rollouts(each)] for each in (run, own)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    for row, of_own in zip(metrics(run), metrics(own), strict=True):
        assert (row.get("loss"), row.get("grad_norm")) == (of_own.get("loss"), of_own.get("grad_norm"))


def test_a_run_over_an_engine_apart_is_that_of_the_own_sampler(
    serving: Serving, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSPO_ENGINE_TOKEN", TOKEN)
    run = trained(tmp_path / "run", f"engine.addresses=[{serving.url}]", "engine.channel=broadcast")
    assert_same(run, own)
    assert serving.ask("GET", "/weight_info") == {"weight_version": "4"}
    assert serving.ask("GET", "/is_paused") == {"is_paused": False}
    # Nothing of the engine was the run's to start.
    assert not (run / "engine").exists()


@pytest.mark.parametrize("channel", ["broadcast", "disk"])
def test_a_run_follows_one_that_was_killed_within_an_update(
    serving: Serving, own: Path, tmp_path: Path, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left the engine paused, with a part of the tensors of weights that are not the next run's, of version 99."""
    monkeypatch.setenv("GSPO_ENGINE_TOKEN", TOKEN)
    serving.ask("POST", "/pause?mode=keep")
    serving.ask("POST", "/start_weight_update", {})
    tensors = {n: 3 * t for n, t in load_file(own / "hf/step_000002/model.safetensors").items()}
    header, payload = next(
        pack(Weights(99, iter(tensors.items())), 20_000, lambda n: torch.empty(n, dtype=torch.uint8))
    )
    file = SharedFile(SHARED, "killed", len(payload))
    file.tensor.copy_(payload)
    order = {"channel": "shared_memory", "header": header.to_json(), "place": str(file.path)}
    serving.ask("POST", "/update_weights", {"update_info": order})
    file.close()
    run = trained(tmp_path / "run", f"engine.addresses=[{serving.url}]", f"engine.channel={channel}")
    assert_same(run, own)
    assert serving.ask("GET", "/weight_info") == {"weight_version": "4"}
    assert serving.ask("GET", "/is_paused") == {"is_paused": False}


def test_an_engine_that_does_not_fit_is_refused_before_anything_is_trained(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    cases = (
        (TOKEN, "model.max_sequence_length=17", "takes sequences of 16 tokens"),
        (TOKEN, "model.vocab_size=20", "has a model of 13 ids, and the run's has 20"),
        (TOKEN, "model.num_layers=1", "has another model than the run: num_hidden_layers is 2, and the run's 1"),
        ("another", "run.seed=2", "refuses the token of this run"),
    )
    for token, setting, complaint in cases:
        monkeypatch.setenv("GSPO_ENGINE_TOKEN", token)
        run = ["--config", str(tmp_path / "run.yaml"), *SETTINGS, f"run.dir={tmp_path / 'run'}", setting]
        status, said = torchrun(1, [*run, f"engine.addresses=[{serving.url}]"])
        assert (status, complaint in said) == (2, True), said
        assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run")


def test_every_route_but_that_of_health_asks_for_the_token(serving: Serving) -> None:
    stranger = Address.of("engine", serving.url, "guessed")
    for method, route in (("GET", "/version"), ("POST", "/pause"), ("POST", "/collective_rpc"), ("GET", "/v1/models")):
        assert exchange(stranger, method, route, {}, timeout_s=60)[0] == 401, route
    assert exchange(stranger, "GET", "/health", timeout_s=60)[0] == 200


def test_the_engine_is_lent_to_one_run_at_a_time(serving: Serving) -> None:
    first = Lease(serving.address, "runs/a on node7", 60 * time_factor())
    assert not first.held_by
    assert Lease(serving.address, "runs/b on node8", 60 * time_factor()).held_by == "runs/a on node7"
    with pytest.raises(EngineError, match="status 401"):
        Lease(replace(serving.address, token="guessed"), "runs/c on node9", 60 * time_factor())
    first.end()
    until = time.monotonic() + 60 * time_factor()
    while (next_one := Lease(serving.address, "runs/b on node8", 60 * time_factor())).held_by:
        assert time.monotonic() < until
        time.sleep(0.1)
    next_one.end()


def test_nothing_is_left_of_a_command_that_was_killed(serving: Serving) -> None:
    """The last test of this engine."""
    ours = processes()
    assert len(ours) >= 3, "the command, what watches the server, the server and its worker"
    serving.process.send_signal(signal.SIGKILL)
    serving.process.wait()
    until = time.monotonic() + 60 * time_factor()
    while (left := processes()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def processes() -> list[str]:
    """Commands of those that have the token in their environment, this one aside."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if TOKEN.encode() in (directory / "environ").read_bytes() and int(directory.name) != os.getpid():
                found.append((directory / "cmdline").read_text())
    return found
