"""Folders that are no model of their config.json are refused by their headers, by file and name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.inspection import check_folder, inspect
from gspo_megatron.config.loading import load_config
from gspo_megatron.models.shape import ModelShape
from tests.support.hugging_face import model_folder

PRESETS = ("tiny_moe", "tiny_dense", "tiny_mixtral", "tiny_glm", "tiny_gpt_oss", "tiny_mla", "tiny_qwen3_next")
Tensors = dict[str, torch.Tensor]


def shape_of(preset: str, *more: str) -> ModelShape:
    return load_config(None, [f"model.preset={preset}", "model.vocab_size=61", *more]).model.shape


def change(folder: Path, alter: Callable[[Tensors], Any], **config: Any) -> HuggingFaceFolder:
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return HuggingFaceFolder(folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_folder_of_any_family_is_whole(preset: str, tmp_path: Path) -> None:
    """Also where all experts of a layer are one tensor. Every parameter is counted."""
    shape = shape_of(preset)
    found = inspect(HuggingFaceFolder(model_folder(tmp_path, shape)), shape)
    assert found.whole and found.parameters == found.expected and not found.left_out
    assert all(row.found == row.expected and row.formats == ("F32",) for row in found.rows)


UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t: t.pop(UP), f"there is no {UP}, which config.json asks for"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
            r"there is no model\.layers\.1\.\S+, \S+, \S+ and \d+ more, which",
        ),
        (lambda t: t.pop("lm_head.weight"), "there is no lm_head.weight, which"),
        (lambda t: t.update(visual=torch.zeros(2)), "config.json does not describe visual; download"),
        (
            lambda t: t.update({UP: torch.zeros(3, 7)}),
            rf"model\.safetensors: {UP} has size \[3, 7\], not \[32, 64\] as in config\.json",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(65)}),
            r"model\.safetensors: model\.norm\.weight has size \[65\], not \[64\]",
        ),
        (
            lambda t: t.update({UP: torch.zeros(32, 64, dtype=torch.int8)}),
            rf"model\.safetensors: {UP} has the number format I8; readable are F64",
        ),
    ],
)
def test_what_is_wrong_is_named(alter: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    shape = shape_of("tiny_moe", "model.expert_ffn_size=32", "model.hidden_size=64")
    folder = change(model_folder(tmp_path, shape), alter)
    with pytest.raises(CheckpointError, match=message) as refused:
        check_folder(folder, shape)
    assert f"convert inspect {tmp_path}" in str(refused.value)
    assert not inspect(folder, shape).whole


def test_what_is_left_out_on_purpose(tmp_path: Path) -> None:
    shape = shape_of("tiny_moe", "model.tie_embeddings=true")
    further = f"model.layers.{shape.num_layers}.eh_proj.weight"
    computed = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = {name: torch.ones(1) for name in (further, computed, "lm_head.weight")}
    folder = change(model_folder(tmp_path, shape), lambda t: t.update(more), num_nextn_predict_layers=1)
    assert check_folder(folder, shape).notes == [
        f"left out: {computed}: computed",
        f"left out: {further}: layer {shape.num_layers} predicts several tokens at once, and is not trained",
        "left out: lm_head.weight: tied to the embedding",
    ]
    folder = change(tmp_path, lambda t: None, num_nextn_predict_layers=0, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"does not describe lm_head.weight, {further}; download"):
        check_folder(folder, shape)
