"""The sizes of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Everything that determines a model's tensors and maths. The fields are settings of section `model`.

    Attributes:
        family: a row of FAMILIES.
        head_dim: width of one attention head; heads * head_dim need not equal hidden_size.
        num_query_groups: key/value heads per layer.
        experts_per_token: experts that a token is routed to in each layer.
        expert_ffn_size: inner width of one expert.
        vocab_size: rows of the vocabulary matrices, without padding. None: not yet set from the tokenizer.
        max_sequence_length: prompt and response, in tokens.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    vocab_size: int | None
    max_sequence_length: int
    rope_base: float
    norm_epsilon: float
    tie_embeddings: bool

    def tensor_settings(self) -> dict[str, Any]:
        """The fields that determine which tensors exist, their sizes, and what their rows and columns mean."""
        maths_only = ("experts_per_token", "max_sequence_length", "rope_base", "norm_epsilon")
        return {name: value for name, value in asdict(self).items() if name not in maths_only}
