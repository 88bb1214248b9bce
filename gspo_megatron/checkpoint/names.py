"""The names of checkpoints, and the positions in a run that they stand for."""

from __future__ import annotations

import re
from pathlib import Path

from gspo_megatron.base.batches import Position

CHECKPOINTS = "checkpoints"
"""The subfolder of a run directory."""
PARTIAL, BEFORE = ".tmp", ".before_"


_NAME = re.compile(r"warm_start_(\d+)|step_(\d+)(?:_update_(\d+))?")


def name_of(position: Position) -> str:
    """`warm_start_000020` in the warm start, `step_000010` between steps, `step_000010_update_003` in the step after
    it."""
    warm_start, steps, updates = position
    if warm_start and not (steps or updates):
        return f"warm_start_{warm_start:06d}"
    return f"step_{steps:06d}" + (f"_update_{updates:03d}" if updates else "")


def position_of(name: str) -> Position | None:
    """The position that `name_of` gives this name, or None. A step's name does not contain the length of the warm start
    before it, which is 0 here."""
    match = _NAME.fullmatch(name)
    position = Position(*(int(number or 0) for number in match.groups())) if match else None
    return position if position and name_of(position) == name else None


def progress(position: Position) -> tuple[int, int, int]:
    """The order of positions; the length of the warm start, which the name of a step leaves out, decides last."""
    return position.steps, position.updates, position.warm_start


def position_of_path(path: Path) -> Position:
    position = position_of(path.stem)
    assert position is not None
    return position
