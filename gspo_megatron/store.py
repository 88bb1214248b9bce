"""The directory of a run's checkpoints: never half a checkpoint, never a damaged one taken for whole.

    store = CheckpointStore(run_dir / "checkpoints", keep=2)
    partial = store.begin(position, num_bytes)      # step_000010.tmp, into which every rank writes
    store.commit(partial)                           # synced, hashed into manifest.json, renamed, pointed to by `latest`
    path, problems = store.open("latest")           # verified

What a checkpoint holds is not known here. All of it is called on the one process that writes files; where several nodes
write into `partial`, on a file system they share, the caller waits for all of them before commit.

Newest means written last: every manifest holds a number, one more than any other in the directory had. A run that was
continued from an early checkpoint writes newer ones at lower steps than those of its former future, and comes back to
these newer ones. Times of files say nothing. The file `latest` names the newest for people and scripts; it is never
believed, only checked.

Names: step_000010            a checkpoint, complete since this name exists
       step_000010.tmp        being written or deleted, or left so by a process that died; the next begin clears it
       step_000010.before_7   a checkpoint that number 7 is about to replace; it stays when that does not come to pass
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from gspo_megatron.types import CheckpointError, ConfigError, Position

MANIFEST, POINTER = "manifest.json", "latest"
FORMAT = 1
PARTIAL, BEFORE = ".tmp", ".before_"
SPARE_BYTES = 16 << 20
"""What has to stay free beside a checkpoint and a twentieth of its size: metrics, rollouts, the next manifest."""
CHUNK_BYTES = 4 << 20
THREADS = min(8, os.cpu_count() or 1)
"""Files are hashed side by side: hashlib lets go of the interpreter's lock."""

_NAME = re.compile(r"warm_start_(\d+)|step_(\d+)(?:_update_(\d+))?")


def name_of(position: Position) -> str:
    """`warm_start_000020` in the warm start, `step_000010` between steps, `step_000010_update_003` in the step after
    it."""
    warm_start, steps, updates = position
    if warm_start and not (steps or updates):
        return f"warm_start_{warm_start:06d}"
    return f"step_{steps:06d}" + (f"_update_{updates:03d}" if updates else "")


def position_of(name: str) -> Position | None:
    """The position that `name_of` gives this name, or None. The name of a step does not tell the length of the warm
    start before it: that is 0 here."""
    match = _NAME.fullmatch(name)
    position = Position(*(int(number or 0) for number in match.groups())) if match else None
    return position if position and name_of(position) == name else None


def outdated(saved: Sequence[Position], *, keep: int, keep_every: int = 0) -> list[Position]:
    """Which of the checkpoints `saved`, in the order they were written, go now that the last of them is there.

    The last `keep` stay, and those after every `keep_every`-th step. Those further on than the one just written stay
    too: they are the former future of a run that was continued from an early checkpoint, until it gets there.
    """
    past = [position for position in saved if _progress(position) <= _progress(saved[-1])]
    return [
        position
        for position in past[:-keep]
        if not (keep_every and position.steps and not position.updates and position.steps % keep_every == 0)
    ]


def verify(path: Path) -> None:
    """Reads every byte of a checkpoint and holds it against the manifest.

    Raises CheckpointError that names the first wrong file and what is wrong with it: missing, foreign (not in the
    manifest), of another size, of other contents, unreadable; or the manifest itself.
    """
    files = _verify_listing(path)["files"]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: _verify_contents(path, name, files[name]["sha256"]), files))


class CheckpointStore:
    """The checkpoints of one directory. One save at a time: begin, write, commit."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0) -> None:
        """`keep` (1 or more) and `keep_every` as in `outdated`."""
        assert keep > 0, "checks of the settings come before"
        self.directory, self.keep, self.keep_every = directory, keep, keep_every

    def begin(self, position: Position, num_bytes: int | None) -> Path:
        """An empty directory aside for the files of a checkpoint of about `num_bytes` (None: not known), on the file
        system of the checkpoints. What dead processes left unfinished is cleared first.

        Raises CheckpointError when too little space is free, or nothing can be written. A quota that the file system
        does not count as its free space is met only while writing.
        """
        partial = self.directory / (name_of(position) + PARTIAL)
        size = num_bytes or 0
        needed = size + size // 20 + SPARE_BYTES
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _sync(self.directory.parent)
            for path in self.directory.iterdir():
                if path.suffix == PARTIAL and position_of(path.stem):
                    shutil.rmtree(path, ignore_errors=True)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise CheckpointError(
                    f"{self.directory} has {_mib(free)} free, {partial.stem} needs {_mib(needed)} ({_mib(size)}, 5 % "
                    f"and {_mib(SPARE_BYTES)} to spare); free some space, lower checkpoint.keep={self.keep}, or move "
                    "run.dir to a larger disk"
                )
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} takes no checkpoint ({error}); make it writable, or move run.dir elsewhere"
            ) from error
        return partial

    def commit(self, partial: Path) -> Path:
        """Makes what `begin` returned, now filled, the newest checkpoint; then lets outdated ones go.

        A process that dies in here leaves the checkpoint before or this one as the newest, whole. What lies at this
        position already is replaced. Raises CheckpointError when something cannot be written; the checkpoints before
        are then as they were.
        """
        final = partial.with_suffix("")
        number = 1 + int(max((n for path in self._all() if (n := _number(path)) < math.inf), default=0))
        try:
            _seal(partial, number)
            if final.exists():
                os.rename(final, final.with_suffix(f"{BEFORE}{number}"))
            os.rename(partial, final)
            _sync(self.directory)
            fresh = self.directory / (POINTER + PARTIAL)
            _write(fresh, f"{final.name}\n".encode())
            os.replace(fresh, self.directory / POINTER)
            _sync(self.directory)
            self._retire()
        except OSError as error:
            raise CheckpointError(
                f"{partial} could not be completed ({error}); earlier checkpoints are as they were; free some space, "
                f"make {self.directory} writable, or move run.dir elsewhere"
            ) from error
        return final

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The checkpoint written last of those that verify, and what is wrong with newer ones and with `latest`.

        One without a readable manifest may be newer than any, so it counts as newer. Nothing is changed or deleted.
        """
        newest, problems = None, []
        for path in reversed(self._all()):
            try:
                verify(path)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                newest = path
                break
        found, expected = self._pointed_to(), newest.name if newest else ""
        if found != expected:
            named = f"names {found!r}" if found else "is missing or empty"
            problems.append(f"{self.directory / POINTER} {named}; the newest whole checkpoint is {expected or 'none'}")
        return newest, problems

    def open(self, which: str) -> tuple[Path | None, list[str]]:
        """What checkpoint.load=`which` means, verified, and the problems met on the way, to be printed.

        `none`: no checkpoint. `latest`: the newest whole one; None, a fresh start, where nothing was ever saved. A
        path: that one and no other. Raises CheckpointError when that one, or all there are, cannot be used.
        """
        if which == "none":
            return None, []
        if which == "latest":
            newest, problems = self.newest_whole()
            if problems and not newest:
                raise CheckpointError(
                    f"checkpoint.load=latest: no whole checkpoint in {self.directory}: {'; '.join(problems)}; set "
                    "checkpoint.load=none to start anew, or to the path of another run's checkpoint"
                )
            return newest, problems
        path = Path(which)
        try:
            verify(path)
        except CheckpointError as error:
            beside, _ = CheckpointStore(path.parent, keep=self.keep).newest_whole()
            instead = beside or self.newest_whole()[0]
            found = f"the newest whole checkpoint is {instead}" if instead else "there is no whole checkpoint"
            raise CheckpointError(
                f"checkpoint.load={which!r}: {error}; {found}: set checkpoint.load={instead or 'none'}"
            ) from error
        return path, []

    def _all(self) -> list[Path]:
        """In the order they were written. Those that cannot tell are last."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read ({error}); make it readable") from error
        paths = [path for name in names if position_of((path := self.directory / name).stem)]
        found = [path for path in paths if not path.suffix or path.suffix.startswith(BEFORE)]
        return sorted(found, key=lambda path: (_number(path), _progress(_position(path))))

    def _pointed_to(self) -> str:
        try:
            return (self.directory / POINTER).read_text(errors="replace").strip()
        except OSError:
            return ""

    def _retire(self) -> None:
        """Lets go of outdated checkpoints. One that is visibly damaged neither stands for a kept one nor is deleted:
        its owner may want to look at it."""
        paths = self._all()
        replaced = [path for path in paths if path.suffix and path.with_suffix("").exists()]
        whole = [path for path in paths if path not in replaced and _looks_whole(path)]
        gone = outdated([_position(path) for path in whole], keep=self.keep, keep_every=self.keep_every)
        for path in [*replaced, *(path for path in whole if _position(path) in gone)]:
            # A checkpoint half deleted must not bear the name of one. What another process still reads may be slow to
            # go (NFS): the next begin tries again.
            doomed = path.with_suffix(PARTIAL)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class RunLock:
    """One run in a run directory: `with RunLock(directory) as lock:` on the one process that writes files.

    `run.lock` is locked with flock(2) and says who holds it. The kernel frees the lock when its holder dies, however it
    dies, and the processes that the holder forked: a file left behind is no obstacle. Where the file system has no
    flock, `lock.warning` says so and nothing keeps a second run out. Where flock is local to a node (Lustre with
    `localflock`, NFS with `local_lock`), a second run is noticed on the same node only.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.warning = directory, ""

    def __enter__(self) -> RunLock:
        """Raises ConfigError when another run holds the lock, or the directory cannot be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (self.directory / "run.lock").open("a+")
            self._lock()
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, started {since}\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"run.dir={self.directory} cannot be written ({error}); set another run.dir") from error
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"run.dir={self.directory} is in use by {holder}; one run writes into a directory at a time: wait for "
                "it, stop it, or set another run.dir"
            ) from None
        except OSError as error:
            self.warning = f"run.dir={self.directory} cannot be locked ({error}): nothing keeps a second run out of it"

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _progress(position: Position) -> tuple[int, int, int]:
    """The order of positions; the length of the warm start, which the name of a step leaves out, decides last."""
    return position.steps, position.updates, position.warm_start


def _position(path: Path) -> Position:
    position = position_of(path.stem)
    assert position is not None
    return position


def _sizes(path: Path) -> dict[str, int]:
    """Bytes of everything under `path`, by its name relative to it, but of directories and the manifest."""
    found = {p.relative_to(path).as_posix(): p.lstat().st_size for p in path.rglob("*") if not p.is_dir()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def _seal(path: Path, number: int) -> None:
    """Hashes the files of a checkpoint into its manifest and waits until all of it is on the disk."""
    sizes = _sizes(path)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_sha256, [path / name for name in sizes]))
        list(pool.map(_sync, [path / name for name in sizes]))
    files = {name: {"bytes": sizes[name], "sha256": digest} for name, digest in zip(sizes, digests, strict=True)}
    _write(path / MANIFEST, _render({"format": FORMAT, "name": path.stem, "number": number, "files": files}))
    for directory in [*(p for p in path.rglob("*") if p.is_dir()), path]:
        _sync(directory)


def _render(manifest: dict[str, Any]) -> bytes:
    """The manifest's text, which has one form for one content, with the SHA-256 of that content among its keys."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path} holds no checkpoint: there is no such directory")
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        del manifest["sha256"]
        whole = _render(manifest) == text
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing, so this is no checkpoint, or not all of one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error})") from error
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: {MANIFEST} does not hold what was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: {MANIFEST} has format {manifest['format']}, this version of gspo_megatron reads {FORMAT}; use "
            "the version that wrote it"
        )
    return manifest


def _verify_listing(path: Path) -> dict[str, Any]:
    """The manifest, after names and sizes were held against it. Raises CheckpointError as `verify` does."""
    manifest = _read_manifest(path)
    # A copy may bear any name but that of another position.
    if position_of(path.stem) and path.stem != manifest["name"]:
        raise CheckpointError(f"{path}: {MANIFEST} is that of {manifest['name']}")
    try:
        files, found = manifest["files"], _sizes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    for name in sorted({*files, *found}):
        if name not in found:
            raise CheckpointError(f"{path}: {name} is missing")
        if name not in files:
            raise CheckpointError(f"{path}: {name} is foreign: it is not in {MANIFEST}")
        if found[name] != files[name]["bytes"]:
            raise CheckpointError(
                f"{path}: {name} has {found[name]} bytes, not the {files[name]['bytes']} that were written"
            )
    return manifest


def _verify_contents(path: Path, name: str, written: str) -> None:
    try:
        found = _sha256(path / name)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
    if found != written:
        raise CheckpointError(
            f"{path}: {name} does not hold what was written (SHA-256 {found[:12]}..., not {written[:12]}...)"
        )


def _looks_whole(path: Path) -> bool:
    try:
        return bool(_verify_listing(path))
    except CheckpointError:
        return False


def _number(path: Path) -> float:
    try:
        return float(_read_manifest(path)["number"])
    except CheckpointError:
        return math.inf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
