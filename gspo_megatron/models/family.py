"""What defines a model family: its sizes, its Hugging Face names, and what Megatron-Core and the planner need from it.

Pure data. A family is a row of FAMILIES (models/families.py), defined in a file of its own such as qwen3_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gspo_megatron.models.names import NameRule
from gspo_megatron.models.shape import ModelShape


@dataclass(frozen=True)
class LayerCount:
    """Parameters of one layer by how they are sharded.

    Attributes:
        sharded: projections of attention, a dense or shared feed-forward network: over tp.
        replicated: norms, the router and the like: unsharded on every rank of the stage.
        expert: one expert, over etp.
        num_experts: experts of the layer, over ep; 0 in a dense layer.
        recurrent: a gated delta net in place of attention.
    """

    sharded: int
    replicated: int
    expert: int = 0
    num_experts: int = 0
    recurrent: bool = False


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by how they are sharded.

    Attributes:
        vocabulary: one vocabulary matrix. `num_vocabularies` is 2, or 1 where embedding and head are tied.
        layers: from the first to the last.
        final_norm: on the last stage.
    """

    vocabulary: int
    num_vocabularies: int
    layers: tuple[LayerCount, ...]
    final_norm: int

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.active(None)

    def active(self, experts_per_token: int | None) -> int:
        """Parameters that a token passes through: `experts_per_token` experts of a layer, None for all of them."""
        layers = sum(
            n.sharded + n.replicated + min(n.num_experts, experts_per_token or n.num_experts) * n.expert
            for n in self.layers
        )
        return self.num_vocabularies * self.vocabulary + layers + self.final_norm


@dataclass(frozen=True)
class TokenCount:
    """What one token costs in one layer.

    Attributes:
        multiplied: weights that it is multiplied with.
        cached: numbers in the sampler's cache, sharded over tp: keys and values.
        attended: multiply-adds for each token that it attends to.
        cached_whole: numbers in the sampler's cache that every tp rank holds: latents.
        window: tokens that it attends to at most. 0: all earlier ones.
        states: numbers that the sampler keeps of a sequence, however long, sharded over tp, in float32 or wider.
        inputs: the same in the model's number format.
        gathered: numbers that context parallel gathers of it, sharded over tp, where they are not what is cached.
    """

    multiplied: int
    cached: int
    attended: int
    cached_whole: int = 0
    window: int = 0
    states: int = 0
    inputs: int = 0
    gathered: int = 0

    def pairs(self, length: float) -> float:
        """Pairs of a token and one that it attends to, in a sequence of `length`: L (L + 1) / 2 without a window, else
        W (L - W) more than those of the first W tokens."""
        within = min(length, self.window or length)
        return within * (within + 1) / 2 + (length - within) * within


@dataclass(frozen=True)
class Share:
    """A size that parallel axes divide.

    Attributes:
        value: must be divisible by the product of the sizes of `axes`.
        name: what messages call it.
        columns: True where each part is a number of matrix columns, of which a number format may require a multiple.
    """

    value: int
    name: str
    axes: tuple[str, ...] = ()
    columns: bool = False


@dataclass(frozen=True)
class Family:
    """Everything that the rest of the package needs to know about an architecture.

    Attributes:
        name: the `model_type` of its config.json.
        uses: the optional fields of ModelShape that it reads.
        shape: config.json of a Hugging Face folder -> the shape, or ConfigError for what is not implemented.
        hf_config: the inverse, without what the weights do not determine (token ids, number format).
        rules: for every tensor of the model, its name here and on the hub.
        megatron: fields of Megatron-Core's TransformerConfig that the architecture determines.
        counts: parameters by how they are sharded.
        per_token: what a token costs in each layer.
        shares: the sizes that parallel axes divide.
        complaints: messages about sizes that do not fit together, and what to do.
        small: (shape, ranks by axis) -> sizes of the smallest model that has every component and fits these ranks.
        only_local: what it has that Transformer Engine's layers are not built with here; empty: they are.
        writes_scores: Megatron's local layers write attention scores out, all at once.
    """

    name: str
    uses: frozenset[str]
    shape: Callable[[Mapping[str, Any]], ModelShape]
    hf_config: Callable[[ModelShape], dict[str, Any]]
    rules: tuple[NameRule, ...]
    megatron: Callable[[ModelShape], dict[str, Any]]
    counts: Callable[[ModelShape], ParameterCount]
    per_token: Callable[[ModelShape], tuple[TokenCount, ...]]
    shares: Callable[[ModelShape], tuple[Share, ...]]
    complaints: Callable[[ModelShape], Iterator[str]]
    small: Callable[[ModelShape, Mapping[str, int]], dict[str, int]]
    only_local: str = ""
    writes_scores: bool = False
