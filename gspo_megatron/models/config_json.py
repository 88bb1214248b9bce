"""config.json of a Hugging Face folder: which keys a family reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.models.shape import ModelShape

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


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of config.json that a family has in common with all others, or reads and writes alike.

    Attributes:
        model_type: the family's name.
        architecture: its causal language model in transformers.
        sizes: field of ModelShape: key of config.json, with the same value.
        only: key of config.json: (what is implemented, what transformers takes where the key is missing).
    """

    model_type: str
    architecture: str
    sizes: Mapping[str, str]
    only: Mapping[str, tuple[Any, Any]]

    def read(self, hf: Mapping[str, Any], **more: str) -> dict[str, Any]:
        """Fields of ModelShape, and the value of each key in `more` under its name.

        Raises:
            ConfigError: a size is missing, or the model uses something that is not implemented.
        """
        if "num_experts" in self.sizes and "num_local_experts" in hf:  # transformers 5 may write it so
            hf = {self.sizes["num_experts"]: hf["num_local_experts"], **hf}
        found = read_sizes(hf, {**self.sizes, **more}, self.model_type)
        check_implemented(hf, self.only, self.model_type)
        return {"family": self.model_type, "tie_embeddings": hf.get("tie_word_embeddings", False), **found}

    def write(self, s: ModelShape, **more: Any) -> dict[str, Any]:
        """config.json of `s` with the keys of the files on the hub, which transformers 4 and 5 both read; `more` are
        those that only this family has."""
        assert s.vocab_size is not None, "model.vocab_size must be set before a model is written"
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{key: getattr(s, field) for field, key in self.sizes.items()},
            **more,
            **write_rope(s),
            "tie_word_embeddings": s.tie_embeddings,
            **{key: implemented for key, (implemented, _) in self.only.items()},
        }


def read_sizes(hf: Mapping[str, Any], keys: Mapping[str, str], family: str) -> dict[str, Any]:
    """The values of `keys` (field of ModelShape: key of config.json) by field.

    Raises:
        ConfigError: a key is missing, or its value is no number.
    """
    optional = {"q_lora_rank"}  # null is a value of it
    if missing := [key for key in keys.values() if hf.get(key) is None and not (key in optional and key in hf)]:
        raise ConfigError(f"config.json of a {family} model lacks {', '.join(missing)}; use the model's original file")
    for key in keys.values():
        if isinstance(hf[key], bool) or not isinstance(hf[key], (int, float, type(None))):
            raise ConfigError(
                f"config.json of a {family} model has {key}={hf[key]!r}, which is not a number; use the model's "
                "original file"
            )
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
