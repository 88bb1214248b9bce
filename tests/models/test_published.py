"""Shapes of published models, from their config.json, and what of them is not implemented."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.models.family import TokenCount

COMMON_KEYS: dict[str, Any] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-0.6B
    "qwen3_0p6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1
    "mixtral_8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    # https://huggingface.co/zai-org/GLM-4.5-Air
    "glm_4p5_air": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
}
PUBLISHED["gpt_oss_120b"] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
"""The defaults of GptOssConfig of transformers 5.23, which are gpt-oss-120b's."""
# https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct
PUBLISHED["qwen3_next_80b_a3b"] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
TOTAL = {
    "qwen3_next_80b_a3b": 79_674_391_296,
    "gpt_oss_120b": 116_829_156_672,
    "qwen3_0p6b": 596_049_920,
    "mixtral_8x7b": 46_702_792_704,
    "glm_4p5_air": 106_852_245_504,
}
"""Parameters. Model cards: 0.6B (0.44B without embedding), 46.7B, 106B; gpt-oss: 116.83B; Qwen3-Next: 80B."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_models_on_the_hub_with_a_shorter_context(preset: str) -> None:
    hf = COMMON_KEYS | PUBLISHED[preset]
    length = hf["max_position_embeddings"]
    settings = [f"model.preset={preset}", f"train.tokens_per_micro_batch={length}"]
    shape = load_config(None, [*settings, f"model.max_sequence_length={length}"]).model.shape
    family = family_of(shape)
    assert family.shape(hf) == shape
    ours = {key: value for key, value in family.hf_config(shape).items() if key != "num_nextn_predict_layers"}
    if (scaling := ours.pop("rope_scaling")) is not None:
        assert {hf["rope_scaling"].get(key, value) for key, value in scaling.items()} == set(scaling.values())
    assert {key: hf.get(key, ours[key]) for key in ours} == ours
    assert family.counts(shape).total == TOTAL[preset]


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("qwen3_0p6b", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_0p6b", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_0p6b", {"layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 8}, "as layer 20"),
        ("qwen3_0p6b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
        ("mixtral_8x7b", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral_8x7b", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt_oss_120b", {"layer_types": ["sliding_attention"] * 36}, "as layer 1"),
        ("gpt_oss_120b", {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ("gpt_oss_120b", {"attention_bias": False}, "attention_bias=False"),
        ("gpt_oss_120b", {"sliding_window": None}, "sliding_window"),
        ("qwen3_next_80b_a3b", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen3_next_80b_a3b", {"mlp_only_layers": [3]}, "mlp_only_layers=[3]"),
        ("qwen3_next_80b_a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_next_80b_a3b", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_next_80b_a3b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
        ("qwen3_next_80b_a3b", {"layer_types": ["full_attention", "linear_attention"] * 24}, "as layer 0"),
        ("qwen3_next_80b_a3b", {"linear_num_key_heads": None}, "lacks linear_num_key_heads"),
        ("qwen3_next_80b_a3b", {"hidden_size": "2048"}, "has hidden_size='2048', which is not a number"),
        ("glm_4p5_air", {"n_group": True}, "has n_group=True, which is not a number"),
        ("glm_4p5_air", {"norm_topk_prob": False}, "norm_topk_prob=False, but only True"),
        ("glm_4p5_air", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
    ],
)
def test_what_is_not_implemented_of_other_families_is_refused(
    preset: str, change: dict[str, Any], message: str
) -> None:
    hf = PUBLISHED[preset] | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        FAMILIES[hf["model_type"]].shape(hf)


def test_a_window_of_mixtral_is_read() -> None:
    shape = FAMILIES["mixtral"].shape(PUBLISHED["mixtral_8x7b"] | {"sliding_window": 4096})
    assert shape.sliding_window == 4096
    assert {token.window for token in family_of(shape).per_token(shape)} == {4096}
    assert family_of(shape).hf_config(shape)["sliding_window"] == 4096


def test_pairs_within_a_window() -> None:
    token = TokenCount(multiplied=0, cached=0, attended=1)
    for window in (0, 1, 3, 7, 9):
        found = replace(token, window=window).pairs(7)
        assert found == sum(min(i + 1, window or i + 1) for i in range(7))
