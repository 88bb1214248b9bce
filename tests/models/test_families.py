"""Every family: shape and config.json agree, and its rules name every tensor of the model once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.models.names import find_rule
from gspo_megatron.models.presets import PRESETS
from gspo_megatron.models.shape import ModelShape
from tests.support.qwen3_moe import hub_sizes, our_sizes

SIZE = st.integers(1, 1 << 20)
SHAPES = st.builds(
    ModelShape,
    family=st.sampled_from(sorted(FAMILIES)),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "head_dim",
            "num_experts",
            "experts_per_token",
            "expert_ffn_size",
            "vocab_size",
            "max_sequence_length",
        ),
        SIZE,
    ),
    rope_base=st.floats(1, 1e8),
    norm_epsilon=st.floats(1e-12, 1),
    tie_embeddings=st.booleans(),
)

# config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@given(SHAPES)
def test_a_shape_comes_back_from_its_config_json(shape: ModelShape) -> None:
    family = family_of(shape)
    assert family.hf_config(shape)["model_type"] == family.name == shape.family
    assert family.shape(family.hf_config(shape)) == shape


def test_the_preset_is_the_model_on_the_hub_with_a_shorter_context() -> None:
    settings = ["model.preset=qwen3_30b_a3b", "train.tokens_per_micro_batch=40960", "model.max_sequence_length=40960"]
    shape = load_config(None, settings).model.shape
    assert FAMILIES["qwen3_moe"].shape(QWEN3_30B_A3B) == shape
    ours = family_of(shape).hf_config(shape)
    assert ours.items() <= QWEN3_30B_A3B.items()


def test_transformers_5_writes_some_keys_elsewhere() -> None:
    newer = {key: value for key, value in QWEN3_30B_A3B.items() if key not in ("rope_theta", "num_experts")}
    newer |= {"num_local_experts": 128, "mlp_only_layers": None}
    newer["rope_parameters"] = {"rope_theta": 1000000.0, "rope_type": "default"}
    family = FAMILIES["qwen3_moe"]
    assert family.shape(newer) == family.shape(QWEN3_30B_A3B)
    del newer["head_dim"]
    assert family.shape(newer).head_dim == 2048 // 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False, but only True"),
        ({"attention_bias": True}, "attention_bias=True, but only False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\], but only \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2, but only 1"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE of type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "RoPE of type 'llama3'"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES["qwen3_moe"].shape(QWEN3_30B_A3B | change)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "vocab_size", "norm_topk_prob"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        FAMILIES["qwen3_moe"].shape({name: value for name, value in QWEN3_30B_A3B.items() if name != key})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset: str) -> None:
    shape = load_config(None, [f"model.preset={preset}", "train.tokens_per_micro_batch=32768"]).model.shape
    assert list(family_of(shape).complaints(shape)) == []


@pytest.mark.parametrize("tie", [False, True])
def test_rules_name_every_tensor_once_both_ways(tie: bool) -> None:
    settings = ["model.num_layers=11", "model.num_experts=12", "model.vocab_size=97", f"model.tie_embeddings={tie}"]
    shape = load_config(None, settings).model.shape
    family = family_of(shape)
    start = itertools.count()
    ours = {name: torch.full(size, next(start)) for name, size in our_sizes(shape).items()}
    theirs, back = {}, {}
    for name, whole in ours.items():
        rule, names = find_rule(family.rules, name)
        parts = rule.op.to_theirs(whole, shape)
        assert not theirs.keys() & set(names), f"{names} come from two tensors"
        theirs |= dict(zip(names, parts, strict=True))
        back[name] = rule.op.to_ours([theirs[their] for their in names], shape)
    assert {name: tuple(part.shape) for name, part in theirs.items()} == hub_sizes(shape)
    assert all(torch.equal(back[name], whole) for name, whole in ours.items())
    assert family.counts(shape).total(shape.num_layers, shape.num_experts) == sum(p.numel() for p in theirs.values())
