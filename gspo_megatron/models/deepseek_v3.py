"""DeepSeek-V3: multi-head latent attention, dense first layers, then SwiGLU experts beside a shared expert, and a
sigmoid router with groups and a bias for each expert that only the choice of experts sees.

arXiv 2412.19437, Section 2.1. Names and settings: Hugging Face transformers 5.23, models/deepseek_v3;
https://huggingface.co/deepseek-ai/DeepSeek-V3. Its multi-token prediction layers are not implemented; transformers
ignores them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil, lcm, sqrt
from typing import Any

import torch

from gspo_megatron.models.family import Family, LayerCount, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import NameRule
from gspo_megatron.models.parts import (
    BLOCK_RULES,
    EXPERT_RULES,
    OURS,
    THEIRS,
    check_implemented,
    feed_forward,
    read_rope,
    read_sizes,
    router_complaints,
    write_rope,
)
from gspo_megatron.models.rope import rope_complaints, rope_of
from gspo_megatron.models.shape import OPTIONAL, ModelShape

NAME = "deepseek_v3"
USES = frozenset(OPTIONAL) - {"num_query_groups", "head_dim"}

_OUR_ATTENTION, _THEIR_ATTENTION = f"{OURS}self_attention.", f"{THEIRS}self_attn."

RULES = (
    *BLOCK_RULES,
    NameRule(f"{_OUR_ATTENTION}linear_q_proj.weight", (f"{_THEIR_ATTENTION}q_proj.weight",)),
    NameRule(f"{_OUR_ATTENTION}linear_q_down_proj.weight", (f"{_THEIR_ATTENTION}q_a_proj.weight",)),
    NameRule(f"{_OUR_ATTENTION}q_layernorm.weight", (f"{_THEIR_ATTENTION}q_a_layernorm.weight",)),
    NameRule(f"{_OUR_ATTENTION}linear_q_up_proj.weight", (f"{_THEIR_ATTENTION}q_b_proj.weight",)),
    NameRule(f"{_OUR_ATTENTION}linear_kv_down_proj.weight", (f"{_THEIR_ATTENTION}kv_a_proj_with_mqa.weight",)),
    NameRule(f"{_OUR_ATTENTION}kv_layernorm.weight", (f"{_THEIR_ATTENTION}kv_a_layernorm.weight",)),
    NameRule(f"{_OUR_ATTENTION}linear_kv_up_proj.weight", (f"{_THEIR_ATTENTION}kv_b_proj.weight",)),
    *feed_forward(f"{OURS}mlp.", f"{THEIRS}mlp."),
    *feed_forward(f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_experts."),
    *EXPERT_RULES,
    NameRule(f"{OURS}mlp.router.expert_bias", (f"{THEIRS}mlp.gate.e_score_correction_bias",), float32=True),
)

_SAME_NUMBER = {
    # field of ModelShape: key of config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_size": "moe_intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
    "dense_ffn_size": "intermediate_size",
    "router_groups": "n_group",
    "router_groups_per_token": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
_ONLY = {
    # key of config.json: (what is implemented, what transformers takes where the key is missing)
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "norm_topk_prob": (True, True),
    "rope_interleave": (True, True),
    # Keys of the files on the hub that transformers does not read.
    "scoring_func": ("sigmoid", "sigmoid"),
    "topk_method": ("noaux_tc", "noaux_tc"),
    "moe_layer_freq": (1, 1),
}
LATENT_NORM_EPSILON = 1e-6
"""Of the norms of the two latents, whatever norm_epsilon is: transformers builds them with its default."""


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape. transformers 5 may write `n_routed_experts` as `num_local_experts`.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    hf = {"n_routed_experts": hf["num_local_experts"], **hf} if "num_local_experts" in hf else hf
    sizes = read_sizes(hf, _SAME_NUMBER | {"shared": "n_shared_experts", "q_lora_rank": "q_lora_rank"}, NAME)
    check_implemented(hf, _ONLY, NAME)
    return ModelShape(
        family=NAME,
        q_lora_rank=sizes.pop("q_lora_rank") or 0,
        shared_expert_ffn_size=sizes.pop("shared") * sizes["expert_ffn_size"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **sizes,
        **read_rope(hf, NAME, ("default", "yarn")),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json, with the keys of the files on the hub, which transformers 4 and 5 both read."""
    assert s.vocab_size is not None, "model.vocab_size must be set before a model is written"
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": NAME,
        **{key: getattr(s, field) for field, key in _SAME_NUMBER.items()},
        "num_key_value_heads": s.num_attention_heads,
        "q_lora_rank": s.q_lora_rank or None,
        "n_shared_experts": s.shared_expert_ffn_size // s.expert_ffn_size,
        "num_nextn_predict_layers": 0,
        **write_rope(s),
        "tie_word_embeddings": s.tie_embeddings,
        **{key: implemented for key, (implemented, _) in _ONLY.items()},
    }


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of MLATransformerConfig. RoPE is this package's own (models/rope.py), and so is its part in the scale of
    attention scores; what is said of it here only keeps Megatron from adding to it."""
    groups = s.router_groups if s.router_groups_per_token < s.router_groups else None
    return {
        "multi_latent_attention": True,
        "num_layers": s.num_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_attention_heads,
        "q_lora_rank": s.q_lora_rank or None,
        "kv_lora_rank": s.kv_lora_rank,
        "qk_head_dim": s.qk_nope_head_dim,
        "qk_pos_emb_head_dim": s.qk_rope_head_dim,
        "v_head_dim": s.v_head_dim,
        "qk_layernorm": True,
        "softmax_scale": rope_of(s).score_factor / sqrt(s.qk_nope_head_dim + s.qk_rope_head_dim),
        "rope_type": "rope",
        "rotary_base": s.rope_base,
        "rotary_scaling_factor": 1.0,
        "mscale_all_dim": 0.0,
        "ffn_hidden_size": s.dense_ffn_size or s.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": s.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
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


def counts(s: ModelShape) -> ParameterCount:
    """Attention: projections to the two latents, which every tp rank holds, and from them; output. Two norms, latents'
    norms; router, shared expert and experts, or a dense network. The experts' bias is no parameter: it has no gradient.
    """
    assert s.vocab_size is not None, "model.vocab_size must be set before parameters are counted"
    h, heads, qk = s.hidden_size, s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
    queries = heads * qk * (s.q_lora_rank or h)
    attention = queries + s.kv_lora_rank * heads * (s.qk_nope_head_dim + s.v_head_dim) + heads * s.v_head_dim * h
    latents = s.q_lora_rank * (h + 1) + (s.kv_lora_rank + s.qk_rope_head_dim) * h + s.kv_lora_rank
    dense = LayerCount(attention + 3 * h * s.dense_ffn_size, latents + 2 * h)
    experts = LayerCount(
        sharded=attention + 3 * h * s.shared_expert_ffn_size,
        replicated=latents + 2 * h + h * s.num_experts,
        expert=3 * h * s.expert_ffn_size,
        num_experts=s.num_experts,
    )
    return ParameterCount(
        vocabulary=s.vocab_size * h,
        num_vocabularies=1 if s.tie_embeddings else 2,
        layers=(dense,) * s.num_dense_layers + (experts,) * (s.num_layers - s.num_dense_layers),
        final_norm=h,
    )


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: all but norms and the experts that were not chosen. Cached: the latent of keys and values, and the
    key's part with RoPE, which all heads share. In training, attention multiplies a token with keys, then with
    values."""
    heads, qk = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
    latent = s.kv_lora_rank + s.qk_rope_head_dim

    def token(n: LayerCount) -> TokenCount:
        chosen = s.experts_per_token if n.num_experts else 0
        norms = 2 * s.hidden_size + s.q_lora_rank + s.kv_lora_rank
        return TokenCount(
            multiplied=n.sharded + n.replicated - norms + chosen * n.expert,
            cached=0,
            attended=heads * (qk + s.v_head_dim),
            cached_whole=latent,
        )

    return tuple(token(n) for n in counts(s).layers)


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits heads and the dense and shared networks, ep experts, etp columns of an expert."""
    latent = s.kv_lora_rank + s.qk_rope_head_dim
    return (
        Share(s.num_attention_heads, "model.num_attention_heads", ("tp",)),
        Share(s.num_attention_heads * s.v_head_dim, "heads * model.v_head_dim", ("tp",), columns=True),
        Share(s.hidden_size, "model.hidden_size", columns=True),
        Share(s.q_lora_rank, "model.q_lora_rank", columns=True),
        Share(s.kv_lora_rank, "model.kv_lora_rank", columns=True),
        Share(latent, "model.kv_lora_rank + model.qk_rope_head_dim", columns=True),
        Share(s.dense_ffn_size * (s.num_dense_layers > 0), "model.dense_ffn_size", ("tp",), columns=True),
        Share(s.shared_expert_ffn_size, "model.shared_expert_ffn_size", ("tp",), columns=True),
        Share(s.num_experts, "model.num_experts", ("ep",)),
        Share(s.expert_ffn_size, "model.expert_ffn_size", ("etp",), columns=True),
    )


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if not getattr(s, name):
            yield f"model.{name} must be set for model.family={NAME}: it is 0"
    yield from rope_complaints(s)
    yield from router_complaints(s)
    if s.num_dense_layers > s.num_layers:
        yield f"model.num_dense_layers={s.num_dense_layers} exceeds model.num_layers={s.num_layers}"
    if (s.num_dense_layers > 0) != (s.dense_ffn_size > 0):
        yield (
            f"model.num_dense_layers={s.num_dense_layers} with model.dense_ffn_size={s.dense_ffn_size}: "
            "set both, or leave both at 0"
        )
    if s.shared_expert_ffn_size % s.expert_ffn_size or not s.shared_expert_ffn_size:
        yield (
            f"model.shared_expert_ffn_size={s.shared_expert_ffn_size} must be a positive multiple of "
            f"model.expert_ffn_size={s.expert_ffn_size}: {NAME} counts shared experts of that width"
        )
    yield from _group_complaints(s)


def _group_complaints(s: ModelShape) -> Iterator[str]:
    groups, chosen, k = s.router_groups, s.router_groups_per_token, s.experts_per_token
    if s.num_experts % groups or s.num_experts < 2 * groups:
        yield (
            f"model.num_experts={s.num_experts} must be a multiple of model.router_groups={groups}, with at least 2 "
            "experts in each group"
        )
    elif chosen > groups or k > chosen * (s.num_experts // groups):
        yield (
            f"model.router_groups_per_token={chosen} of model.router_groups={groups} must be groups that there are, "
            f"and hold at least model.experts_per_token={k} experts"
        )
    elif chosen < groups and k // chosen != 2:
        # Megatron ranks a group by the sum of its experts_per_token // router_groups_per_token best experts.
        yield (
            f"model.experts_per_token={k} // model.router_groups_per_token={chosen} must be 2: {NAME} ranks a group "
            "by its 2 best experts, Megatron-Core by as many as this quotient; or set router_groups_per_token to "
            f"router_groups={groups}, which limits nothing"
        )


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """Two layers, or one per (virtual) stage, the first one dense; two heads, or one per tp rank; at least 3 experts in
    each of 4 groups, rounded up to a multiple of ep."""
    stages, grouped = axes["pp"] * axes["vpp"], s.router_groups_per_token < s.router_groups
    unit = lcm(axes["ep"], 4 if grouped else 1)
    experts = unit * ceil((12 if grouped else 4) / unit)
    return {
        "num_layers": stages if stages > 1 else 2,
        "hidden_size": 32,
        "num_attention_heads": max(2, axes["tp"]),
        "q_lora_rank": 12 if s.q_lora_rank else 0,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_experts": experts,
        "experts_per_token": 4 if grouped else max(2, min(s.experts_per_token, experts - 1)),
        "expert_ffn_size": 16 * axes["etp"],
        "shared_expert_ffn_size": lcm(16 * axes["etp"], axes["tp"]),
        "num_dense_layers": min(1, s.num_dense_layers),
        "dense_ffn_size": 24 * axes["tp"] if s.num_dense_layers else 0,
        "router_groups": 4 if grouped else 1,
        "router_groups_per_token": 2 if grouped else 1,
    }


DEEPSEEK_V3 = Family(NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small)
