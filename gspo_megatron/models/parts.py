"""What several families share: name rules, keys of config.json, and Megatron's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gspo_megatron.base.errors import ConfigError
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


def feed_forward(ours: str, theirs: str) -> tuple[NameRule, ...]:
    """A SwiGLU network: gate, up and down."""
    return (
        NameRule(f"{ours}linear_fc1.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"), GateUp()),
        NameRule(f"{ours}linear_fc2.weight", (f"{theirs}down_proj.weight",)),
    )


BLOCK_RULES = (
    NameRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    NameRule(f"{OURS}input_layernorm.weight", (f"{THEIRS}input_layernorm.weight",)),
    NameRule(f"{OURS}self_attention.linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",)),
    NameRule(f"{OURS}pre_mlp_layernorm.weight", (f"{THEIRS}post_attention_layernorm.weight",)),
    NameRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    # Where embedding and head are tied, neither side has it.
    NameRule("output_layer.weight", ("lm_head.weight",)),
)
"""All but the projections of attention and the feed-forward networks."""

QKV_RULE = NameRule(
    f"{OURS}self_attention.linear_qkv.weight", tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"), QKV()
)
QKV_BIAS_RULE = NameRule(
    f"{OURS}self_attention.linear_qkv.bias", tuple(f"{THEIRS}self_attn.{part}_proj.bias" for part in "qkv"), QKV()
)
QK_NORM_RULES = tuple(
    NameRule(f"{OURS}self_attention.{part}_layernorm.weight", (f"{THEIRS}self_attn.{part}_norm.weight",))
    for part in "qk"
)

EXPERT_RULES = (
    NameRule(f"{OURS}mlp.router.weight", (f"{THEIRS}mlp.gate.weight",)),
    *feed_forward(f"{OURS}mlp.experts.local_experts.{{expert}}.", f"{THEIRS}mlp.experts.{{expert}}."),
)
"""A router without bias and its experts."""

SIGMOID_ROUTER_RULES = (
    *feed_forward(f"{OURS}mlp.", f"{THEIRS}mlp."),
    *feed_forward(f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_experts."),
    *EXPERT_RULES,
    NameRule(f"{OURS}mlp.router.expert_bias", (f"{THEIRS}mlp.gate.e_score_correction_bias",), float32=True),
)
"""Dense first layers; then experts beside a shared one, and a bias of the router that only its choice sees."""


# --------------------------------------------------------------------------------------------------------- config.json


SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
"""Field of ModelShape: key of config.json."""
SIGMOID_ROUTER_SIZES = {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "dense_ffn_size": "intermediate_size",
    "router_groups": "n_group",
    "router_groups_per_token": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}


def read_sizes(hf: Mapping[str, Any], keys: Mapping[str, str], family: str) -> dict[str, Any]:
    """The values of `keys` (field of ModelShape: key of config.json) by field.

    Raises:
        ConfigError: a key is missing.
    """
    optional = {"q_lora_rank"}  # null is a value of it
    if missing := [key for key in keys.values() if hf.get(key) is None and not (key in optional and key in hf)]:
        raise ConfigError(f"config.json of a {family} model lacks {', '.join(missing)}; use the model's original file")
    return {field: hf[key] for field, key in keys.items()}


def check_implemented(hf: Mapping[str, Any], only: Mapping[str, tuple[Any, Any]], family: str) -> None:
    """`only` maps a key to (what is implemented, what transformers takes where the key is missing).

    Raises:
        ConfigError: the model uses something else.
    """
    for key, (implemented, default) in only.items():
        found = hf.get(key, default)
        if found != implemented and (found or implemented):  # null, false and [] mean the same
            raise ConfigError(f"config.json has {key}={found!r}, but only {implemented!r} is implemented for {family}")


def check_layer_types(hf: Mapping[str, Any], expected: list[str], family: str) -> None:
    """`layer_types`, where config.json has them, are those of the family.

    Raises:
        ConfigError: they are others.
    """
    if (found := hf.get("layer_types") or expected) != expected:
        pairs = zip(found, expected, strict=False)
        layer = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(found), len(expected)))
        raise ConfigError(
            f"config.json has layer_types of {len(found)} layers with {found[layer : layer + 1]} as layer {layer}, but "
            f"only {expected[layer : layer + 1]} there, of {len(expected)} layers, is implemented for {family}"
        )


def with_num_experts(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`hf` with the number of experts as `key`, which transformers 5 may write as `num_local_experts`."""
    return {key: hf["num_local_experts"], **hf} if "num_local_experts" in hf else hf


def read_head_dim(hf: Mapping[str, Any]) -> int:
    """`head_dim`, which older files lack."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def read_rope(
    hf: Mapping[str, Any],
    family: str,
    kinds: tuple[str, ...] = ("default",),
    *,
    base: float = 10_000.0,
    partial: float | None = None,
) -> dict[str, Any]:
    """The rotation's fields of ModelShape. transformers 5 writes `rope_theta` into `rope_parameters`, earlier ones
    everything else into `rope_scaling`. `base` and `partial` are what transformers takes where `rope_theta` and
    `partial_rotary_factor` are missing; None: the family rotates all dimensions.

    Raises:
        ConfigError: a kind of rotation that is not in `kinds`, or a parameter that is missing or not implemented.
    """
    outside = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if key in hf}
    rope = {"rope_theta": base} | outside | (hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        known = " and ".join(repr(each) for each in kinds)
        raise ConfigError(f"config.json has RoPE of type {kind!r}, but only {known} is implemented for {family}")
    found = {"rope_base": float(rope["rope_theta"])}
    if partial is None:
        check_implemented(rope, {"partial_rotary_factor": (1.0, 1.0)}, family)
    else:
        found["partial_rotary_factor"] = float(rope.get("partial_rotary_factor", partial))
    if kind == "default":
        return found
    check_implemented(rope, {"attention_factor": (None, None)}, family)
    needed = {"rope_scaling_factor": "factor", "rope_original_length": "original_max_position_embeddings"}
    return {
        **found,
        "rope_scaling": kind,
        **read_sizes(rope, needed, family),
        "rope_beta_fast": rope.get("beta_fast") or 32.0,
        "rope_beta_slow": rope.get("beta_slow") or 1.0,
        "rope_mscale": rope.get("mscale") or 0.0,
        "rope_mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        "rope_truncate": rope.get("truncate", True),
    }


def write_rope(s: ModelShape) -> dict[str, Any]:
    """The rotation in config.json, with the keys that transformers 4 and 5 both read."""
    if s.rope_scaling == "none":
        return {"rope_theta": s.rope_base, "rope_scaling": None}
    scaling = {
        "type": s.rope_scaling,
        "factor": s.rope_scaling_factor,
        "original_max_position_embeddings": s.rope_original_length,
        "beta_fast": s.rope_beta_fast,
        "beta_slow": s.rope_beta_slow,
        "mscale": s.rope_mscale,
        "mscale_all_dim": s.rope_mscale_all_dim,
        **({} if s.rope_truncate else {"truncate": False}),
    }
    return {"rope_theta": s.rope_base, "rope_scaling": scaling}


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
    """Dense first layers, then experts beside a shared one. arXiv 2412.19437, Eq. 12 to 16."""
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
