"""GLM-4.5: grouped-query attention with biases and a partial RoPE, with q/k norms in the larger model; networks,
experts and router as DeepSeek-V3 has them.

arXiv 2508.06471, Section 2.1. Names and settings: Hugging Face transformers 5.23, models/glm4_moe;
https://huggingface.co/zai-org/GLM-4.5-Air. Its multi-token prediction layers are not implemented; transformers
ignores them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.shape import ModelShape

NAME = "glm4_moe"
ATTENTION = frozenset({"qk_norm", "attention_bias", "partial_rotary_factor"})
USES = parts.GROUPED_QUERY | ATTENTION | parts.EXPERTS | parts.SIGMOID_ROUTER | parts.DENSE_AND_SHARED

RULES = (
    *parts.BLOCK_RULES,
    parts.QKV_RULE,
    replace(parts.QKV_BIAS_RULE, present=lambda s, _: s.attention_bias),
    *(replace(rule, present=lambda s, _: s.qk_norm) for rule in parts.QK_NORM_RULES),
    *parts.SIGMOID_ROUTER_RULES,
)

CONFIG = ConfigKeys(
    NAME,
    "Glm4MoeForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        **config_json.SIGMOID_ROUTER_SIZES,
    },
    only={"hidden_act": ("silu", "silu"), "norm_topk_prob": (True, True)},
)


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found = CONFIG.read(hf, shared="n_shared_experts")
    return ModelShape(
        head_dim=config_json.read_head_dim(hf),
        qk_norm=hf.get("use_qk_norm", False),
        attention_bias=hf.get("attention_bias", False),
        shared_expert_ffn_size=found.pop("shared") * found["expert_ffn_size"],
        **found,
        **config_json.read_rope(hf, NAME, partial=0.5),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(
        s,
        head_dim=s.head_dim,
        use_qk_norm=s.qk_norm,
        attention_bias=s.attention_bias,
        partial_rotary_factor=s.partial_rotary_factor,
        n_shared_experts=s.shared_expert_ffn_size // s.expert_ffn_size,
        num_nextn_predict_layers=0,
    )


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return parts.transformer(s) | parts.grouped_query(s, qk_norm=s.qk_norm) | parts.sigmoid_router(s)


def counts(s: ModelShape) -> ParameterCount:
    """Attention: qkv with its bias and output projections, q/k norms."""
    projections, width = sizes.grouped_query_sizes(s)
    return sizes.parameter_count(
        s, sharded=projections + s.attention_bias * width, replicated=s.qk_norm * 2 * s.head_dim
    )


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections; a dense network, or router, shared expert and the chosen experts."""
    bias = s.attention_bias * sizes.grouped_query_sizes(s)[1]
    added = 2 * s.hidden_size + s.qk_norm * 2 * s.head_dim + bias
    return tuple(sizes.token_count(s, n, added=added) for n in counts(s).layers)


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups and the dense and shared networks, ep experts, etp columns of an expert."""
    return sizes.grouped_query_shares(s) + sizes.network_shares(s) + sizes.expert_shares(s)


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    yield from sizes.grouped_query_complaints(s)
    yield from sizes.sigmoid_router_complaints(s, NAME)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """As in sizes.py."""
    return sizes.small_grouped_query(axes) | sizes.small_sigmoid_router(s, axes)


GLM4_MOE = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
