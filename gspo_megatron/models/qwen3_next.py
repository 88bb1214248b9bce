"""Qwen3-Next: gated delta-net layers and, every few layers, gated full attention with a partial RoPE; norms that
multiply by 1 + weight; softmax-top-k experts, and a shared one with a gate.

arXiv 2412.06464 (gated delta networks), Section 3. Names and settings: Hugging Face transformers 5.23,
models/qwen3_next; https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct. Its multi-token prediction layers are not
implemented; transformers ignores them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gspo_megatron.models import config_json, parts, sizes
from gspo_megatron.models.config_json import ConfigKeys
from gspo_megatron.models.family import Family, ParameterCount, Share, TokenCount
from gspo_megatron.models.names import COPY, GatedQKV, KeyHeadChannels, NameRule, Op
from gspo_megatron.models.shape import ModelShape

NAME = "qwen3_next"
LINEAR = frozenset(
    f"linear_{part}"
    for part in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
)
"""Sizes of gated delta nets, which ModelShape, config.json and Megatron call the same."""
CHUNK = 64
"""Positions that the delta rule solves together (mcore/delta_rule.py)."""
OWN = LINEAR | {"full_attention_interval", "shared_expert_ffn_size"}
USES = parts.GROUPED_QUERY | parts.EXPERTS | OWN | {"partial_rotary_factor"}

_DELTA, _THEIR_DELTA = f"{parts.OURS}self_attention.", f"{parts.THEIRS}linear_attn."


def is_recurrent(s: ModelShape, layer: int) -> bool:
    """Whether layer `layer`, from 0, is a gated delta net: all but the last of every full_attention_interval layers."""
    return bool((layer + 1) % s.full_attention_interval)


def is_full(s: ModelShape, layer: int) -> bool:
    return not is_recurrent(s, layer)


def delta_net_widths(s: ModelShape) -> tuple[int, int]:
    """(width of all keys, or queries; width of all values) of a gated delta net."""
    return s.linear_num_key_heads * s.linear_key_head_dim, s.linear_num_value_heads * s.linear_value_head_dim


def _delta_rule(
    ours: str, size: Callable[[ModelShape, int, int], tuple[int, ...]], theirs: str = "", op: Op = COPY
) -> NameRule:
    """`size`: of (shape, width of all keys, width of all values)."""
    names = f"{_DELTA}{ours}", (f"{_THEIR_DELTA}{theirs or ours}",)
    return NameRule(*names, op, size=lambda s: size(s, *delta_net_widths(s)), present=is_recurrent)


RULES = (
    *(replace(rule, present=is_full) if "linear_proj" in rule.ours else rule for rule in parts.BLOCK_RULES),
    NameRule(
        f"{parts.OURS}self_attention.linear_qkv.weight",
        tuple(f"{parts.THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
        GatedQKV(),
        size=lambda s: (2 * (s.num_attention_heads + s.num_query_groups) * s.head_dim, s.hidden_size),
        present=is_full,
    ),
    *(replace(rule, present=is_full) for rule in parts.QK_NORM_RULES),
    _delta_rule("in_proj_qkvz.weight", lambda s, keys, values: (2 * (keys + values), s.hidden_size)),
    _delta_rule("in_proj_ba.weight", lambda s, keys, values: (2 * s.linear_num_value_heads, s.hidden_size)),
    _delta_rule("dt_bias", lambda s, keys, values: (s.linear_num_value_heads,)),
    _delta_rule("A_log", lambda s, keys, values: (s.linear_num_value_heads,)),
    _delta_rule("out_proj.weight", lambda s, keys, values: (s.hidden_size, values)),
    _delta_rule(
        "conv1d.weight", lambda s, keys, values: (2 * keys + values, 1, s.linear_conv_kernel_dim), op=KeyHeadChannels()
    ),
    _delta_rule("out_norm.weight", lambda s, keys, values: (s.linear_value_head_dim,), "norm.weight"),
    *parts.EXPERT_RULES,
    *parts.feed_forward(
        f"{parts.OURS}mlp.shared_experts.",
        f"{parts.THEIRS}mlp.shared_expert.",
        lambda s: s.shared_expert_ffn_size,
        parts.has_experts,
    ),
    NameRule(
        f"{parts.OURS}mlp.shared_experts.gate_weight",
        (f"{parts.THEIRS}mlp.shared_expert_gate.weight",),
        size=lambda s: (1, s.hidden_size),
        present=parts.has_experts,
    ),
)

CONFIG = ConfigKeys(
    NAME,
    "Qwen3NextForCausalLM",
    sizes={
        **config_json.SIZES,
        "num_query_groups": "num_key_value_heads",
        "head_dim": "head_dim",
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
        "shared_expert_ffn_size": "shared_expert_intermediate_size",
        **{name: name for name in sorted(LINEAR)},
    },
    only={
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "norm_topk_prob": (True, True),
        "decoder_sparse_step": (1, 1),
        "mlp_only_layers": ([], []),
    },
)


def layer_types(num_layers: int, interval: int) -> list[str]:
    """As config.json has them."""
    return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(num_layers)]


def _interval(hf: Mapping[str, Any]) -> int:
    """Where config.json has only `layer_types`: the place of the first layer of full attention."""
    if (found := hf.get("full_attention_interval")) is not None:
        return int(found)
    types = hf.get("layer_types") or []
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1 if types else 4


def shape(hf: Mapping[str, Any]) -> ModelShape:
    """config.json -> the shape. transformers 5 writes `layer_types` in place of `full_attention_interval`.

    Raises:
        ConfigError: a size is missing, or the model uses something that is not implemented.
    """
    found, interval = CONFIG.read(hf), _interval(hf)
    config_json.check_layer_types(hf, layer_types(found["num_layers"], interval), NAME)
    rope = config_json.read_rope(hf, NAME, partial=0.25)
    return ModelShape(full_attention_interval=interval, **found, **rope)


def hf_config(s: ModelShape) -> dict[str, Any]:
    """The shape as config.json."""
    return CONFIG.write(
        s,
        full_attention_interval=s.full_attention_interval,
        partial_rotary_factor=s.partial_rotary_factor,
    )


def megatron(s: ModelShape) -> dict[str, Any]:
    """Fields of TransformerConfig. In linear_attention_freq, 1 is a layer with a gated delta net."""
    return {
        **parts.transformer(s),
        **parts.grouped_query(s, qk_norm=True),
        **parts.softmax_router(s),
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "moe_shared_expert_intermediate_size": s.shared_expert_ffn_size,
        "moe_shared_expert_gate": True,
        "linear_attention_freq": [int(is_recurrent(s, i)) for i in range(s.num_layers)],
        **{name: getattr(s, name) for name in LINEAR},
    }


def counts(s: ModelShape) -> ParameterCount:
    """Full attention: queries and their gates, keys, values, output, q/k norms. A gated delta net: projections to
    queries, keys, values, gates z and two numbers a value head; convolution, A and dt; output, and its norm."""
    h, (keys, values) = s.hidden_size, delta_net_widths(s)
    gates = h * s.num_attention_heads * s.head_dim
    full = sizes.parameter_count(s, sharded=sizes.grouped_query_sizes(s)[0] + gates, replicated=2 * s.head_dim + h)
    projections = h * (2 * keys + 3 * values + 2 * s.linear_num_value_heads)
    small = (2 * keys + values) * s.linear_conv_kernel_dim + 2 * s.linear_num_value_heads
    delta_net = sizes.parameter_count(s, sharded=projections + small, replicated=s.linear_value_head_dim + h)
    recurrent = replace(delta_net.layers[0], recurrent=True)
    layers = (recurrent if is_recurrent(s, i) else full.layers[i] for i in range(s.num_layers))
    return replace(full, layers=tuple(layers))


def per_token(s: ModelShape) -> tuple[TokenCount, ...]:
    """Multiplied: projections, the router, shared expert and the chosen experts. A gated delta net multiplies a token's
    key and query with its state S, and adds their product to it: 3 |S|; it keeps S and the convolution's inputs."""
    keys, values = delta_net_widths(s)
    state = s.linear_num_value_heads * s.linear_key_head_dim * s.linear_value_head_dim
    inputs = (2 * keys + values) * (s.linear_conv_kernel_dim - 1)
    added = 2 * s.hidden_size
    full = [n for n in counts(s).layers if not n.recurrent]
    recurrent = [n for n in counts(s).layers if n.recurrent]
    kinds: dict[bool, TokenCount] = {}
    if full:
        kinds[False] = sizes.token_count(s, full[0], added=added + 2 * s.head_dim)
    if recurrent:
        few = s.linear_value_head_dim + 2 * s.linear_num_value_heads
        multiplied = sizes.token_count(s, recurrent[0], added=added + few).multiplied + 3 * state
        kinds[True] = TokenCount(
            multiplied, cached=0, attended=0, states=state, inputs=inputs, gathered=2 * keys + values
        )
    return tuple(kinds[is_recurrent(s, i)] for i in range(s.num_layers))


def shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups, key heads of gated delta nets and the shared network, ep experts, etp columns of an
    expert."""
    heads = Share(s.linear_num_key_heads, "model.linear_num_key_heads", ("tp",))
    return (*sizes.grouped_query_shares(s), heads, *sizes.network_shares(s), *sizes.expert_shares(s))


def complaints(s: ModelShape) -> Iterator[str]:
    """Sizes that would not train, or not even build."""
    yield from sizes.router_complaints(s)
    yield from sizes.grouped_query_complaints(s)
    for name in sorted(OWN):
        if not getattr(s, name):
            yield f"model.{name} must be set for model.family={NAME}: it is 0"
    if s.linear_num_key_heads and s.linear_num_value_heads % s.linear_num_key_heads:
        yield (
            f"model.linear_num_value_heads={s.linear_num_value_heads} must be a multiple of "
            f"model.linear_num_key_heads={s.linear_num_key_heads}"
        )


def small(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """As in sizes.py, with two layers of either kind, or one per (virtual) stage."""
    heads = max(2, axes["tp"])
    delta_net = {
        "full_attention_interval": 2,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 3,
    }
    shared = {"shared_expert_ffn_size": 12 * axes["tp"]}
    return sizes.small_grouped_query(axes) | sizes.small_experts(s, axes) | delta_net | shared


QWEN3_NEXT = Family(
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
    only_local="gated delta nets and norms that multiply by 1 + weight",
)
