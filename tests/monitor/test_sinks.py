"""Metrics in Weights & Biases, by the real package (make test-hf), without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.monitor.sinks import WeightsAndBiases, check_packages

with_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: make test-hf")


@pytest.fixture(autouse=True)
def read_the_environment_again() -> Iterator[None]:
    """wandb reads it once in a process."""
    yield
    if "wandb" in sys.modules:
        with contextlib.suppress(ConnectionError):  # a test has killed its process
            sys.modules["wandb"].teardown()


def config_of(run_dir: Path) -> Config:
    return load_config(None, [f"run.dir={run_dir}", "logging.wandb=demo", "logging.tensorboard=false"])


def write(run_dir: Path, steps: range, *, fresh: bool = False) -> list[str]:
    """Rows of these steps in a run of that directory; returns the warnings."""
    warnings: list[str] = []
    writer = RunWriter.of_run(config_of(run_dir), first_step=steps[0], fresh=fresh, warn=warnings.append)
    for step in steps:
        writer.metrics({"step": step, "reward/mean": step / 4, "kl/ref": None, "loss": math.nan, "tokens": 10 * step})
    writer.close()
    sys.modules["wandb"].teardown()  # as at the end of a process: what it has in memory is written
    return warnings


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after a header of 7 bytes, LevelDB's log format, blocks of 32 KiB with records of
    checksum (4 bytes), length (2) and type (1: whole; 2, 3, 4: first, middle, last part)."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def stored(run_dir: Path) -> list[tuple[str, str, dict[int, dict[str, Any]]]]:
    """(id, project, numbers by step) of each offline run, the earliest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        about, rows = ("", ""), {}
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                about = (record.run.run_id, record.run.project)
            if record.HasField("history"):
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows[record.history.step.num] = {k: v for k, v in values.items() if not k.startswith("_")}
        runs.append((*about, rows))
    return runs


@with_wandb
def test_a_run_that_continues_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert (
        write(tmp_path, range(2), fresh=True)
        == write(tmp_path, range(2, 4))
        == write(tmp_path, range(1), fresh=True)
        == []
    )
    first, second, fresh = stored(tmp_path)
    assert first[0] == second[0] != fresh[0] and {run[1] for run in (first, second, fresh)} == {"demo"}
    # What TensorBoard has, too: no null, no NaN, the names of docs/metrics.md.
    assert first[2] == {0: {"reward/mean": 0, "time/tokens": 0}, 1: {"reward/mean": 0.25, "time/tokens": 10}}
    assert list(second[2]) == [2, 3]


@with_wandb
@pytest.mark.parametrize("key", ["", "0" * 40], ids=["no account", "no network"])
def test_what_cannot_be_reached_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc of the user's
    monkeypatch.setattr(WeightsAndBiases, "INIT_S", 2)
    started = time.monotonic()
    (warning,) = write(tmp_path, range(2), fresh=True)
    assert time.monotonic() - started < 60
    assert f"this run is kept in {tmp_path}/wandb/offline-run-" in warning
    ((_, _, rows),) = stored(tmp_path)
    assert list(rows) == [0, 1]


@with_wandb
def test_a_run_goes_on_when_wandb_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    before = {child.pid for child in psutil.Process().children()}
    writer = RunWriter.of_run(config_of(tmp_path), first_step=0, fresh=True, warn=warnings.append)
    services = [child for child in psutil.Process().children() if "wandb" in child.name() and child.pid not in before]
    for service in services:
        service.kill()
        service.wait()
    for step in range(3):
        writer.metrics({"step": step, "loss": 0.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_missing_package_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ConfigError, match=r"logging.wandb=demo needs the package wandb.*pip install wandb"):
        check_packages(config_of(tmp_path))
    check_packages(load_config(None, []))
