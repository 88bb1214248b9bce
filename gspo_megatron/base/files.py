"""Files that exist only once they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PARTIAL = ".tmp"
"""Ends the name of a file that is being written."""


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
