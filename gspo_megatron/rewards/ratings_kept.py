"""Ratings by the digest of what was asked, in memory and in a folder."""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path
from typing import TextIO

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import parts

MOST = 1_000_000
"""Ratings in memory, some 200 MB; later ones are not kept."""


class KeptRatings:
    """Each process appends lines of JSON to a file of its own in `folder`, and reads those of all when it begins. A
    line that cannot be read, such as the last one of a process that was killed, is a rating that is asked for again.

    Raises:
        ConfigError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | None) -> None:
        self._ratings: dict[str, dict[str, float]] = {}
        self._folder = Path(folder) if folder else None
        self._file: TextIO | None = None
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self._folder.glob("*.jsonl")):
                self._read(file)
        except OSError as error:
            raise ConfigError(
                f"cache={folder!r} cannot be used ({error}); name a folder that can be written"
            ) from error

    def _read(self, file: Path) -> None:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    key, values = json.loads(line)
                    values = parts(values)
                except (ValueError, TypeError, RecursionError, OverflowError):
                    continue
                if isinstance(key, str) and len(self._ratings) < MOST:
                    self._ratings[key] = values

    def get(self, key: str) -> dict[str, float] | None:
        return self._ratings.get(key)

    def put(self, key: str, values: dict[str, float]) -> None:
        if key in self._ratings or len(self._ratings) >= MOST:
            return
        self._ratings[key] = values
        if self._folder is None:
            return
        try:
            if self._file is None:
                self._file = (self._folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8")
            self._file.write(json.dumps([key, values]) + "\n")
            self._file.flush()
        except OSError as error:
            warnings.warn(f"ratings are kept in memory only: {self._folder} cannot be written ({error})", stacklevel=2)
            self._folder = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
