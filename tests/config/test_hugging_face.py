"""Settings that come from a folder's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config, replaced, to_yaml
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.shape import ModelShape

SHAPE = ModelShape(
    family="qwen3_moe",
    num_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    vocab_size=509,
    max_sequence_length=128,
    rope_base=500.0,
    norm_epsilon=1e-5,
    tie_embeddings=True,
    num_query_groups=2,
    head_dim=8,
    num_experts=12,
    experts_per_token=3,
    expert_ffn_size=32,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changed: Any) -> None:
    config = FAMILIES["qwen3_moe"].hf_config(SHAPE) | changed
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_shape_is_that_of_the_folder(folder: Path) -> None:
    config = load_config(None, [f"model.hf={folder}", "model.init_std=0.1"])
    assert config.model.shape == SHAPE
    (folder / "config.yaml").write_text(to_yaml(config))
    assert load_config(folder / "config.yaml") == config


def test_a_size_may_repeat_the_folder_and_sequences_may_be_shorter(folder: Path) -> None:
    config = load_config(None, [f"model.hf={folder}", "model.num_layers=3", "model.max_sequence_length=64"])
    assert config.model.num_layers == 3 and config.model.max_sequence_length == 64
    assert load_config(None, [f"model.hf={folder}", "model.vocab_size=null"]).model.vocab_size == 509


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=4", "model.num_layers=4 contradicts config.json in model.hf=.*which has 3"),
        ("model.tie_embeddings=false", "tie_embeddings=False contradicts"),
        ("model.max_sequence_length=256", "has 128; the model was made for that length"),
        ("model.preset=qwen3_30b_a3b", "both give the sizes of the model"),
        ("model.preset=tiny_moe", "both give the sizes of the model"),
    ],
)
def test_what_contradicts_the_folder_is_refused(override: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"model.hf={folder}", override])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "the model_type 'llama' is unknown.*Known: .*qwen3_moe.*deepseek_v3"),
        ({"model_type": ...}, "names no model_type; known are qwen3_moe"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **changed)
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"model.hf={tmp_path}"])


def test_a_folder_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*config\.json; give the folder of a Hugging Face model"):
        load_config(None, [f"model.hf={tmp_path / 'nowhere'}"])


def test_a_folder_is_chosen_before_settings_are_complete(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.hf='x' cannot be replaced after loading"):
        replaced(load_config(None, []), {"model.hf": "x"})
