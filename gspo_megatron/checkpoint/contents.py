"""The files of a checkpoint (mcore/saving.py says what they hold): their names, run.json, and the model it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.shards import ShardFiles
from gspo_megatron.models.shape import OPTIONAL, ModelShape


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def files_of(path: Path, about: dict[str, Any]) -> ShardFiles:
    """The shards of all processes; `about` is run.json."""
    return ShardFiles([path / file_name(rank) for rank in range(about["num_files"])])


def read_about(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = path / "run.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error


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
    return [f"model.{key}={saved[key]}, not {own}" for key, own in shape.tensor_settings().items() if saved[key] != own]
