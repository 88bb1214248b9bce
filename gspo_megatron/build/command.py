"""What the commands share: how they read their arguments, and how they end."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from gspo_megatron.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    EnginesDown,
    GuardError,
    Refused,
    StartError,
    UnfitEngine,
    WrongWeights,
    printable,
)
from gspo_megatron.device import torchrun
from gspo_megatron.run.stop import FAILED, REFUSED, STOPPED, STOPPED_BY_GUARD

STATUSES: dict[type[Exception], int] = {
    ConfigError: REFUSED,
    DataError: REFUSED,
    CheckpointError: REFUSED,
    StartError: FAILED,
    EnginesDown: STOPPED,
    UnfitEngine: REFUSED,
    Refused: REFUSED,
    WrongWeights: STOPPED_BY_GUARD,
    EngineError: FAILED,
    GuardError: STOPPED_BY_GUARD,
}
"""Errors that a user meets, and the exit status of a command that ends with one."""
KNOWN_ERRORS = tuple(STATUSES)


def reported(error: Exception) -> int:
    """Says which of KNOWN_ERRORS ends the command; returns the exit status."""
    kind = next(kind for kind in KNOWN_ERRORS if isinstance(error, kind))
    report(f"{kind.__name__}: {error}")
    return STATUSES[kind]


def report(error: str) -> None:
    """Says why the command ends: once for the processes of a node, and in torchrun's report."""
    error = printable(error)
    if torchrun.leave_message(error):
        print(error, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Reports a usage error as every other: once, though each process of torchrun parses the same command."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")
