"""The checkpoint directory, on real files, real file systems and real processes that die."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.directory import CheckpointDirectory, outdated
from gspo_megatron.checkpoint.manifest import verify
from gspo_megatron.checkpoint.names import name_of, position_of

FILES = ("model/shard_0.bin", "model/shard_1.bin", "model/.metadata", "empty", "run.json")
UNREADABLE = "/proc/self/mem"
"""Opens, and fails when its first byte is read."""


def step(number: int, updates: int = 0) -> Position:
    return Position(20, number, updates)


def contents(seed: object) -> dict[str, bytes]:
    """Of the same sizes whatever the seed. run.json has the size of a symbolic link to UNREADABLE."""
    draws = random.Random(repr(seed))
    sizes = dict(zip(FILES, (3000, 70_000, 40, 0, len(UNREADABLE)), strict=True))
    return {name: draws.randbytes(size) for name, size in sizes.items()}


def fill(partial: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)


def save_files(
    store: CheckpointDirectory, position: Position, files: dict[str, bytes], best: Position | None = None
) -> Path:
    partial = store.begin(position, 10_000)
    fill(partial, files)
    return store.commit(partial, best)


def save(store: CheckpointDirectory, position: Position, seed: object = None) -> Path:
    return save_files(store, position, contents(seed or position))


def tree(directory: Path) -> dict[str, bytes | None]:
    """All that is in a directory, with what files hold."""
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in sorted(paths.items())}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def held(checkpoint: Path) -> dict[str, bytes]:
    return {name: (checkpoint / name).read_bytes() for name in FILES}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "run" / "checkpoints", keep=3)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = CheckpointDirectory(tmp_path_factory.mktemp("saves"), keep=2)
    save(store, step(10))
    save(store, step(20))
    return store.directory


@pytest.fixture
def two(two_saves: Path, tmp_path: Path) -> CheckpointDirectory:
    """Checkpoints after steps 10 and 20, to be damaged."""
    shutil.copytree(two_saves, tmp_path / "checkpoints")
    return CheckpointDirectory(tmp_path / "checkpoints", keep=2)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("position", "name"),
    [
        (Position(0, 0, 0), "step_000000"),
        (Position(20, 0, 0), "warm_start_000020"),
        (Position(20, 0, 2), "step_000000_update_002"),
        (Position(20, 10, 0), "step_000010"),
        (Position(0, 10, 3), "step_000010_update_003"),
        (Position(0, 1234567, 1000), "step_1234567_update_1000"),
    ],
)
def test_positions_and_names(position: Position, name: str) -> None:
    assert name_of(position) == name
    found = position_of(name)
    assert found and name_of(found) == name and found[1:] == position[1:]


@pytest.mark.parametrize(
    "name",
    [
        "latest",
        "step_10",
        "step_0000010",
        "step_000010_update_000",
        "warm_start_000000",
        "step_000010.tmp",
        "a_step_000010",
        "step_\u0661\u0661\u0661\u0661\u0661\u0661",
    ],
)
def test_other_names_are_no_positions(name: str) -> None:
    assert position_of(name) is None


# ---------------------------------------------------------------------------------------------------- save and choose


def test_a_save_is_renamed_hashed_and_pointed_to(store: CheckpointDirectory) -> None:
    partial = store.begin(step(10), 1000)
    assert partial.name == "step_000010.tmp" and store.open("latest") == (None, [])
    fill(partial, contents("ten"))
    path = store.commit(partial)
    assert path == store.directory / "step_000010" and held(path) == contents("ten")
    assert names(store.directory) == ["latest", "step_000010"]
    assert (store.directory / "latest").read_text() == "step_000010\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents("ten").items())
    }
    assert list(manifest["files"]) == sorted(FILES)
    verify(path)
    assert store.open("latest") == store.open(str(path)) == (path, [])
    assert store.open("none") == (None, [])


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(store: CheckpointDirectory) -> None:
    """What a power cut would tell: the files, the manifest and both directories are synced before the rename, the
    rename and the pointer's text before the pointer is replaced, and that after."""
    partial, calls = store.begin(step(10), None), []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function in (os.fsync, os.rename, os.replace):
            calls.append(function)

    fill(partial, contents("ten"))
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        store.commit(partial)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert calls == [os.fsync] * (len(FILES) + 3) + [os.rename, os.fsync, os.fsync, os.replace, os.fsync]


def test_the_newest_is_the_one_written_last(store: CheckpointDirectory) -> None:
    """A run goes to step 30, then on from step 10 once more. What it saves from there on is the newest, though its
    former future bears higher numbers; that stays until the run gets there."""
    store.keep = 2
    for number in (10, 20, 30):
        save(store, step(number), "first")
    assert names(store.directory) == ["latest", "step_000020", "step_000030"]
    for position, left in [
        (step(12), ["latest", "step_000012", "step_000020", "step_000030"]),
        (step(12, 3), ["latest", "step_000012", "step_000012_update_003", "step_000020", "step_000030"]),
        (step(20), ["latest", "step_000012_update_003", "step_000020", "step_000030"]),
        (step(31), ["latest", "step_000020", "step_000031"]),
    ]:
        path = save(store, position, "second")
        assert names(store.directory) == left
        assert store.newest_intact() == (path, []) and held(path) == contents("second")
    assert held(store.directory / "step_000020") == contents("second")


def test_times_of_files_say_nothing(two: CheckpointDirectory) -> None:
    os.utime(two.directory / "step_000010", (2e9, 2e9))
    os.utime(two.directory / "step_000010" / "manifest.json", (2e9, 2e9))
    assert two.newest_intact() == (two.directory / "step_000020", [])


def test_begin_clears_what_dead_processes_left(two: CheckpointDirectory) -> None:
    for name in ("step_000020_update_001.tmp", "step_000030.tmp", "notes.tmp"):
        (two.directory / name).mkdir()
        (two.directory / name / "half").write_text("x")
    partial = two.begin(step(30), None)
    assert list(partial.iterdir()) == []
    assert names(two.directory) == ["latest", "notes.tmp", "step_000010", "step_000020", "step_000030.tmp"]


# -------------------------------------------------------------------------------------------------------------- damage


def truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def remove(file: Path, other: Path) -> None:
    file.unlink()


def take_the_other_steps(file: Path, other: Path) -> None:
    shutil.copy2(other, file)


def make_unreadable(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(UNREADABLE)


@pytest.mark.parametrize(
    ("damage", "name", "found"),
    [
        *((truncate, name, "bytes, but") for name in FILES if contents(0)[name]),
        *((flip, name, "is damaged") for name in FILES if contents(0)[name]),
        *((remove, name, "is missing") for name in FILES),
        *((take_the_other_steps, name, "is damaged") for name in FILES if contents(0)[name]),
        (make_unreadable, "run.json", "cannot be read ([Errno 5] Input/output error)"),
        (lambda file, other: file.write_bytes(b"x"), "empty", "1 bytes, but 0"),
        (lambda file, other: file.touch(), "model/shard_2.bin", "does not belong here"),
        (truncate, "manifest.json", "is damaged"),
        (remove, "manifest.json", "is missing"),
        (take_the_other_steps, "manifest.json", "belongs to step_000010"),
        (lambda file, other: file.write_text("[]"), "manifest.json", "is damaged"),
        (lambda file, other: file.write_bytes(b"\xff\xfe"), "manifest.json", "is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    damage: Callable[[Path, Path], Any], name: str, found: str, two: CheckpointDirectory
) -> None:
    old, new = two.directory / "step_000010", two.directory / "step_000020"
    damage(new / name, old / name)
    before = names(two.directory), os.listdir(new), tree(old)
    with pytest.raises(CheckpointError) as error:
        verify(new)
    assert str(error.value).startswith(f"{new}: {name} ") and found in str(error.value)
    path, problems = two.newest_intact()
    assert path == old and problems[0] == str(error.value)
    assert two.open("latest") == (path, problems)
    assert (names(two.directory), os.listdir(new), tree(old)) == before
    with pytest.raises(CheckpointError) as refused:
        two.open(str(new))
    assert str(error.value) in str(refused.value) and f"set checkpoint.load={old}" in str(refused.value)


def test_files_swapped_between_two_steps_damage_both(two: CheckpointDirectory) -> None:
    old, new = two.directory / "step_000010", two.directory / "step_000020"
    (new / FILES[0]).write_bytes(contents(step(10))[FILES[0]])
    (old / FILES[0]).write_bytes(contents(step(20))[FILES[0]])
    before = tree(two.directory)
    path, problems = two.newest_intact()
    assert path is None and [p.split(":")[0] for p in problems[:2]] == [str(new), str(old)]
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*shard_0.*; set checkpoint\.load=none"):
        two.open("latest")
    assert tree(two.directory) == before


def test_every_byte_of_the_manifest_counts(store: CheckpointDirectory) -> None:
    path = save_files(store, step(10), {"run.json": b"{}"})
    whole = (path / "manifest.json").read_bytes()
    for i in range(len(whole)):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        (path / "manifest.json").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="is damaged"):
            verify(path)


def test_checkpoints_under_each_others_names(two: CheckpointDirectory) -> None:
    old, new = two.directory / "step_000010", two.directory / "step_000020"
    os.rename(old, aside := two.directory / "best")
    verify(aside)  # a copy may bear any name but that of another position
    os.rename(new, old)
    os.rename(aside, new)
    path, problems = two.newest_intact()
    assert path is None
    assert f"{new}: manifest.json belongs to step_000010" in problems
    assert f"{old}: manifest.json belongs to step_000020" in problems


def test_a_manifest_of_a_later_format_is_not_guessed_at(two: CheckpointDirectory) -> None:
    file = two.directory / "step_000020" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    manifest["format"] = 3
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(
        CheckpointError, match=r"has format 3, written by gspo_megatron 0\.1\.0; version 0\.1\.0 reads formats 1 and 2"
    ):
        verify(file.parent)


def test_a_damaged_checkpoint_is_overtaken_but_not_deleted(two: CheckpointDirectory) -> None:
    """What is visibly damaged is not one of the `keep` that stay; the run writes on from the one before."""
    remove(two.directory / "step_000020" / FILES[0], Path())
    for number in (22, 24):
        path = save(two, step(number))
    assert names(two.directory) == ["latest", "step_000020", "step_000022", "step_000024"]
    assert two.newest_intact() == (path, [])


def test_a_directory_that_cannot_be_listed_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointDirectory(tmp_path / "checkpoints", keep=1).open("latest")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("step_000030\n", "names 'step_000030'"),
        ("step_000010\n", "names 'step_000010'"),
        ("\xff\0", "names "),
        ("", "is missing or empty"),
        (None, "is missing or empty"),
    ],
)
def test_a_stale_pointer_is_reported_and_not_believed(
    content: str | None, found: str, two: CheckpointDirectory
) -> None:
    pointer, new = two.directory / "latest", two.directory / "step_000020"
    pointer.unlink() if content is None else pointer.write_bytes(content.encode("latin-1"))
    path, [problem] = two.open("latest")
    assert path == new and problem.startswith(f"{pointer} {found}") and problem.endswith("checkpoint is step_000020")
    save(two, step(21))
    assert two.open("latest") == (two.directory / "step_000021", [])


def test_a_pointer_to_a_damaged_checkpoint(two: CheckpointDirectory) -> None:
    flip(two.directory / "step_000020" / FILES[0], Path())
    path, problems = two.newest_intact()
    assert path == two.directory / "step_000010" and len(problems) == 2
    assert "names 'step_000020'; the newest intact checkpoint is step_000010" in problems[1]


def test_a_pointer_alone_is_no_fresh_start(store: CheckpointDirectory) -> None:
    """Something was saved here, and is gone."""
    store.directory.mkdir(parents=True)
    (store.directory / "latest").write_text("step_000010\n")
    with pytest.raises(CheckpointError, match="names 'step_000010'"):
        store.open("latest")


def test_a_path_that_holds_nothing(two: CheckpointDirectory, tmp_path: Path) -> None:
    newest = two.directory / "step_000020"
    for path in (two.directory / "step_000030", tmp_path / "elsewhere" / "step_000010"):
        with pytest.raises(CheckpointError) as error:
            two.open(str(path))
        assert f"checkpoint.load='{path}': {path} is not a checkpoint" in str(error.value)
        assert f"set checkpoint.load={newest}" in str(error.value)
    with pytest.raises(CheckpointError, match=r"no intact checkpoint: set checkpoint\.load=none"):
        CheckpointDirectory(tmp_path / "empty", keep=1).open(str(tmp_path / "nothing"))


# ----------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("saved", "keep", "keep_every", "gone"),
    [
        ("10", 1, 0, ""),
        ("10 20", 1, 0, "10"),
        ("10 20 30 40", 2, 0, "10 20"),
        ("10 20 30 40", 9, 0, ""),
        ("10 20 30 40", 1, 20, "10 30"),
        ("10 15 15.1 15.2 20", 1, 5, "15.1 15.2"),
        ("w10 w20 0.1 1", 2, 0, "w10 w20"),
        ("w10 w20 0.1 1", 1, 10, "w10 w20 0.1"),
        ("10 20 30 12", 1, 0, "10"),
        ("10 20 30 12 14", 2, 0, "10"),
        ("10 13 12 14", 2, 0, "10 13"),
        ("10 20 30 12 20", 2, 0, "10 20"),
        ("40 w10", 1, 0, ""),
    ],
)
def test_which_checkpoints_go(saved: str, keep: int, keep_every: int, gone: str) -> None:
    """Written 10, 15.1 (a step and the update after it), w20 (warm start), in the order they were saved."""

    def positions(text: str) -> list[Position]:
        words = [word.partition(".") for word in text.split()]
        return [Position(int(a[1:]), 0, 0) if a[0] == "w" else Position(0, int(a), int(b or 0)) for a, _, b in words]

    assert outdated(positions(saved), keep=keep, keep_every=keep_every) == positions(gone)


def test_the_best_stays_until_there_is_a_better_one(tmp_path: Path) -> None:
    store = CheckpointDirectory(tmp_path / "checkpoints", keep=1)
    with pytest.raises(CheckpointError, match=r"checkpoint.load=best: .*best does not exist; a run keeps its best"):
        store.best()
    best = None
    for position, is_best in ((Position(20, 0, 0), True), (step(1), False), (step(2), True), (step(3, 1), False)):
        best = position if is_best else best
        save_files(store, position, contents(position), best)
        names = {name_of(position), name_of(best)} if best else {name_of(position)}
        assert {path.name for path in store.directory.iterdir()} == {*names, "best", "latest"}
        assert store.best() == store.directory / name_of(best or position)
    assert store.open("latest")[0] == store.directory / "step_000003_update_001"
    # A run that went back to before its best: what is named must be there.
    shutil.rmtree(store.directory / "step_000002")
    with pytest.raises(CheckpointError, match="best names 'step_000002', which is not there"):
        store.best()
    save_files(store, step(4), contents(4), step(2))
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step_000004"]
    (store.directory / "best").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere"):
        store.best()
    save_files(store, step(5), contents(5))
    assert not (store.directory / "best").exists(), "nothing is kept any more"


def test_a_store_keeps_the_last_and_every_so_many(tmp_path: Path) -> None:
    store = CheckpointDirectory(tmp_path, keep=2, keep_every=4)
    for position in (Position(5, 0, 0), *(step(number) for number in range(1, 8)), step(7, 1)):
        save(store, position)
    assert names(tmp_path) == ["latest", "step_000004", "step_000007", "step_000007_update_001"]
