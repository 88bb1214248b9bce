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
}
