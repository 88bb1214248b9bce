"""The sizes of a model."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Everything that determines a model's tensors and maths. The fields are settings of section `model`.

    Fields with a default are those that only some families use (`Family.uses`); the default is their value in all
    others.

    Attributes:
        family: a row of FAMILIES.
        vocab_size: rows of the vocabulary matrices, without padding. None: not yet set from the tokenizer.
        max_sequence_length: prompt and response, in tokens.
        num_query_groups: key/value heads per layer.
        head_dim: width of one attention head; heads * head_dim need not equal hidden_size.
        qk_norm: queries and keys are normalised, each head on its own.
        attention_bias: the projections to queries, keys and values have a bias.
        partial_rotary_factor: the share of a head's dimensions, the first ones, that RoPE rotates.
        sliding_window: tokens that a token attends to, itself included, in the layers that have a window. 0: all.
        q_lora_rank: width of the latent that queries are projected from. 0: they are projected from the hidden states.
        kv_lora_rank: width of the latent that keys and values are projected from.
        qk_nope_head_dim, qk_rope_head_dim: the parts of a query or key without and with RoPE.
        v_head_dim: width of a value.
        num_experts: experts of a mixture-of-experts layer.
        experts_per_token: experts that a token is routed to in each of these layers.
        expert_ffn_size: inner width of one expert.
        shared_expert_ffn_size: inner width of the expert that every token passes through. 0: there is none.
        num_dense_layers: the first layers, which have a feed-forward network of width dense_ffn_size for experts.
        router_groups: equal groups of adjacent experts, of which the router first chooses router_groups_per_token.
        routed_scaling_factor: the weights of a token's experts, which sum to 1, are multiplied by it.
        full_attention_interval: one layer in this many has full attention, the others a gated delta net.
        linear_num_key_heads, linear_key_head_dim: of a gated delta net: its query and key heads, and their width.
        linear_num_value_heads, linear_value_head_dim: its value heads, adjacent ones of a key head, and their width.
        linear_conv_kernel_dim: tokens that its convolution sees, the newest included.
        rope_scaling: none, or yarn with the other rope_ fields (see models/rope.py).
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int | None
    max_sequence_length: int
    rope_base: float
    norm_epsilon: float
    tie_embeddings: bool
    num_query_groups: int = 0
    head_dim: int = 0
    qk_norm: bool = False
    attention_bias: bool = False
    partial_rotary_factor: float = 1.0
    sliding_window: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    num_dense_layers: int = 0
    dense_ffn_size: int = 0
    router_groups: int = 1
    router_groups_per_token: int = 1
    routed_scaling_factor: float = 1.0
    full_attention_interval: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    rope_scaling: str = "none"
    rope_scaling_factor: float = 1.0
    rope_original_length: int = 0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 0.0
    rope_mscale_all_dim: float = 0.0
    rope_truncate: bool = True

    @property
    def rope_dim(self) -> int:
        """The dimensions of a query or key that RoPE rotates."""
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor)

    def tensor_settings(self) -> dict[str, Any]:
        """The fields that determine which tensors exist, their sizes, and what their rows and columns mean."""
        return {name: value for name, value in asdict(self).items() if name not in MATHS_ONLY}


OPTIONAL: dict[str, Any] = {f.name: f.default for f in fields(ModelShape) if f.default is not MISSING}
"""Fields that only some families use, with their value in all others."""

MATHS_ONLY = frozenset(
    {
        "experts_per_token",
        "max_sequence_length",
        "norm_epsilon",
        "partial_rotary_factor",
        "routed_scaling_factor",
        "router_groups",
        "router_groups_per_token",
        "sliding_window",
        *(f.name for f in fields(ModelShape) if f.name.startswith("rope_")),
    }
)
"""Fields that change no tensor."""
