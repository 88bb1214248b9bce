"""DeepSeek-V3: multi-head latent attention, dense first layers, then a shared SwiGLU expert and routed ones, and a
sigmoid router with groups and a bias for each expert that only the choice of experts sees.

arXiv 2412.19437, Section 2.1. Names and settings: Hugging Face transformers 5.23, models/deepseek_v3;
https://huggingface.co/deepseek-ai/DeepSeek-V3. Its multi-token prediction layers are not implemented; transformers
ignores them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, LayerCount, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import NameRule
from gspo_megatron.models.rope import rope_complaints, rope_of
from gspo_megatron.models.shape import ModelShape

NAME = "deepseek_v3"
LATENT = frozenset({"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"})
USES = LATENT | parts.EXPERTS | parts.SIGMOID_ROUTER | parts.DENSE_AND_SHARED | parts.YARN

_OUR_ATTENTION, _THEIR_ATTENTION = f"{parts.OURS}self_attention.", f"{parts.THEIRS}self_attn."


def _projection(ours: str, theirs: str, size: Callable[[ModelShape], tuple[int, ...]], **how: Any) -> NameRule:
    return NameRule(f"{_OUR_ATTENTION}{ours}.weight", (f"{_THEIR_ATTENTION}{theirs}.weight",), size=size, **how)


def _queries(s: ModelShape) -> int:
    return s.num_attention_heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)


_LATENT_QUERIES = {"present": lambda s, _: s.q_lora_rank > 0}

RULES = (
    *parts.BLOCK_RULES,
    _projection(
        "linear_q_proj", "q_proj", lambda s: (_queries(s), s.hidden_size), present=lambda s, _: not s.q_lora_rank
    ),
    _projection("linear_q_down_proj", "q_a_proj", lambda s: (s.q_lora_rank, s.hidden_size), **_LATENT_QUERIES),
    _projection("q_layernorm", "q_a_layernorm", lambda s: (s.q_lora_rank,), **_LATENT_QUERIES),
    _projection("linear_q_up_proj", "q_b_proj", lambda s: (_queries(s), s.q_lora_rank), **_LATENT_QUERIES),
    _projection(
        "linear_kv_down_proj",
        "kv_a_proj_with_mqa",
        lambda s: (s.kv_lora_rank + s.qk_rope_head_dim, s.hidden_size),
    ),
    _projection("kv_layernorm", "kv_a_layernorm", lambda s: (s.kv_lora_rank,)),
    _projection(
        "linear_kv_up_proj",
        "kv_b_proj",
        lambda s: (s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank),
    ),
    *parts.SIGMOID_ROUTER_RULES,
)

CONFIG = ConfigKeys(
    NAME,
    "DeepseekV3ForCausalLM",
    sizes={
        **config_json.SIZES,
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_nope_head_dim",
        "qk_rope_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
        **config_json.SIGMOID_ROUTER_SIZES,
    },
    only={
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "norm_topk_prob": (True, True),
        "rope_interleave": (True, True),
        # Keys of the files on the hub that transformers does not read.
        "scoring_func": ("sigmoid", "sigmoid"),
        "topk_method": ("noaux_tc", "noaux_tc"),
        "moe_layer_freq": (1, 1),
    },
)
LATENT_NORM_EPSILON = 1e-6
"""Of the norms of the two latents, whatever norm_epsilon is: transformers builds them with its default."""


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found = CONFIG.read(hf, shared="n_shared_experts", q_lora_rank="q_lora_rank")
    return ModelShape(
        q_lora_rank=found.pop("q_lora_rank") or 0,
        shared_expert_ffn_size=found.pop("shared") * found["expert_ffn_size"],
        **found,
        **config_json.read_rope(hf, NAME, ("default", "yarn")),
    )


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(
        s,
        num_key_value_heads=s.num_attention_heads,
        q_lora_rank=s.q_lora_rank or None,
        n_shared_experts=s.shared_expert_ffn_size // s.expert_ffn_size,
        num_nextn_predict_layers=0,
    )


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of MLATransformerConfig. RoPE is this package's own (models/rope.py), and so is its part in the scale of
    attention scores; what is said of it here only keeps Megatron from adding to it."""
    return {
        **parts.transformer(s),
        **parts.sigmoid_router(s),
        "multi_latent_attention": True,
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
    }


def counts(s: ModelShape) -> ParameterCount:
    """Attention: projections to the two latents and the latents' norms, which every tp rank holds; projections from
    them; output."""
    h, heads, qk = s.hidden_size, s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
    queries = heads * qk * (s.q_lora_rank or h)
    attention = queries + s.kv_lora_rank * heads * (s.qk_nope_head_dim + s.v_head_dim) + heads * s.v_head_dim * h
    latents = s.q_lora_rank * (h + 1) + (s.kv_lora_rank + s.qk_rope_head_dim) * h + s.kv_lora_rank
    return sizes.parameter_count(s, sharded=attention, replicated=latents)


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
        *sizes.network_shares(s),
        *sizes.expert_shares(s),
    )


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if not getattr(s, name):
            yield f"model.{name} must be set for model.family={NAME}: it is 0"
    yield from rope_complaints(s)
    yield from sizes.sigmoid_router_complaints(s, NAME)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """Two layers, or one per (virtual) stage, the first one dense; two heads, or one per tp rank; experts as in
    sizes.py."""
    stages = axes["pp"] * axes["vpp"]
    return {
        "num_layers": stages if stages > 1 else 2,
        "hidden_size": 32,
        "num_attention_heads": max(2, axes["tp"]),
        "q_lora_rank": 12 if s.q_lora_rank else 0,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        **sizes.small_sigmoid_router(s, axes),
    }


DEEPSEEK_V3 = Family(
    NAME, USES, shape, hf_config, RULES, megatron, counts, per_token, shares, complaints, small, writes_scores=True
)
