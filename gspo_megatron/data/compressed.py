"""Compressed files, known by their first bytes, unpacked once into the cache. A truncated one is noticed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.optional import needed

PIECE = 1 << 20


def compression_of(path: Path) -> str | None:
    """`gzip`, `zstd`, or None for a file that is neither."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for name, (magic, _) in FORMATS.items() if head.startswith(magic)), None)


def unpacked(path: Path, kind: str, state: Mapping[str, Any], cache: Cache) -> Path:
    """The same without compression, in the cache.

    Raises:
        DataError: it is damaged, or ends too early.
    """

    def write(folder: Path) -> None:
        try:
            with path.open("rb") as file, (folder / "plain").open("wb") as out:
                out.writelines(FORMATS[kind][1](file))
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise DataError(
                f"{path} is a {kind} file that is damaged or ends too early ({error}); copy or compress it again"
            ) from error

    return cache.entry("unpacked", state, write) / "plain"


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as plain:
        while piece := plain.read(PIECE):
            yield piece


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own stream takes the end of the file for the end of the data."""
    zstandard = needed("zstandard", "a .zst file")
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    while piece := file.read(PIECE):
        while piece:
            begun = True
            try:
                yield frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            piece = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    if begun:
        raise EOFError("the last frame has no end")


FORMATS: dict[str, tuple[bytes, Callable[[BinaryIO], Iterator[bytes]]]] = {
    "gzip": (b"\x1f\x8b", _gzip),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}
"""Name -> (its first bytes, file -> pieces of what it holds)."""
