"""Sizes of published models by the name that `model.preset` takes: settings of the section `model`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny_moe": {},
    # https://huggingface.co/Qwen/Qwen3-30B-A3B config.json
    "qwen3_30b_a3b": {
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "head_dim": 128,
        "num_experts": 128,
        "experts_per_token": 8,
        "expert_ffn_size": 768,
        "vocab_size": 151_936,
        "max_sequence_length": 32_768,
        "rope_base": 1_000_000.0,
    },
    # https://huggingface.co/Qwen/Qwen3-235B-A22B config.json
    "qwen3_235b_a22b": {
        "num_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_query_groups": 4,
        "head_dim": 128,
        "num_experts": 128,
        "experts_per_token": 8,
        "expert_ffn_size": 1536,
        "vocab_size": 151_936,
        "max_sequence_length": 32_768,
        "rope_base": 1_000_000.0,
    },
    # https://huggingface.co/deepseek-ai/DeepSeek-V3 config.json; V3-0324 and R1 have the same sizes
    "deepseek_v3": {
        "family": "deepseek_v3",
        "num_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_experts": 256,
        "experts_per_token": 8,
        "expert_ffn_size": 2048,
        "shared_expert_ffn_size": 2048,
        "num_dense_layers": 3,
        "dense_ffn_size": 18_432,
        "router_groups": 8,
        "router_groups_per_token": 4,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129_280,
        "max_sequence_length": 32_768,
        "rope_base": 10_000.0,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 40.0,
        "rope_original_length": 4096,
        "rope_mscale": 1.0,
        "rope_mscale_all_dim": 1.0,
    },
    # DeepSeek-V3 with every part, for tests and demonstrations
    "tiny_mla": {
        "family": "deepseek_v3",
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_experts": 12,
        "experts_per_token": 4,
        "expert_ffn_size": 64,
        "shared_expert_ffn_size": 64,
        "num_dense_layers": 1,
        "dense_ffn_size": 160,
        "router_groups": 4,
        "router_groups_per_token": 2,
        "routed_scaling_factor": 2.5,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_length": 64,
        "rope_mscale": 1.0,
        "rope_mscale_all_dim": 1.0,
    },
}

DEMOS = ("tiny_moe", "tiny_mla")
"""Of these, models that are not published: their lengths mean nothing."""
