"""A program that ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspo_megatron.device.watched import LOOK_S, Watched
from gspo_megatron.testing.time_limits import time_factor

FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    def end(*_):
        print("asked to end", flush=True)
        child.kill()
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
print(os.getpid(), child.pid, *(os.environ.get(name) for name in ("OWN", "SET", "NEW", "RANK")), flush=True)
time.sleep(1000)
"""
"""A program with a child, as servers have."""


def started(log: Path) -> list[str]:
    """What FAMILY said first, once it has."""
    until = time.monotonic() + 30 * time_factor()
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < until, "the program did not start"
        time.sleep(0.02)
    return log.read_text().split()


def gone(*pids: int) -> bool:
    """Whether they end in time."""
    until = time.monotonic() + 30 * time_factor()
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_runs_in_its_own_environment_and_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "OWN": "no", "SET": "here"}.items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "new" / "program.log"
    usual = {"SET": "elsewhere", "NEW": "usual"}
    program = Watched([sys.executable, "-c", FAMILY], log=log, environment={"OWN": "yes"}, usual=usual)
    pid, child, own, kept, new, rank = started(log)
    assert (own, kept, new) == ("yes", "here", "usual")
    assert rank == "None", "what torchrun tells a rank is not for the program"
    assert program.status() is None
    program.end()
    assert program.status() is not None
    assert log.read_text().endswith("asked to end\n")
    assert not alive(int(pid))
    assert not alive(int(child))


def test_it_ends_when_its_starter_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "program.log"
    starter = f"""
import sys, threading, time
from pathlib import Path
from gspo_megatron.device.watched import LOOK_S, Watched
kept, command, log = [], [sys.executable, "-c", {FAMILY!r}], Path({str(log)!r})
threading.Thread(target=lambda: kept.append(Watched(command, log=log, environment={{}}))).start()
time.sleep(1000)
"""
    killed = subprocess.Popen([sys.executable, "-c", starter], cwd=Path(__file__).parents[2])
    pids = [int(pid) for pid in started(log)[:2]]
    # The thread that started it has ended, and the program goes on.
    assert all(map(alive, pids))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert gone(*pids)


def test_one_that_does_not_end_by_itself_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "program.log"
    program = Watched([sys.executable, "-c", FAMILY, "stubborn"], log=log, environment={}, grace_s=0.2)
    pids = [int(pid) for pid in started(log)[:2]]
    program.end()
    assert gone(*pids)


def test_what_it_leaves_behind_is_ended_and_its_status_told(tmp_path: Path) -> None:
    log = tmp_path / "program.log"
    program = Watched([sys.executable, "-c", FAMILY], log=log, environment={}, grace_s=0.2)
    pid, child = (int(number) for number in started(log)[:2])
    os.kill(pid, signal.SIGKILL)
    assert gone(pid, child)
    until = time.monotonic() + 30 * time_factor()
    while program.status() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert program.status() == 128 + signal.SIGKILL
    program.end()


SHARING = """
import os, sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
import alone
open(os.environ["SCRATCH"] + "/socket", "x").close()
print(os.getpid(), memory.name, os.nice(0), os.environ["SCRATCH"], os.environ["PYTHONPATH"], flush=True)
time.sleep(1000)
"""


def test_what_a_killed_program_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alone.py").touch()
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    log, looked = tmp_path / "program.log", 3 * LOOK_S
    program = Watched(
        [sys.executable, "-c", SHARING], log=log, environment={}, niceness=3, scratch="SCRATCH", modules=tmp_path
    )
    pid, name, niceness, folder, path = started(log)
    assert path == f"{tmp_path}:/of/the/user"
    shared = Path("/dev/shm") / name.lstrip("/")
    assert shared.exists() and int(niceness) == os.nice(0) + 3
    time.sleep(looked)
    # With its helper, which would remove it after a while.
    os.killpg(int(pid), signal.SIGKILL)
    program.end()
    assert not shared.exists() and not Path(folder).exists()
