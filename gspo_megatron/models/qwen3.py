"""Qwen3, dense: as Qwen3-MoE with one SwiGLU network in every layer, and in the small models one vocabulary matrix for
embedding and head.

Names and settings: Hugging Face transformers 5.23, models/qwen3; https://huggingface.co/Qwen/Qwen3-0.6B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.shape import ModelShape

NAME = "qwen3"
USES = parts.GROUPED_QUERY | {"dense_ffn_size"}

RULES = (
    *parts.BLOCK_RULES,
    parts.QKV_RULE,
    *parts.QK_NORM_RULES,
    *parts.feed_forward(f"{parts.OURS}mlp.", f"{parts.THEIRS}mlp."),
)

CONFIG = ConfigKeys(
    NAME,
    "Qwen3ForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        "dense_ffn_size": "intermediate_size",
    },
    only={
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "use_sliding_window": (False, False),
    },
)


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found = CONFIG.read(hf)
    config_json.check_layer_types(hf, ["full_attention"] * found["num_layers"], NAME)
    return ModelShape(
        head_dim=hf.get("head_dim") or 128,  # what transformers takes where it is missing
        **found,
        **config_json.read_rope(hf, NAME),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(s, head_dim=s.head_dim)


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return parts.transformer(s) | parts.grouped_query(s, qk_norm=True)


def counts(s: ModelShape) -> ParameterCount:
    """qkv and output projections, two norms, q/k norms; gate, up, down."""
    return sizes.parameter_count(s, sharded=sizes.grouped_query_sizes(s)[0], replicated=2 * s.head_dim)


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections and the network."""
    norms = 2 * s.hidden_size + 2 * s.head_dim
    return (sizes.token_count(s, counts(s).layers[0], added=norms),) * s.num_layers


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups and columns of the network. There is one network, which ep and etp cannot share."""
    network = Share(1, "number of feed-forward networks in a dense layer", ("ep", "etp"))
    return (*sizes.grouped_query_shares(s), *sizes.network_shares(s), network)


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not build."""
    if not s.dense_ffn_size:
        yield f"model.dense_ffn_size must be set for model.family={NAME}: it is 0"
    yield from sizes.grouped_query_complaints(s)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """As in sizes.py, with a network of 24 columns per tp rank."""
    return sizes.small_grouped_query(axes) | {"dense_ffn_size": 24 * axes["tp"]}


QWEN3 = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
