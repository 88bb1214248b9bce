"""A model's tensors in shards, stored in files from which any other sharding can be read.

A shard is a contiguous range of elements of one rank's slice (`Place`) of a tensor: what a rank of the distributed
optimizer holds of a parameter, or the share that one of several replicas writes. In the whole matrix its elements form
a few rectangles. A shard of one layout is read from the shards of another through the rectangles that they share, so
nothing is ever gathered: a rank writes what it holds, and reads what it needs.

Files are safetensors (https://huggingface.co/docs/safetensors): a header in JSON, then plain numbers. Reading one runs
no code.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.place import Place

FORMATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
"""safetensors' names of number formats."""
IN_FILE = "pieces"
"""The key of a file's metadata that describes its shards; the name dates from the first format."""


class Rectangle(NamedTuple):
    """Part of a matrix. In the shard it belongs to, its first element is number `first`, and a row begins `pitch`
    elements after the row before."""

    row: int
    column: int
    num_rows: int
    num_columns: int
    first: int
    pitch: int

    def shared(self, other: Rectangle) -> Rectangle | None:
        """What both cover, as part of this one's shard."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        num_rows = min(self.row + self.num_rows, other.row + other.num_rows) - row
        num_columns = min(self.column + self.num_columns, other.column + other.num_columns) - column
        if num_rows <= 0 or num_columns <= 0:
            return None
        first = self.first + (row - self.row) * self.pitch + column - self.column
        return Rectangle(row, column, num_rows, num_columns, first, self.pitch)

    def within(self, elements: Tensor) -> Tensor:
        """[num_rows, num_columns]: a view of this rectangle in `elements`, which begin with its first one."""
        return elements.as_strided((self.num_rows, self.num_columns), (self.pitch, 1))

    @property
    def span(self) -> int:
        """Elements of the shard from its first to its last one."""
        return (self.num_rows - 1) * self.pitch + self.num_columns


@dataclass(frozen=True)
class Shard:
    """Elements `start` to `end` of a rank's slice, flattened. A vector counts as a matrix of one column.

    Attributes:
        place: which slice of which tensor.
        height, width: of the slice.
        num_rows: of the whole matrix. The slices may hold more, which pad the vocabulary and are in no rectangle.
    """

    place: Place
    height: int
    width: int
    num_rows: int
    start: int
    end: int

    @classmethod
    def of(cls, place: Place, tensor: Tensor, num_rows: int | None = None) -> Shard:
        """All of the slice `tensor`. `num_rows`: where the slices hold more rows than the whole matrix."""
        height, width = (*tensor.shape, 1)[:2]
        if num_rows is None:
            num_rows = height * place.count if place.dim == 0 else height
        return cls(place, height, width, num_rows, 0, tensor.numel())

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.num_rows, self.width * (self.place.count if self.place.dim == 1 else 1)

    def rectangles(self) -> Iterator[Rectangle]:
        """What the shard covers of the whole matrix."""
        place, start = self.place, self.start
        assert place.dim == 0 or place.stride == 1, "only a slice of rows can hold several matrices"
        num_bands = place.stride if place.dim == 0 else 1
        band = self.height // num_bands
        while start < self.end:
            row, column = divmod(start, self.width)
            left = self.end - start
            if column or left < self.width:
                num_rows, num_columns = 1, min(left, self.width - column)
            else:
                # Whole rows, up to the end of one of the matrices.
                num_rows, num_columns = min(left // self.width, band - row % band), self.width
            first, start = start - self.start, start + num_rows * num_columns
            if place.dim == 0:
                row += band * (row // band * (place.count - 1) + place.index)
            else:
                column += place.index * self.width
            num_rows = min(num_rows, self.num_rows - row)
            if num_rows > 0:
                yield Rectangle(row, column, num_rows, num_columns, first, self.width)


def write_shards(path: Path, shards: Sequence[tuple[str, Shard, Tensor]]) -> None:
    """Writes (key, shard, its elements [end - start]) into a new file and waits until it is on the disk."""
    names = {dtype: name for name, dtype in FORMATS.items()}
    header: dict[str, object] = {
        "__metadata__": {IN_FILE: json.dumps({key: asdict(shard) for key, shard, _ in shards})}
    }
    end = 0
    for key, _, elements in shards:
        start, end = end, end + elements.nbytes
        header[key] = {"dtype": names[elements.dtype], "shape": list(elements.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, elements in shards:
            file.write(elements.detach().cpu().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class StoredShard(NamedTuple):
    """A shard in a file: where its elements begin, in bytes, and their format."""

    path: Path
    start: int
    dtype: torch.dtype
    shard: Shard

    def elements(self, first: int, count: int) -> Tensor:
        size = self.dtype.itemsize
        read = np.fromfile(self.path, np.uint8, count * size, offset=self.start + first * size)
        if read.size < count * size:
            raise CheckpointError(f"{self.path} is truncated: it ends inside {self.shard.place.name}")
        return torch.from_numpy(read).view(self.dtype)


class ShardFiles:
    """The shards of several files written by `write_shards`.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stored: dict[str, list[StoredShard]] = defaultdict(list)
        for path in paths:
            try:
                for key, stored in _stored_in(path):
                    self._stored[key].append(stored)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error

    def read(self, key: str, shard: Shard, into: Tensor) -> None:
        """Sets `into` [end - start] to the elements of `shard`, however `key` was sharded when written, in the number
        format and on the device of `into`; padding becomes 0.

        Raises:
            CheckpointError: `key` is missing, incomplete, there twice, or of another shape.
        """
        into.zero_()
        # One bit would do; a byte an element is little beside the elements.
        found = torch.zeros(len(into), dtype=torch.bool)
        missing = 0
        for wanted in shard.rectangles():
            missing += wanted.num_rows * wanted.num_columns
            for stored in self._of(key, shard.shape):
                for part in filter(None, (have.shared(wanted) for have in stored.shard.rectangles())):
                    here = wanted.shared(part)
                    assert here is not None
                    source = stored.elements(part.first, part.span)
                    here.within(into[here.first :]).copy_(part.within(source))
                    known = here.within(found[here.first :])
                    if known.any():
                        raise CheckpointError(f"{key} is in the files twice, in part, also in {stored.path}")
                    known.fill_(True)
                    missing -= part.num_rows * part.num_columns
        if missing:
            raise CheckpointError(f"{key} is incomplete in the files")

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of every whole tensor, by its key. A matrix of one column counts as a vector."""
        of_any = {key: stored[0].shard.shape for key, stored in self._stored.items()}
        return {key: (rows, columns) if columns > 1 else (rows,) for key, (rows, columns) in of_any.items()}

    def whole(self, key: str, size: tuple[int, ...]) -> Tensor:
        """All of a tensor of this size, in the number format it was written in.

        Raises:
            CheckpointError: `key` is missing, incomplete, or of another shape.
        """
        stored = self._stored[key][0]
        into = torch.empty(size, dtype=stored.dtype)
        self.read(key, Shard.of(Place(stored.shard.place.name), into), into.view(-1))
        return into

    def _of(self, key: str, shape: tuple[int, int]) -> list[StoredShard]:
        if key not in self._stored:
            raise CheckpointError(f"{key} is in none of the files")
        for stored in self._stored[key]:
            if stored.shard.shape != shape:
                raise CheckpointError(f"{key} is {stored.shard.shape} in {stored.path}, {shape} in this model")
        return self._stored[key]


def _stored_in(path: Path) -> Iterator[tuple[str, StoredShard]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    shards = json.loads(header.pop("__metadata__")[IN_FILE])
    if shards.keys() != header.keys():
        raise ValueError("it describes other tensors than it has")
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shard = Shard(**{**shards[key], "place": Place(**shards[key]["place"])})
        dtype, (start, stop) = FORMATS[entry["dtype"]], entry["data_offsets"]
        _check(shard)
        count = shard.end - shard.start
        if entry["shape"] != [count] or (start, stop) != (end, end + count * dtype.itemsize):
            raise ValueError(f"{key} of {count} elements has shape {entry['shape']} at bytes {start} to {stop}")
        end = stop
        yield key, StoredShard(path, 8 + length + start, dtype, shard)
    if 8 + length + end != path.stat().st_size:
        raise ValueError(f"it has {path.stat().st_size} bytes where its header says {8 + length + end}")


def _check(shard: Shard) -> None:
    """A shard as a file describes it.

    Raises:
        ValueError: numbers that no slice has.
    """
    place = shard.place
    numbers = (shard.height, shard.width, shard.num_rows, shard.start, shard.end, place.index, place.count)
    if any(type(n) is not int or n < 0 for n in numbers) or type(place.stride) is not int:
        raise ValueError(f"{place.name} is described by numbers that are not whole or are negative: {numbers}")
    bands = place.stride if place.dim == 0 else 1
    if not (
        place.index < place.count
        and place.dim in (0, 1)
        and bands >= 1
        and shard.height % bands == 0
        and (place.dim == 0 or place.stride == 1)
        and shard.start <= shard.end <= shard.height * shard.width
    ):
        raise ValueError(f"{place.name} is described by a slice that cannot be: {shard}")
