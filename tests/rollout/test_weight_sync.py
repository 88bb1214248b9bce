"""Weights sent over every channel to servers with vLLM's routes, but no model; tests/engine has the same with vLLM."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from gspo_megatron.base.errors import CannotSend, EngineError
from gspo_megatron.rollout import weight_channels
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.weight_channels import (
    PREFIX,
    Broadcast,
    Channel,
    Disk,
    SharedMemory,
    remove_leftovers,
    write_folder,
)
from gspo_megatron.rollout.weight_receivers import MARKER
from gspo_megatron.rollout.weight_stream import Bucket
from gspo_megatron.rollout.weight_sync import _Together, send_weights
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.testing.weight_server import WeightServer

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"


def model(version: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(version)
    sizes = {"a": (100, 30), "b": (7,), "c": (11, 3, 5), "d": (2000,)}
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


def weights(version: int) -> Weights:
    return Weights(version, iter(model(version).items()))


OPEN: dict[str, Callable[[Path], Channel]] = {
    "broadcast": lambda base: Broadcast(LOOPBACK, bucket_bytes=5000, timeout_s=20 * time_factor()),
    "shared_memory": lambda base: SharedMemory("test", bucket_bytes=5000, folder=base),
    "disk": lambda base: Disk(base / "weights", bucket_bytes=5000),
}


@pytest.fixture(params=OPEN)
def channel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Channel]:
    opened = OPEN[request.param](tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def servers() -> Iterator[list[WeightServer]]:
    opened = [WeightServer(), WeightServer(num_workers=2)]
    yield opened
    for server in opened:
        server.close()


def send(servers: list[WeightServer], content: Weights, channel: Channel) -> None:
    send_weights([server.address for server in servers], content, channel, timeout_s=20 * time_factor())


def check_has(servers: list[WeightServer], version: int) -> None:
    for server in servers:
        assert server.version == str(version)
        for tensors in server.tensors:
            assert list(tensors) == list(model(version))
            for name, tensor in model(version).items():
                assert torch.equal(tensors[name], tensor)


def test_every_worker_of_every_engine_gets_the_weights(servers: list[WeightServer], channel: Channel) -> None:
    assert weight_channels.CHANNELS[channel.name] is type(channel)
    for version in (1, 2):
        send(servers, weights(version), channel)
        check_has(servers, version)
    # The group of the first update serves the second, until an engine is started again.
    joins = [server.routes.count("/init_weight_transfer_engine") for server in servers]
    assert joins == ([1, 1] if channel.name == "broadcast" else [0, 0])
    servers[1].workers[0].leave()
    send(servers, weights(3), channel)
    send(servers[:1], weights(4), channel)
    check_has(servers[1:], 3)
    check_has(servers[:1], 4)


def _raise(route: str, body: dict[str, Any]) -> None:
    if route == "/update_weights":
        raise RuntimeError("it does not fit")


def _garbled(bucket: Bucket) -> Bucket:
    payload = bucket.payload.clone()
    payload[0] += 1
    return bucket._replace(payload=payload)


def _unpaused(server: WeightServer) -> None:
    server.paused = False


def test_200_updates_leave_no_memory_behind(servers: list[WeightServer], channel: Channel, tmp_path: Path) -> None:
    """benchmarks/weight_sync.py does the same with a real vLLM."""
    resident = []
    for version in range(200):
        send(servers, weights(version), channel)
        if version % 20 == 0:
            channel.close()  # the next one makes a group again
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert resident[-1] < 1.02 * resident[1]
    assert len(list(tmp_path.rglob("*.safetensors"))) <= 4 and not list(tmp_path.glob(f"{PREFIX}*"))


FAULTS: dict[str, tuple[Callable[[WeightServer], object], str]] = {
    "not paused": (_unpaused, r"is not paused"),
    "refused": (
        lambda server: setattr(server, "fail", _raise),
        r"answered /update_weights with status 500: it does not fit",
    ),
    "damaged": (lambda server: setattr(server, "damage", _garbled), r"is not what was sent: its digest is"),
    "gone": (lambda server: server.close(), r"does not answer .*refused"),
    "another version": (lambda server: setattr(server, "version", "7"), r"says that it has weights version '7'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_weights_are_read_to_their_end(
    servers: list[WeightServer], channel: Channel, fault: str, tmp_path: Path
) -> None:
    send(servers, weights(1), channel)
    broken = servers[1]
    change, message = FAULTS[fault]
    change(broken)
    if fault == "another version":
        broken.answer = _without_finish(broken)  # type: ignore[method-assign]
    content = weights(2)
    started = time.monotonic()
    with pytest.raises(EngineError, match=f"{broken.address}.*{message}"):
        send(servers, content, channel)
    # At once: nobody waits for a broadcast that one will not join.
    assert time.monotonic() - started < 10 * time_factor()
    assert next(content.tensors, None) is None  # the other ranks iterate, too
    assert broken.version != "2"
    assert not list(tmp_path.glob(f"{PREFIX}*"))
    # What is left works without the broken one.
    send(servers[:1], weights(3), channel)
    check_has(servers[:1], 3)


def _without_finish(server: WeightServer) -> Callable[[str, dict[str, Any]], Any]:
    answer = type(server).answer
    return lambda route, body: {} if route == "/finish_weight_update" else answer(server, route, body)


def test_an_error_of_the_weights_themselves_is_passed_on(servers: list[WeightServer], channel: Channel) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(model(1).items())[:2]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        send(servers, Weights(1, tensors()), channel)
    assert [server.version for server in servers] == ["default", "default"]


def test_a_killed_engine_is_noticed_in_the_middle_of_a_broadcast() -> None:
    port = int(WeightServer().address.rsplit(":", 1)[1]) + 1
    command = [sys.executable, "-m", "gspo_megatron.testing.weight_server", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    channel = Broadcast(LOOPBACK, bucket_bytes=5000, timeout_s=30 * time_factor())
    try:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from model(1).items()
            process.send_signal(signal.SIGKILL)
            process.wait()
            yield "e", torch.zeros(10_000)
            yield "f", torch.zeros(10_000)

        started = time.monotonic()
        with pytest.raises(EngineError, match=rf"http://{LOOPBACK}:{port}\)? (does not answer|broke within bucket \d)"):
            send_weights([f"http://{LOOPBACK}:{port}"], Weights(1, tensors()), channel)
        assert time.monotonic() - started < 20 * time_factor()
    finally:
        channel.close()
        process.kill()
        process.wait()


def test_workers_that_do_not_come_are_named(servers: list[WeightServer]) -> None:
    channel = Broadcast(LOOPBACK, timeout_s=0.3)
    servers[0].fail = lambda route, body: time.sleep(1.0) if route == "/init_weight_transfer_engine" else None
    with pytest.raises(
        EngineError, match=r"did not come to 127.0.0.1:\d+ \(ranks \[1\] of 4 did not come within 0.3 s"
    ):
        send(servers, weights(1), channel)


def trainer_rank(address: str) -> float:
    """On rank 0 of the trainer: the default group works before, during and after an update."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model(1).items():
            whole = tensor.float()
            dist.broadcast(whole, src=1)
            yield name, whole.bfloat16()

    content = Weights(1, tensors())
    if dist.get_rank() == 0:
        channel = Broadcast(LOOPBACK, bucket_bytes=5000)
        send_weights([address], content, channel)
        channel.close()
    else:
        for _ in content.tensors:
            pass
    total = torch.ones(1)
    dist.all_reduce(total)
    return float(total)


def test_the_default_group_of_the_trainer_is_not_touched(servers: list[WeightServer]) -> None:
    assert run_distributed(trainer_rank, 2, servers[1].address) == [2.0, 2.0]
    check_has(servers[1:], 1)


def test_a_folder_is_safetensors_and_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, weights(1), bucket_bytes=5000)
    read = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    assert read.keys() == model(1).keys() and all(torch.equal(read[name], x) for name, x in model(1).items())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"weights_00000002 cannot be written .*No space left.*keep the weights"):
        write_folder(tmp_path, weights(2))
    assert [path.name for path in tmp_path.iterdir()] == ["weights_00000001"]


def test_of_folders_the_newest_stays_and_one_without_marker_is_refused(
    servers: list[WeightServer], tmp_path: Path
) -> None:
    channel = Disk(tmp_path)
    send(servers, weights(1), channel)
    send(servers, weights(2), channel)
    [folder] = tmp_path.iterdir()
    assert folder.name == "weights_00000002"
    (folder / MARKER).unlink()
    with pytest.raises(EngineError, match=r"cannot be read .*a folder that the trainer has completed"):
        list(servers[0].workers[0].buckets("disk", None, str(folder)))


KILLED = """
import os, signal, sys
from pathlib import Path
from gspo_megatron.rollout.weight_channels import SharedFile
SharedFile(Path(sys.argv[1]), "runs/job 7", 4096)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_in_shared_memory_goes_at_the_next_start(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(f"{PREFIX}.runs_job_7.")
    living = weight_channels.SharedFile(tmp_path, "job-8", 4096)
    said: list[str] = []
    SharedMemory("job-9", folder=tmp_path, say=said.append)
    assert said == [f"removed from {tmp_path}, where killed runs had left them: {left.name}"]
    assert list(tmp_path.iterdir()) == [living.path]
    living.close()
    assert remove_leftovers(tmp_path) == () and not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotSend, match=r"gone does not take 4.0 MiB of weights \(No such file or directory\)"):
        weight_channels.SharedFile(tmp_path / "gone", "job", 4 << 20)


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_of_answers_that_come_at_once_the_first_counts(error: Exception | None) -> None:
    parts = [Future[int](), Future[int]()]
    together = _Together(parts)
    together.done = lambda: False  # type: ignore[method-assign]  # each looked before the other had said anything
    said = io.StringIO()
    logging.getLogger("concurrent.futures").addHandler(handler := logging.StreamHandler(said))
    for part in parts:
        if error:
            part.set_exception(error)
        else:
            part.set_result(1)
    together._one_is_done(parts[0])
    logging.getLogger("concurrent.futures").removeHandler(handler)
    assert together.exception(1) is error and not said.getvalue()


def test_too_little_shared_memory_is_refused_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CannotSend, match=r"does not take 64.0 MiB of weights \(No space left .*--shm-size"):
        weight_channels.SharedFile(tmp_path, "job", 64 << 20)
    assert not list(tmp_path.iterdir())
