"""Qwen3-MoE: RMSNorm, q/k norm, grouped-query attention, RoPE, SwiGLU experts in every layer, softmax-top-k router.

Names and settings: Hugging Face transformers 5.23, models/qwen3_moe; https://huggingface.co/Qwen/Qwen3-30B-A3B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

import torch

from gspo_megatron.models.family import Family, LayerCount, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import QKV, NameRule
from gspo_megatron.models.parts import (
    BLOCK_RULES,
    EXPERT_RULES,
    OURS,
    THEIRS,
    check_implemented,
    read_rope,
    read_sizes,
    router_complaints,
    write_rope,
)
from gspo_megatron.models.rope import rope_complaints
from gspo_megatron.models.shape import ModelShape

NAME = "qwen3_moe"
USES = frozenset({"num_query_groups", "head_dim", "num_experts", "experts_per_token", "expert_ffn_size"})

RULES = (
    *BLOCK_RULES,
    NameRule(
        f"{OURS}self_attention.linear_qkv.weight",
        tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
        QKV(),
    ),
    NameRule(f"{OURS}self_attention.q_layernorm.weight", (f"{THEIRS}self_attn.q_norm.weight",)),
    NameRule(f"{OURS}self_attention.k_layernorm.weight", (f"{THEIRS}self_attn.k_norm.weight",)),
    *EXPERT_RULES,
)

_SAME_NUMBER = {
    # field of ModelShape: key of config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
_ONLY = {
    # key of config.json: (what is implemented, what transformers takes where the key is missing)
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "norm_topk_prob": (True, False),
    "decoder_sparse_step": (1, 1),
    "mlp_only_layers": ([], []),
}


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape. transformers 5 writes `num_experts` as `num_local_experts`.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    hf = {"num_experts": hf["num_local_experts"], **hf} if "num_local_experts" in hf else hf
    sizes = read_sizes(hf, _SAME_NUMBER, NAME)
    check_implemented(hf, _ONLY, NAME)
    return ModelShape(
        family=NAME,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **sizes,
        **read_rope(hf, NAME),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json, with the keys of the files on the hub, which transformers 4 and 5 both read."""
    assert s.vocab_size is not None, "model.vocab_size must be set before a model is written"
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": NAME,
        **{key: getattr(s, field) for field, key in _SAME_NUMBER.items()},
        "head_dim": s.head_dim,
        **write_rope(s),
        "tie_word_embeddings": s.tie_embeddings,
        **{key: implemented for key, (implemented, _) in _ONLY.items()},
    }


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return {
        "num_layers": s.num_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_attention_heads,
        "num_query_groups": s.num_query_groups,
        "kv_channels": s.head_dim,
        "ffn_hidden_size": s.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": s.norm_epsilon,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "num_moe_experts": s.num_experts,
        "moe_ffn_hidden_size": s.expert_ffn_size,
        "moe_router_topk": s.experts_per_token,
        "moe_router_pre_softmax": False,  # softmax over the chosen ones: Hugging Face's norm_topk_prob=True
    }


def counts(s: ModelShape) -> ParameterCount:
    """qkv and output projections, two norms, q/k norms, router; gate, up, down."""
    assert s.vocab_size is not None, "model.vocab_size must be set before parameters are counted"
    query, kv = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim
    layer = LayerCount(
        sharded=s.hidden_size * (query + 2 * kv) + query * s.hidden_size,
        replicated=2 * s.hidden_size + 2 * s.head_dim + s.hidden_size * s.num_experts,
        expert=3 * s.hidden_size * s.expert_ffn_size,
        num_experts=s.num_experts,
    )
    return ParameterCount(
        vocabulary=s.vocab_size * s.hidden_size,
        num_vocabularies=1 if s.tie_embeddings else 2,
        layers=(layer,) * s.num_layers,
        final_norm=s.hidden_size,
    )


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections, the router, the chosen experts. Attention multiplies a token with keys, then
    with values."""
    query, n = s.num_attention_heads * s.head_dim, counts(s).layers[0]
    token = TokenCount(
        multiplied=n.sharded + s.hidden_size * s.num_experts + s.experts_per_token * n.expert,
        cached=2 * s.num_query_groups * s.head_dim,
        attended=2 * query,
    )
    return (token,) * s.num_layers


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups, ep experts, etp columns of an expert."""
    return (
        Share(s.num_attention_heads, "model.num_attention_heads", ("tp",)),
        Share(s.num_query_groups, "model.num_query_groups", ("tp",)),
        Share(s.num_query_groups * s.head_dim, "model.num_query_groups * model.head_dim", ("tp",), columns=True),
        Share(s.hidden_size, "model.hidden_size", columns=True),
        Share(s.num_experts, "model.num_experts", ("ep",)),
        Share(s.expert_ffn_size, "model.expert_ffn_size", ("etp",), columns=True),
    )


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    yield from router_complaints(s)
    if s.num_attention_heads % s.num_query_groups:
        yield (
            f"model.num_attention_heads={s.num_attention_heads} must be a multiple of "
            f"model.num_query_groups={s.num_query_groups}"
        )
    yield from rope_complaints(s)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """Two layers, or one per (virtual) stage; two heads per group; two groups, or one per tp rank; 4 experts, rounded
    up to a multiple of ep."""
    groups, stages = max(2, axes["tp"]), axes["pp"] * axes["vpp"]
    experts = min(s.num_experts, axes["ep"] * ceil(4 / axes["ep"]))
    return {
        "num_layers": stages if stages > 1 else 2,
        "hidden_size": 32,
        "num_attention_heads": 2 * groups,
        "num_query_groups": groups,
        "head_dim": 8,
        "num_experts": experts,
        "experts_per_token": min(s.experts_per_token, max(2, experts - 1)),
        "expert_ffn_size": 16 * axes["etp"],
    }


QWEN3_MOE = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
