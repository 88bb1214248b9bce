"""Rows that a user's own function returns."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re

from gspo_megatron.base.errors import ConfigError, DataError, shortened
from gspo_megatron.data.rows import Record, RowError

NAME = re.compile(r"[\w.]+:\w+")


class UserRows:
    """What `module:function` returns, called with `split=` ("train" or "eval") where it takes one: an iterable of
    dictionaries. It is read to its end at once, and has to be the same on every process.

    Raises:
        ConfigError: the function cannot be imported or called.
        DataError: it raises, or returns something else.
    """

    def __init__(self, spec: str, split: str) -> None:
        self.spec = spec
        module, _, name = spec.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            takes_split = "split" in inspect.signature(function).parameters
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"the source {spec!r} cannot be used ({type(error).__name__}: {shortened(str(error))}); expected a "
                "function in a module that Python can import from the working folder"
            ) from error
        try:
            self._rows = list(function(split=split) if takes_split else function())
        except (Exception, SystemExit) as error:
            raise DataError(f"{spec} failed: {type(error).__name__}: {shortened(str(error))}") from error
        digest, self.num_bytes = hashlib.sha256(), 0
        for row in self._rows:
            text = json.dumps(row, sort_keys=True, default=str).encode()
            digest.update(text)
            self.num_bytes += len(text)
        self.identity = {"sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record | None:
        row = self._rows[index]
        if not isinstance(row, dict):
            raise RowError(f"{self.place(index)}: found {str(row)[:60]!r}; expected a dictionary", "not an object")
        return row

    def place(self, index: int) -> str:
        return f"{self.spec}, row {index + 1}"
