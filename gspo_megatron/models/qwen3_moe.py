"""Qwen3-MoE: RMSNorm, q/k norm, grouped-query attention, RoPE, SwiGLU experts in every layer, softmax-top-k router.

Names and settings: Hugging Face transformers 5.23, models/qwen3_moe; https://huggingface.co/Qwen/Qwen3-30B-A3B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.shape import ModelShape

NAME = "qwen3_moe"
USES = parts.GROUPED_QUERY | parts.EXPERTS

RULES = (*parts.BLOCK_RULES, parts.QKV_RULE, *parts.QK_NORM_RULES, *parts.EXPERT_RULES)

CONFIG = ConfigKeys(
    NAME,
    "Qwen3MoeForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
    },
    only={
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "use_sliding_window": (False, False),
        "norm_topk_prob": (True, False),
        "decoder_sparse_step": (1, 1),
        "mlp_only_layers": ([], []),
    },
)


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found = CONFIG.read(hf)
    return ModelShape(
        head_dim=config_json.read_head_dim(hf),
        **found,
        **config_json.read_rope(hf, NAME),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(s, head_dim=s.head_dim)


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return parts.transformer(s) | parts.grouped_query(s, qk_norm=True) | parts.softmax_router(s)


def counts(s: ModelShape) -> ParameterCount:
    """qkv and output projections, two norms, q/k norms, router; gate, up, down."""
    return sizes.parameter_count(s, sharded=sizes.grouped_query_sizes(s)[0], replicated=2 * s.head_dim)


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections, the router, the chosen experts."""
    norms = 2 * s.hidden_size + 2 * s.head_dim
    return (sizes.token_count(s, counts(s).layers[0], added=norms),) * s.num_layers


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups, ep experts, etp columns of an expert."""
    return sizes.grouped_query_shares(s) + sizes.expert_shares(s)


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    yield from sizes.router_complaints(s)
    yield from sizes.grouped_query_complaints(s)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """Two layers, or one per (virtual) stage; two heads per group; two groups, or one per tp rank; 4 experts, rounded
    up to a multiple of ep."""
    return sizes.small_grouped_query(axes) | sizes.small_experts(s, axes)


QWEN3_MOE = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
