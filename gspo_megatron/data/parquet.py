"""Parquet files, turned once into Arrow files, which are memory-mapped: any row at once, in shared memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.cache import ABOUT, Cache, sha256_of_file
from gspo_megatron.data.optional import needed
from gspo_megatron.data.rows import Record, existing_file, state_of

MAGIC = b"PAR1"
BATCH = 16_384
"""Rows converted together."""


class ParquetRows:
    """The rows of a Parquet file.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a missing file, or one that is damaged or no Parquet.
    """

    def __init__(self, path: str | Path, cache: Cache) -> None:
        self._arrow = needed("pyarrow", "a Parquet file")
        self.path = existing_file(path, "a Parquet file")
        state = state_of(self.path)
        self.num_bytes: int = state["bytes"]
        if self.num_bytes < cache.least_bytes:
            digest = sha256_of_file(self.path)
            self._table = self._arrow.Table.from_batches(self._batches(), self._schema())
        else:
            folder = cache.entry("arrow", state, self._write)
            digest = json.loads((folder / ABOUT).read_text())["sha256"]
            mapped = self._arrow.memory_map(str(folder / "rows.arrow"))
            self._table = self._arrow.ipc.open_file(mapped).read_all()
        self.identity = {"sha256": digest}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Record | None:
        found: list[Record] = self._table.slice(index, 1).to_pylist()
        return found[0]

    def place(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def _open(self) -> Any:
        try:
            return needed("pyarrow.parquet", "a Parquet file").ParquetFile(self.path)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _schema(self) -> Any:
        """Of the file; values that it numbers are written out, because an Arrow file has one numbering for all rows."""
        pa = self._arrow
        names = self._open().schema_arrow
        repeated = [name for name in names.names if names.names.count(name) > 1]
        if repeated:
            raise DataError(f"{self.path} has several columns called {repeated[0]!r}; rename them")
        plain = (f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in names)
        return pa.schema(list(plain))

    def _batches(self) -> Iterator[Any]:
        schema = self._schema()
        try:
            for batch in self._open().iter_batches(BATCH):
                yield batch if batch.schema.equals(schema) else batch.cast(schema)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _write(self, folder: Path) -> None:
        with self._arrow.ipc.new_file(str(folder / "rows.arrow"), self._schema()) as out:
            for batch in self._batches():
                out.write_batch(batch)
        (folder / ABOUT).write_text(json.dumps({"sha256": sha256_of_file(self.path)}))

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} cannot be read as Parquet ({error}); copy or write it again")
