"""Files of rows: which of them a path names, and in which format each is."""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.jsonl import JsonlRows
from gspo_megatron.data.parquet import MAGIC, ParquetRows
from gspo_megatron.data.rows import Record, Rows, existing_file

FORMATS: dict[str, Callable[[Path, Cache], Rows]] = {"jsonl": JsonlRows, "parquet": ParquetRows}
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
"""Of the files that a folder is read for: those with the first of these endings that any has."""


def rows_of_files(path: str, cache: Cache, form: str | None = None) -> Rows:
    """The rows of a file, of the files of a folder, or of those that a pattern matches, in the order of their names.
    `form` is a key of FORMATS; None: known by the first bytes of each file.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    parts = [FORMATS[form or _format_of(file)](file, cache) for file in _files(path)]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _files(path: str) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        for ending in ENDINGS:
            if found := sorted(file for file in place.iterdir() if file.name.endswith(ending)):
                return found
        raise DataError(f"the file {path} is a folder without files that end in {', '.join(ENDINGS)}; name a file")
    if not place.exists() and glob.has_magic(path):
        if not (found := sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())):
            raise DataError(f"no file matches {path}")
        return found
    return [existing_file(place, "a JSONL or Parquet file")]


def _format_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return "parquet" if file.read(len(MAGIC)) == MAGIC else "jsonl"
    except OSError as error:
        raise DataError(f"the file {path} cannot be read ({error})") from error


class JoinedRows:
    """Rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self.identity: dict[str, Any] = {"parts": [part.identity for part in parts]}
        self.num_bytes = sum(part.num_bytes for part in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record | None:
        part, own = self._of(index)
        return part[own]

    def place(self, index: int) -> str:
        part, own = self._of(index)
        return part.place(own)

    def _of(self, index: int) -> tuple[Rows, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)
