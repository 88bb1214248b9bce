"""The checkpoint directory on disks that give out, and where processes die suddenly."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError, ConfigError
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.lock import RunLock
from gspo_megatron.checkpoint.names import name_of
from tests.checkpoint.test_directory import contents, fill, held, names, save, save_files, step, tree

# The child is this process as it stands, so it starts in milliseconds.
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 18 MiB: `begin` wants 16 of them to be free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def test_too_little_space_is_noticed_before_a_byte_is_written(small_disk: Path) -> None:
    store = CheckpointDirectory(small_disk / "checkpoints", keep=2)
    old = save(store, step(10))
    left = tree(store.directory)
    with pytest.raises(CheckpointError) as error:
        store.begin(step(20), 16 << 20)
    assert f"{store.directory} has 18 MiB free, step_000020 needs 33 MiB (16 MiB, 5 % and 16 MiB spare)" in str(
        error.value
    )
    assert "lower checkpoint.keep=2" in str(error.value)
    assert tree(store.directory) == left and store.newest_intact() == (old, [])


@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_fills_up_or_turns_read_only_during_a_save(full: bool, small_disk: Path) -> None:
    store = CheckpointDirectory(small_disk / "checkpoints", keep=2)
    old = save(store, step(10))
    partial = store.begin(step(20), 1 << 20)
    fill(partial, contents("new"))
    if full:
        with pytest.raises(OSError, match="No space left"):
            (partial / "more").write_bytes(bytes(20 << 20))
    else:
        remount(small_disk, "ro")
    with pytest.raises(CheckpointError, match="No space left on device" if full else "Read-only file system") as error:
        store.commit(partial)
    assert str(error.value).startswith(f"{partial} could not be completed")
    assert store.open("latest") == (old, []) and held(old) == contents(step(10))
    remount(small_disk, "rw")
    new = save(store, step(20))
    assert store.open("latest") == (new, []) and names(store.directory) == ["latest", "step_000010", "step_000020"]


def test_a_read_only_directory(small_disk: Path) -> None:
    store = CheckpointDirectory(small_disk / "checkpoints", keep=2)
    old = save(store, step(10))
    remount(small_disk, "ro")
    with pytest.raises(CheckpointError, match=r"cannot be written .*Read-only file system.*make it writable"):
        store.begin(step(20), None)
    assert store.open("latest") == (old, [])
    with pytest.raises(ConfigError, match=r"cannot be written .*Read-only file system"), RunLock(small_disk):
        pass


# ------------------------------------------------------------------------------------------------------- sudden deaths


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: what kill -9 leaves behind does not depend on the disk."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as directory:
        yield Path(directory)


FEW = {seed: {"model/shard": seed.encode(), "run.json": b"{}"} for seed in ("old", "new")}


def save_and_die(store: CheckpointDirectory, position: Position, deadline: int) -> None:
    """kill -9 before the file system is asked for the `deadline`-th time to open, make, rename or remove something."""
    asked = iter(range(deadline))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(asked, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_files(store, position, FEW["new"])


@pytest.mark.parametrize(
    ("before", "position", "after"),
    [
        ([], step(10), {"step_000010"}),
        ([step(9), step(10)], step(11), {"step_000010", "step_000011"}),
        ([step(9), step(10)], step(10), {"step_000010", "step_000010.before_3"}),
    ],
    ids=["the first", "another, one goes", "the same again"],
)
def test_killed_anywhere_in_a_save(before: list[Position], position: Position, after: set[str], memory: Path) -> None:
    """The newest is the old one or the new one, whole; the next save works, and clears what this one left undone."""
    (memory / "saved").mkdir()
    for saved in before:
        save_files(CheckpointDirectory(memory / "saved", keep=2), saved, FEW["old"])
    outcomes: list[str] = []
    exit_code: int = -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        store = CheckpointDirectory(memory / f"killed_{len(outcomes)}", keep=2)
        shutil.copytree(memory / "saved", store.directory)
        child = _fork.Process(target=save_and_die, args=(store, position, len(outcomes)))
        child.start()
        child.join()
        assert child.exitcode is not None
        exit_code = child.exitcode
        newest, _ = store.newest_intact()
        outcomes.append((newest / "model" / "shard").read_text() if newest else "none")
        last = save_files(store, step(20), FEW["new"])
        assert store.newest_intact() == (last, [])
        latest, *kept, twenty = names(store.directory)
        assert (latest, twenty) == ("latest", "step_000020") and len(kept) <= 1 and {*kept} <= after
    assert exit_code == 0 and len(outcomes) > 20
    turn = outcomes.index("new")
    assert {*outcomes[:turn]} == {"old" if before else "none"} and {*outcomes[turn:]} == {"new"}


def shards(position: Position) -> dict[str, bytes]:
    return {f"shard_{i}": random.Random(f"{position} {i}").randbytes(20_000) for i in range(60)}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Twenty times in one directory, each time as it was left."""
    store, draws, exit_codes = CheckpointDirectory(tmp_path, keep=2), random.Random(4), []
    start_s = time.perf_counter()
    save_files(store, step(1), shards(step(1)))
    whole_save_s = time.perf_counter() - start_s
    newest = step(1)
    for number in range(2, 22):
        child = _fork.Process(target=save_files, args=(store, step(number), shards(step(number))))
        child.start()
        time.sleep(draws.uniform(0, whole_save_s))
        child.kill()
        child.join()
        exit_codes.append(child.exitcode)
        path, _ = store.newest_intact()
        assert path and path.name in (name_of(newest), name_of(step(number)))
        newest = newest if path.name == name_of(newest) else step(number)
        assert {name: (path / name).read_bytes() for name in shards(newest)} == shards(newest)
    assert -signal.SIGKILL in exit_codes


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO would be opened for ever: as a manifest, as `latest`, and among the files."""
    store = CheckpointDirectory(tmp_path, keep=3)
    first, second = (save_files(store, step(number), contents(number)) for number in (1, 2))
    (tmp_path / "latest").unlink()
    os.mkfifo(tmp_path / "latest")
    assert store.open("latest") == (
        second,
        [f"{tmp_path}/latest is missing or empty; the newest intact checkpoint is {second.name}"],
    )
    for name in ("empty", "manifest.json"):
        (second / name).unlink()
        os.mkfifo(second / name)
        found, problems = store.open("latest")
        assert found == first and any("not a regular file" in problem for problem in problems)
