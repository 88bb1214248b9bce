"""JSONL files: one JSON object a line, read line by line, or by number through an index of where the lines begin."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.cache import ArrayWriter, Cache, arrays
from gspo_megatron.data.compressed import compression_of, unpacked
from gspo_megatron.data.rows import Record, RowError, existing_file, state_of

CHUNK = 1 << 24


class JsonlRows:
    """The lines of a JSONL file, which may be compressed by gzip or Zstandard, whatever its name says.

    A large file stays on disk: an index of 8 bytes a line is made once, and a row is read when it is asked for.

    Raises:
        DataError: a missing or unreadable file, or a compressed one that is damaged or truncated.
    """

    def __init__(self, path: str | Path, cache: Cache) -> None:
        self.path = existing_file(path)
        state = state_of(self.path)
        kind = compression_of(self.path)
        plain = unpacked(self.path, kind, state, cache) if kind else self.path
        self._file = plain.open("rb")
        self._seen = os.fstat(self._file.fileno())
        self.num_bytes = self._seen.st_size
        self._bytes = self._file.read() if self.num_bytes < cache.least_bytes else None
        found = arrays(cache, "lines", state, self._index, num_bytes=self.num_bytes)
        self._starts, self._about = found.values["starts"], found.about

    @property
    def identity(self) -> dict[str, Any]:
        return {"sha256": self._about["sha256"]}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Record | None:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        return read_line(self._read(start, end), self.place(index))

    def place(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def _read(self, start: int, end: int) -> bytes:
        if self._bytes is not None:
            return self._bytes[start:end]
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._seen.st_size, self._seen.st_mtime_ns):
            raise DataError(
                f"{self.path} was changed while the run reads it: {self._seen.st_size:,} bytes at the start, "
                f"{now.st_size:,} now; put the old file back to continue the run, and write new data to another file"
            )
        return os.pread(self._file.fileno(), end - start, start)

    def _index(self, writer: ArrayWriter) -> dict[str, Any]:
        """Where every line begins, and the end of the last one."""
        digest, at = hashlib.sha256(), 0
        writer.append("starts", np.zeros(1, np.int64))
        for start in range(0, self.num_bytes, CHUNK):
            chunk = self._read(start, min(start + CHUNK, self.num_bytes))
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + start + 1
            writer.append("starts", ends)
            at = int(ends[-1]) if len(ends) else at
        if at < self.num_bytes:
            writer.append("starts", np.array([self.num_bytes]))
        return {"sha256": digest.hexdigest()}


def read_line(line: bytes, place: str) -> Record | None:
    """The object of a line; None for a blank one.

    Raises:
        RowError: text that is not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        # Its own line would be 1, after the place, which has the file's.
        why = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(f"{place}: not JSON in UTF-8 ({why}); expected one object per line", "not JSON") from error
    if isinstance(record, dict):
        return record
    if text.strip():
        raise RowError(f"{place}: found {text.strip()[:60]!r}; expected a JSON object, {{...}}", "not an object")
    return None


def read_records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """(place, object) for every line of a JSONL file that is not blank; `place` is "file:line", for messages.

    Raises:
        DataError: a missing file, or a line that is not a JSON object.
    """
    path = existing_file(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"the file {path} cannot be read ({error})") from error
    with file as lines:
        for number, line in enumerate(lines, start=1):
            if (record := read_line(line, place := f"{path}:{number}")) is not None:
                yield place, record
