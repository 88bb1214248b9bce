"""gpt-oss: grouped-query attention with biases, a sink in every head and a window in every other layer, and experts of
a clamped SwiGLU with biases.

    out_e = W_down ((up + 1) * gate * sigmoid(1.702 gate)) + b_down,   [gate, up] = W_e x + b_e, both clamped

Names and settings: Hugging Face transformers 5.23, models/gpt_oss; https://huggingface.co/openai/gpt-oss-20b. Published
matrices of experts are MXFP4 (checkpoint/quantised.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import InterleavedGateUp, NameRule, Transpose
from gspo_megatron.models.shape import ModelShape

NAME = "gpt_oss"
USES = parts.GROUPED_QUERY | parts.EXPERTS | parts.YARN | {"sliding_window"}

_ATTENTION, _THEIR_ATTENTION = f"{parts.OURS}self_attention.", f"{parts.THEIRS}self_attn."
_EXPERT, _EXPERTS = f"{parts.OURS}mlp.experts.local_experts.{{expert}}.", f"{parts.THEIRS}mlp.experts."


def _gate_up_rows(s: ModelShape) -> tuple[int, ...]:
    return (2 * s.expert_ffn_size,)


RULES = (
    *parts.BLOCK_RULES,
    parts.QKV_RULE,
    parts.QKV_BIAS_RULE,
    NameRule(f"{_ATTENTION}linear_proj.bias", (f"{_THEIR_ATTENTION}o_proj.bias",), size=parts.hidden),
    NameRule(
        f"{_ATTENTION}core_attention.softmax_offset",
        (f"{_THEIR_ATTENTION}sinks",),
        size=lambda s: (s.num_attention_heads,),
    ),
    NameRule(f"{parts.OURS}mlp.router.weight", (f"{parts.THEIRS}mlp.router.weight",), size=parts.router),
    NameRule(f"{parts.OURS}mlp.router.bias", (f"{parts.THEIRS}mlp.router.bias",), size=parts.experts),
    NameRule(
        f"{_EXPERT}linear_fc1.weight",
        (f"{_EXPERTS}gate_up_proj",),
        InterleavedGateUp(),
        size=lambda s: (*_gate_up_rows(s), s.hidden_size),
    ),
    NameRule(f"{_EXPERT}linear_fc1.bias", (f"{_EXPERTS}gate_up_proj_bias",), InterleavedGateUp(), size=_gate_up_rows),
    NameRule(
        f"{_EXPERT}linear_fc2.weight",
        (f"{_EXPERTS}down_proj",),
        Transpose(),
        size=lambda s: (s.hidden_size, s.expert_ffn_size),
    ),
    NameRule(f"{_EXPERT}linear_fc2.bias", (f"{_EXPERTS}down_proj_bias",), size=parts.hidden),
)

ALPHA, LIMIT = 1.702, 7.0
CONFIG = ConfigKeys(
    NAME,
    "GptOssForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        "head_dim": "head_dim",
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
        "sliding_window": "sliding_window",
    },
    only={
        "hidden_act": ("silu", "silu"),
        "attention_bias": (True, True),
        "swiglu_alpha": (ALPHA, ALPHA),
        "swiglu_limit": (LIMIT, LIMIT),
    },
)


def layer_types(num_layers: int) -> list[str]:
    """The first layer has a window, the second has none, and so on."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found = CONFIG.read(hf)
    config_json.check_layer_types(hf, layer_types(found["num_layers"]), NAME)
    return ModelShape(**found, **config_json.read_rope(hf, NAME, ("default", "yarn"), base=150_000.0))


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(s, layer_types=layer_types(s.num_layers))


def gated(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(ALPHA * x)


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig."""
    return {
        **parts.transformer(s),
        **parts.grouped_query(s, qk_norm=False),
        **parts.softmax_router(s),
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "activation_func": gated,
        "activation_func_clamp_value": LIMIT,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in layer_types(s.num_layers)],
    }


def counts(s: ModelShape) -> ParameterCount:
    """As Mixtral, and biases of every matrix, and sinks."""
    projections, width = sizes.grouped_query_sizes(s)
    without = sizes.parameter_count(s, sharded=projections + width + s.num_attention_heads, replicated=s.hidden_size)
    [n] = set(without.layers)
    biased = replace(
        n, replicated=n.replicated + s.num_experts, expert=n.expert + 2 * s.expert_ffn_size + s.hidden_size
    )
    return replace(without, layers=(biased,) * s.num_layers)


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: attention's projections, the router, the chosen experts; and their biases, which are few."""
    n = counts(s).layers[0]
    added = 3 * s.hidden_size + sizes.grouped_query_sizes(s)[1] + s.num_attention_heads + s.num_experts
    windows = (s.sliding_window * (kind == "sliding_attention") for kind in layer_types(s.num_layers))
    return tuple(sizes.token_count(s, n, added=added, window=window) for window in windows)


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups, ep experts. Every column of an expert has its own bias, which etp does not split."""
    biases = Share(1, "parts of an expert with biases", ("etp",))
    return (*sizes.grouped_query_shares(s), *sizes.expert_shares(s), biases)


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    if not s.sliding_window:
        yield f"model.sliding_window must be set for model.family={NAME}: it is 0"
    yield from sizes.router_complaints(s)
    yield from sizes.grouped_query_complaints(s)


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """As in sizes.py, with a window that is shorter than a sequence."""
    window = {"sliding_window": min(s.sliding_window, 6)}
    return sizes.small_grouped_query(axes) | sizes.small_experts(s, axes) | window


GPT_OSS = Family(
    NAME,
    USES,
    shape,
    hf_config,
    RULES,
    megatron,
    counts,
    per_token,
    shares,
    complaints,
    small,
    only_local="attention sinks and experts with biases",
    writes_scores=True,
)
