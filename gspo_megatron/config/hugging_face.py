"""The settings of section `model` that a Hugging Face folder determines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import ConfigError, lookup
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.shape import OPTIONAL, ModelShape


def folder_settings(folder: str | Path) -> dict[str, Any]:
    """What config.json of the folder determines: the family, and every field of ModelShape that the family uses.

    Raises:
        ConfigError: config.json is missing or unreadable, is of a family that is not implemented, lacks a size, or uses
            something that is not implemented.
    """
    file = Path(folder) / "config.json"
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(hf, dict):
            raise ValueError("it must hold a JSON object")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"model.hf={folder}: there is no {file}; give the folder of a Hugging Face model, which holds config.json "
            "and safetensors files (to plan a run without it: model.hf=null model.preset=NAME)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.hf={folder}: {file} cannot be read ({error}); download it again") from error
    if "model_type" not in hf:
        raise ConfigError(f"model.hf={folder}: {file} names no model_type; known are {', '.join(FAMILIES)}")
    family = lookup(FAMILIES, str(hf["model_type"]), f"model.hf={folder}: the model_type")
    try:
        shape = family.shape(hf)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"model.hf={folder}: {error}") from error
    return {
        field.name: getattr(shape, field.name)
        for field in fields(ModelShape)
        if field.name not in OPTIONAL.keys() - family.uses
    }


def check_agreement(asked: Mapping[str, Any], found: Mapping[str, Any], folder: str) -> None:
    """`asked`: settings of section `model` that the user gave; `found`: `folder_settings`. A shorter
    max_sequence_length is the user's to choose.

    Raises:
        ConfigError: one contradicts the folder.
    """
    for key, value in asked.items():
        if key == "max_sequence_length" and value <= found[key]:
            continue
        if key in found and value is not None and value != found[key]:
            more = "; the model was made for that length" if key == "max_sequence_length" else ""
            raise ConfigError(
                f"model.{key}={value!r} contradicts config.json in model.hf={folder}, which has {found[key]!r}{more}; "
                f"leave model.{key} out, or use another folder"
            )
