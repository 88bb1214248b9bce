"""Files that exist only once they are complete, and digests of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PARTIAL = ".tmp"
"""Ends the name of a file that is being written."""


READ_WHOLE, BLOCK, BLOCKS = 64 << 20, 1 << 20, 64
"""Bytes of a file that is read whole for its digest; of a larger one, BLOCKS blocks of BLOCK bytes."""


def digest_of(*files: Path) -> str:
    """SHA-256, in hexadecimal digits, of the sizes and bytes of files, in order. Of a file above READ_WHOLE bytes,
    blocks that are spread from its first byte to its last: no file takes more than a tenth of a second or so.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            if size <= READ_WHOLE:
                digest.update(file.read())
                continue
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def read_regular(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, or is something else, such as a FIFO, which would be waited for.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path.read_bytes()


@contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """A text file that gets the name `path`, replacing what had it, when the block ends. If the block raises, `path` is
    as it was."""
    aside = path.with_name(path.name + PARTIAL)
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
