"""The files of a checkpoint (mcore/saving.py says what they hold): their names, run.json, and the model it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.base.files import read_regular
from gspo_megatron.checkpoint.fields import COUNT, FLAG, LIST, OBJECT, OBJECTS, check_fields, optional
from gspo_megatron.checkpoint.shards import ShardFiles
from gspo_megatron.models.shape import OPTIONAL, ModelShape

ABOUT = {
    "format": optional(COUNT),  # format 1 does not say
    "state": OBJECT,
    "policy_version": COUNT,
    "adam_step": COUNT,
    "has_reference": FLAG,
    "random": LIST,
    "num_files": COUNT,
    "model": OBJECT,
    "versions": OBJECT,
}
"""The fields of run.json. What the trainer keeps in `state` is checked where it is read (run/state.py)."""


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def files_of(path: Path, about: dict[str, Any]) -> ShardFiles:
    """The shards of all processes; `about` is run.json."""
    return ShardFiles([path / file_name(rank) for rank in range(about["num_files"])])


def read_about(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or lacks something.
    """
    file = path / "run.json"
    try:
        about = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    check_fields(about, ABOUT, str(file))
    return about


def saved_sections(path: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of the run that saved the checkpoint, by section; `about` is its run.json.

    Raises:
        CheckpointError: it has none.
    """
    check_fields(about["state"], {"config": OBJECTS}, f"{path / 'run.json'}, state")
    return about["state"]["config"]


def check_same_model(path: Path, about: dict[str, Any], shape: ModelShape) -> None:
    """
    Raises:
        CheckpointError: the checkpoint's tensors are not those of `shape`.
    """
    if wrong := other_settings(about["model"], shape):
        raise CheckpointError(
            f"{path} holds another model, with {', '.join(wrong)}; restore these settings, or start a run of its own "
            "for the other model: checkpoint.load=none and another run.dir"
        )


def other_settings(saved: dict[str, Any], shape: ModelShape) -> list[str]:
    """Settings of a checkpoint's tensors that differ from those of `shape`."""
    # The only family when checkpoints did not name one; fields that it does not use were added later.
    saved = {"family": "qwen3_moe"} | OPTIONAL | saved
    return [
        f"model.{key}={saved.get(key)}, not {own}"
        for key, own in shape.tensor_settings().items()
        if saved.get(key) != own
    ]
