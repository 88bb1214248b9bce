"""What several families share: name rules and Megatron's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gspo_megatron.models.names import QKV, GateUp, NameRule
from gspo_megatron.models.shape import OPTIONAL, ModelShape

# ------------------------------------------------------------------------------------------------------------ settings

GROUPED_QUERY = frozenset({"num_query_groups", "head_dim"})
EXPERTS = frozenset({"num_experts", "experts_per_token", "expert_ffn_size"})
SIGMOID_ROUTER = frozenset({"router_groups", "router_groups_per_token", "routed_scaling_factor"})
DENSE_AND_SHARED = frozenset({"num_dense_layers", "dense_ffn_size", "shared_expert_ffn_size"})
YARN = frozenset(name for name in OPTIONAL if name.startswith("rope_"))
"""Optional fields of ModelShape, by the part of a model that they describe."""

# ---------------------------------------------------------------------------------------------------------- name rules

OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."


def vocabulary(s: ModelShape) -> tuple[int, ...]:
    """Size of the embedding, and of the head."""
    return s.vocab_size or 0, s.hidden_size


def hidden(s: ModelShape) -> tuple[int, ...]:
    """Size of a norm, or of the bias of what is added to the hidden states."""
    return (s.hidden_size,)


def qkv_rows(s: ModelShape) -> tuple[int, ...]:
    """Size of the bias of the projections to queries, keys and values."""
    return ((s.num_attention_heads + 2 * s.num_query_groups) * s.head_dim,)


def router(s: ModelShape) -> tuple[int, ...]:
    """Size of the matrix that scores experts."""
    return s.num_experts, s.hidden_size


def experts(s: ModelShape) -> tuple[int, ...]:
    """Size of a bias of the router."""
    return (s.num_experts,)


def has_experts(s: ModelShape, layer: int) -> bool:
    return s.num_experts > 0 and layer >= s.num_dense_layers


def is_dense(s: ModelShape, layer: int) -> bool:
    return not has_experts(s, layer)


def feed_forward(
    ours: str,
    theirs: str,
    width: Callable[[ModelShape], int] = lambda s: s.dense_ffn_size,
    present: Callable[[ModelShape, int], bool] = is_dense,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[NameRule, ...]:
    """A SwiGLU network: gate, up and down; by default that of a layer without experts."""
    gate, up, down = (f"{theirs}{name}.weight" for name in names)

    def gate_up_size(s: ModelShape) -> tuple[int, ...]:
        return 2 * width(s), s.hidden_size

    def down_size(s: ModelShape) -> tuple[int, ...]:
        return s.hidden_size, width(s)

    return (
        NameRule(f"{ours}linear_fc1.weight", (gate, up), GateUp(), size=gate_up_size, present=present),
        NameRule(f"{ours}linear_fc2.weight", (down,), size=down_size, present=present),
    )


BLOCK_RULES = (
    NameRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), size=vocabulary),
    NameRule(f"{OURS}input_layernorm.weight", (f"{THEIRS}input_layernorm.weight",), size=hidden),
    NameRule(
        f"{OURS}self_attention.linear_proj.weight",
        (f"{THEIRS}self_attn.o_proj.weight",),
        size=lambda s: (s.hidden_size, s.num_attention_heads * (s.v_head_dim or s.head_dim)),
    ),
    NameRule(f"{OURS}pre_mlp_layernorm.weight", (f"{THEIRS}post_attention_layernorm.weight",), size=hidden),
    NameRule("decoder.final_layernorm.weight", ("model.norm.weight",), size=hidden),
    # Where embedding and head are tied, neither side has it.
    NameRule("output_layer.weight", ("lm_head.weight",), size=vocabulary, present=lambda s, _: not s.tie_embeddings),
)
"""All but the projections of attention and the feed-forward networks."""

QKV_RULE = NameRule(
    f"{OURS}self_attention.linear_qkv.weight",
    tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
    QKV(),
    size=lambda s: (*qkv_rows(s), s.hidden_size),
)
QKV_BIAS_RULE = NameRule(
    f"{OURS}self_attention.linear_qkv.bias",
    tuple(f"{THEIRS}self_attn.{part}_proj.bias" for part in "qkv"),
    QKV(),
    size=qkv_rows,
)
QK_NORM_RULES = tuple(
    NameRule(
        f"{OURS}self_attention.{part}_layernorm.weight",
        (f"{THEIRS}self_attn.{part}_norm.weight",),
        size=lambda s: (s.head_dim,),
    )
    for part in "qk"
)

EXPERT_RULES = (
    NameRule(f"{OURS}mlp.router.weight", (f"{THEIRS}mlp.gate.weight",), size=router, present=has_experts),
    *feed_forward(
        f"{OURS}mlp.experts.local_experts.{{expert}}.",
        f"{THEIRS}mlp.experts.{{expert}}.",
        lambda s: s.expert_ffn_size,
        has_experts,
    ),
)
"""A router without bias and its experts."""

SIGMOID_ROUTER_RULES = (
    *feed_forward(f"{OURS}mlp.", f"{THEIRS}mlp."),
    *feed_forward(
        f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_experts.", lambda s: s.shared_expert_ffn_size, has_experts
    ),
    *EXPERT_RULES,
    NameRule(
        f"{OURS}mlp.router.expert_bias",
        (f"{THEIRS}mlp.gate.e_score_correction_bias",),
        float32=True,
        size=experts,
        present=has_experts,
    ),
)
"""Dense first layers; then a shared expert, routed experts, and a router bias that only the choice of experts sees."""


# ---------------------------------------------------------------------------------------------------------- Megatron


def transformer(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig of an RMSNorm and SwiGLU transformer without biases."""
    return {
        "num_layers": s.num_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_attention_heads,
        "ffn_hidden_size": s.dense_ffn_size or s.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": s.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }


def grouped_query(s: ModelShape, *, qk_norm: bool) -> dict[str, Any]:
    """Grouped-query attention, with RoPE as models/rope.py has it."""
    window = {"window_size": (s.sliding_window - 1, 0)} if s.sliding_window else {}
    return {
        "num_query_groups": s.num_query_groups,
        "kv_channels": s.head_dim,
        "qk_layernorm": qk_norm,
        "add_qkv_bias": s.attention_bias,
        **window,
    }


def softmax_router(s: ModelShape) -> dict[str, Any]:
    """Experts in every layer, whose weights are a softmax over the chosen ones: Hugging Face's norm_topk_prob=True."""
    return {
        "num_moe_experts": s.num_experts,
        "moe_ffn_hidden_size": s.expert_ffn_size,
        "moe_router_topk": s.experts_per_token,
        "moe_router_pre_softmax": False,
    }


def sigmoid_router(s: ModelShape) -> dict[str, Any]:
    """Dense first layers, then a shared expert and routed ones. arXiv 2412.19437, Eq. 12 to 16."""
    groups = s.router_groups if s.router_groups_per_token < s.router_groups else None
    return {
        "num_moe_experts": s.num_experts,
        "moe_layer_freq": [int(i >= s.num_dense_layers) for i in range(s.num_layers)],
        "moe_ffn_hidden_size": s.expert_ffn_size,
        "moe_shared_expert_intermediate_size": s.shared_expert_ffn_size,
        "moe_router_topk": s.experts_per_token,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": s.routed_scaling_factor,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": groups and s.router_groups_per_token,
        "moe_router_enable_expert_bias": True,
        # Megatron's default moves the bias at every update. Here it stays as it was trained: the rollouts of a policy
        # version and its log-probs must be routed alike.
        "moe_router_bias_update_rate": 0.0,
    }
