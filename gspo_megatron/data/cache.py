"""What is derived from a user's data once, in files that the processes of a node share: memory-mapped, read-only.

An entry is a folder, written under another name and renamed when it is complete, so that a half-written one is never
read. Processes of a node that need the same entry wait for the one that makes it; nodes that share the folder may make
it twice, and the first to finish wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gspo_megatron.base.errors import DataError

VERSION = 1
"""Of the entries' contents: a new one makes all of them again."""
ABOUT = "about.json"

DEFAULT = "~/.cache/gspo_megatron"

Array = NDArray[Any]


@dataclass(frozen=True)
class Cache:
    """A folder of entries. Data of fewer than `least_bytes` is not worth one: every process reads it for itself, and it
    leaves nothing on disk.

    Raises:
        DataError: it cannot be written, or is full.
    """

    folder: Path = field(default_factory=Path(DEFAULT).expanduser)
    least_bytes: int = 8 << 20

    def entry(self, kind: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of an entry. `key` decides its content, and `make` writes that into a new folder."""
        digest = sha256_of([VERSION, kind, key])
        path = self.folder / f"{kind}-{digest[:32]}"
        if path.is_dir():
            return path
        try:
            with self.locked(path.name):
                if not path.is_dir():
                    self._make(path, make)
        except OSError as error:
            raise DataError(
                f"the cache of prepared data cannot be written: {error}; free space there, or set run.cache to "
                "another folder"
            ) from error
        return path

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Inside, no other process of this node is inside. Some network file systems have no locks: then work may be
        done twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("a") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        own = f"{path.name}.{socket.gethostname()}."
        for left in self.folder.glob(f"{own}*"):  # by a process of this node that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=own, dir=self.folder))
        try:
            new.chmod(0o755)
            make(new)
            for file in new.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            new.rename(path)
        except OSError:
            if not path.is_dir():  # else another node was first
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


class Arrays(NamedTuple):
    """Arrays by name, and what else is known of them, as JSON."""

    values: Mapping[str, Array]
    about: dict[str, Any]
    folder: Path | None = None


class ArrayWriter(Protocol):
    def append(self, name: str, values: Array) -> None:
        """Adds to the end of an array."""


def arrays(
    cache: Cache,
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[ArrayWriter], dict[str, Any]],
    *,
    num_bytes: int,
) -> Arrays:
    """The arrays that `make` writes, with what it returns about them: from the cache, or, of small data, in memory."""
    if num_bytes < cache.least_bytes:
        writer = _InMemory()
        about = make(writer)
        return Arrays({name: np.concatenate(parts) for name, parts in writer.parts.items()}, about)

    def write(folder: Path) -> None:
        with contextlib.ExitStack() as files:
            about = make(_InFiles(folder, files))
        (folder / ABOUT).write_text(json.dumps(about))

    folder = cache.entry(kind, key, write)
    try:
        about = json.loads((folder / ABOUT).read_text())
        found = {path.stem: _mapped(path) for path in folder.iterdir() if path.suffix != ".json"}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be read ({error}); delete it, and it is made again") from error
    return Arrays(found, about, folder)


def _mapped(path: Path) -> Array:
    dtype = np.dtype(path.suffix[1:])
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


@dataclass
class _InMemory:
    parts: dict[str, list[Array]] = field(default_factory=dict)

    def append(self, name: str, values: Array) -> None:
        self.parts.setdefault(name, []).append(values)


@dataclass
class _InFiles:
    folder: Path
    stack: contextlib.ExitStack
    files: dict[str, Any] = field(default_factory=dict)

    def append(self, name: str, values: Array) -> None:
        if name not in self.files:
            path = self.folder / f"{name}.{values.dtype.name}"
            self.files[name] = self.stack.enter_context(path.open("wb"))
        self.files[name].write(values.tobytes())


def sha256_of(value: Any) -> str:
    """Of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Of all its bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
