"""Saving on request and by the clock: the run saves at its next safe point and goes on.

checkpoint.save_every_s   seconds since the last save
touch RUN/save            now; the file is deleted once the run has saved
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


class SaveRequest:
    """Whether a save is due. The main process asks its clock and its disk; on the others nothing is ever due.

    Args:
        every_s: seconds between saves; 0: not by the clock.
        file: its existence asks for a save. None: this process does not look.
    """

    def __init__(self, *, every_s: float, file: Path | None) -> None:
        self._every_s, self._file = every_s, file
        self._saved_at = time.monotonic()
        self.by_file = False
        """Whether the file was there when `is_set` last looked. The run then waits until the save is complete."""

    def is_set(self) -> bool:
        if self._file is None:
            return False
        self.by_file = self._file.exists()
        return self.by_file or 0 < self._every_s <= time.monotonic() - self._saved_at

    def saved(self) -> None:
        """The run has just been saved: restarts the clock, and deletes the file if it was seen."""
        self._saved_at = time.monotonic()
        if self.by_file and self._file is not None:
            with suppress(FileNotFoundError):
                self._file.unlink()
        self.by_file = False
