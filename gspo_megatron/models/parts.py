"""What several families share: name rules, keys of config.json, and rules about sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.models.names import GateUp, NameRule
from gspo_megatron.models.shape import ModelShape

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

EXPERT_RULES = (
    NameRule(f"{OURS}mlp.router.weight", (f"{THEIRS}mlp.gate.weight",)),
    *feed_forward(f"{OURS}mlp.experts.local_experts.{{expert}}.", f"{THEIRS}mlp.experts.{{expert}}."),
)
"""A router without bias and its experts."""


# --------------------------------------------------------------------------------------------------------- config.json


def read_sizes(hf: Mapping[str, Any], keys: Mapping[str, str], family: str) -> dict[str, Any]:
    """The values of `keys` (field of ModelShape: key of config.json) by field.

    Raises:
        ConfigError: a key is missing.
    """
    if missing := [key for key in keys.values() if key not in hf]:
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


def read_rope(hf: Mapping[str, Any], family: str, kinds: tuple[str, ...] = ("default",)) -> dict[str, Any]:
    """The rotation's fields of ModelShape. transformers 5 writes `rope_theta` into `rope_parameters`, earlier ones
    everything else into `rope_scaling`.

    Raises:
        ConfigError: a kind of rotation that is not in `kinds`, or a parameter that is missing or not implemented.
    """
    rope = {"rope_theta": hf.get("rope_theta", 10_000.0)} | (hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        known = " and ".join(repr(each) for each in kinds)
        raise ConfigError(f"config.json has RoPE of type {kind!r}, but only {known} is implemented for {family}")
    base = {"rope_base": float(rope["rope_theta"])}
    if kind == "default":
        return base
    check_implemented(rope, {"attention_factor": (None, None), "truncate": (True, True)}, family)
    needed = {"rope_scaling_factor": "factor", "rope_original_length": "original_max_position_embeddings"}
    return {
        **base,
        "rope_scaling": kind,
        **read_sizes(rope, needed, family),
        "rope_beta_fast": rope.get("beta_fast") or 32.0,
        "rope_beta_slow": rope.get("beta_slow") or 1.0,
        "rope_mscale": rope.get("mscale") or 0.0,
        "rope_mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
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
    }
    return {"rope_theta": s.rope_base, "rope_scaling": scaling}


# --------------------------------------------------------------------------------------------------------------- rules


def router_complaints(s: ModelShape) -> Iterator[str]:
    """Numbers of experts that do not fit together, and what to do."""
    if s.experts_per_token > s.num_experts:
        yield f"model.experts_per_token={s.experts_per_token} exceeds model.num_experts={s.num_experts}"
    if s.experts_per_token == 1 and s.num_experts > 1:
        yield (
            "model.experts_per_token=1 makes the router's normalised weight the constant 1, so it would learn "
            "nothing; use 2 or more"
        )
