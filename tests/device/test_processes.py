"""What a process says when it does not meet the others: with real sockets, and in NCCL's words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.base.errors import StartError
from gspo_megatron.device.processes import claim_gpu, explained, start
from gspo_megatron.testing.time_limits import time_factor

CPU = torch.device("cpu")


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, address: str, port: int) -> None:
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def message(attempt: int = 0, timeout_s: float = 1.0) -> str:
    with pytest.raises(StartError) as caught:
        start("gloo", CPU, attempt=attempt, timeout_s=timeout_s)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_rank_0_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    number = free_port()
    as_rank(monkeypatch, 1, "127.0.0.1", number)
    text = message()
    assert text.startswith(f"rank 1 of 2 (LOCAL_RANK=1 on {socket.gethostname()}) could not meet the others at ")
    assert f"127.0.0.1:{number} (MASTER_ADDR and MASTER_PORT) within parallel.timeout_s=1: The client socket" in text
    assert "rank 0 does not answer there: is it started" in text


def test_an_address_that_does_not_resolve_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, "nowhere.invalid", 29500)
    text = message(timeout_s=600)
    assert "MASTER_ADDR=nowhere.invalid does not resolve" in text and "set MASTER_ADDR to a name or address" in text
    monkeypatch.delenv("MASTER_ADDR")
    assert "(it is not set)" in message()


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    as_rank(monkeypatch, 0, "127.0.0.1", port)
    assert "another program listens there: choose another port" in message()


def test_the_other_process_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, "127.0.0.1", free_port())
    text = message()
    assert "1/2 clients joined; the other processes did not come" in text


def test_a_variable_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, "127.0.0.1", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert "environment variable WORLD_SIZE expected, but not set" in message()


def test_two_ranks_on_one_gpu() -> None:
    store = dist.HashStore()
    claim_gpu(store, 0, "GPU-1")
    claim_gpu(store, 1, "GPU-2")
    claim_gpu(store, 0, "GPU-1")
    with pytest.raises(StartError) as caught, explained(600):
        claim_gpu(store, 2, "GPU-1")
    assert "ranks 0 and 2 are both on CUDA device GPU-1; two processes use one GPU: start one process per GPU" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage (run with NCCL_DEBUG=WARN)\nLast error:\n"
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000",
            "two processes use one GPU",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
            "Last error:\nsocketStartConnect: Connect to 10.1.2.3<41233> failed : Software caused connection abort",
            "name the interface with NCCL_SOCKET_IFNAME",
        ),
        (
            "NCCL error: unhandled cuda error, NCCL version 2.28.9\nLast error:\nCuda failure 2 'out of memory'",
            "another process holds the GPU's memory",
        ),
        ("Cuda failure 35 'CUDA driver version is insufficient for CUDA runtime version'", "needs a newer driver"),
        ("something new", "NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=DETAIL print more"),
    ],
)
def test_what_nccl_says_is_followed_by_what_to_try(said: str, hint: str) -> None:
    with pytest.raises(StartError) as caught, explained(600):
        raise dist.DistBackendError(said)
    assert hint in str(caught.value).rsplit("; ", 1)[-1] and "\n" not in str(caught.value)


def test_a_process_of_its_own_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(StartError) as caught, explained(600):
        raise dist.DistBackendError("Cuda failure 2 'out of memory'")
    text = str(caught.value)
    assert text.startswith(f"this process, alone on {socket.gethostname()}, could not start torch.distributed: ")
    assert "?" not in text and "another process holds the GPU's memory" in text


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    """And exits with 1, after which a batch script may start it again."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RANK": "1", "WORLD_SIZE": "2"}
    environment |= {"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "gspo_megatron.train", f"run.dir={tmp_path}", "parallel.timeout_s=1"]
    done = subprocess.run(
        [*command, "precision.device=cpu"], env=environment, capture_output=True, text=True, timeout=120 * time_factor()
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "StartError" in line]
    assert len(lines) == 1 and "rank 0 does not answer there" in lines[0]
    assert "Traceback" not in done.stderr
