"""Mixtral: as Qwen3-MoE, without q/k norms, under other names, and with an optional window of attention.

Names and settings: Hugging Face transformers 5.23, models/mixtral; https://huggingface.co/mistralai/Mixtral-8x7B-v0.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import NameRule
from gspo_megatron.models.shape import ModelShape

NAME = "mixtral"
USES = parts.GROUPED_QUERY | parts.EXPERTS | {"sliding_window"}

_OURS, _THEIRS = f"{parts.OURS}mlp.", f"{parts.THEIRS}block_sparse_moe."

RULES = (
    *parts.BLOCK_RULES,
    parts.QKV_RULE,
    NameRule(f"{_OURS}router.weight", (f"{_THEIRS}gate.weight",), size=parts.router),
    *parts.feed_forward(
        _OURS + "experts.local_experts.{expert}.",
        _THEIRS + "experts.{expert}.",
        lambda s: s.expert_ffn_size,
        parts.has_experts,
        names=("w1", "w3", "w2"),
    ),
)

CONFIG = ConfigKeys(
    NAME,
    "MixtralForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
    only={
        "hidden_act": ("silu", "silu"),
        "router_jitter_noise": (0.0, 0.0),
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
        sliding_window=hf.get("sliding_window") or 0,
        **found,
        **config_json.read_rope(hf, NAME, base=1_000_000.0),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(s, head_dim=s.head_dim, sliding_window=s.sliding_window or None)


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return parts.transformer(s) | parts.grouped_query(s, qk_norm=False) | parts.softmax_router(s)


def counts(s: ModelShape) -> ParameterCount:
    """qkv and output projections, two norms, router; gate, up, down."""
    return sizes.parameter_count(s, sharded=sizes.grouped_query_sizes(s)[0])


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections, the router, the chosen experts."""
    token = sizes.token_count(s, counts(s).layers[0], added=2 * s.hidden_size, window=s.sliding_window)
    return (token,) * s.num_layers


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups, ep experts, etp columns of an expert."""
    return sizes.grouped_query_shares(s) + sizes.expert_shares(s)


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    yield from sizes.router_complaints(s)
    yield from sizes.grouped_query_complaints(s)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """As in sizes.py, with a window that is shorter than a sequence."""
    window = {"sliding_window": min(s.sliding_window, 6)}
    return sizes.small_grouped_query(axes) | sizes.small_experts(s, axes) | window


MIXTRAL = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
