"""The lock of a run directory, on real processes that die."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.checkpoint.lock import RunLock
from gspo_megatron.testing.time_limits import time_factor

# The child is this process as it stands, so it starts in milliseconds.
_fork = multiprocessing.get_context("fork")


def hold(directory: Path, held: Event) -> None:
    with RunLock(directory):
        held.set()
        time.sleep(60)


def test_one_run_a_directory_until_its_process_dies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = _fork.Event()
    child = _fork.Process(target=hold, args=(run, held))
    child.start()
    try:
        assert held.wait(20 * time_factor())
        with pytest.raises(ConfigError) as error, RunLock(run):
            pass
        holder = f"process {child.pid} on {socket.gethostname()}, started 20"
        assert f"run.dir={run} is in use by {holder}" in str(error.value) and "set another run.dir" in str(error.value)
        assert (run / "run.lock").read_text().startswith(holder)  # a refusal leaves the holder's name
    finally:
        child.kill()
        child.join()
    with RunLock(run) as lock:  # the dead one's file is still there
        assert lock.warning == ""
        assert (run / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "), RunLock(run):
            pass
    with RunLock(run):
        pass


def test_runs_in_two_directories_and_a_directory_that_is_none(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass
    with pytest.raises(ConfigError, match="cannot be written"), RunLock(tmp_path / "a" / "run.lock"):
        pass


def test_the_lock_is_never_taken_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot be written"), RunLock(tmp_path / "run"):
        pass
    assert victim.read_text() == "kept"
