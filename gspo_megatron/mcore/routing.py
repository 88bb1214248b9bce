"""Which experts each token goes to: recorded in one forward pass, compared with or used again in another.

The router asks the object in `router.router_replay` for its top-k: here a `LayerChoice`. Before each forward, the
layer tells it the `Routing` of its tokens, which travels with them (`PackedTokens.routing`). A forward that is repeated
for the backward (activation recompute) gets the same tokens, and so the same routing. Megatron-Core's own RouterReplay
keeps one record per layer for all micro-batches, and accepts targets of the wrong length.

Shapes: T tokens of a micro-batch on this rank, of which a router sees T / tp under sequence parallel; E experts, k of a
token; L layers of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gspo_megatron.base.batches import NO_EXPERT, MicroBatch
from gspo_megatron.base.metrics import Metric
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.models.shape import ModelShape

Choice = tuple[Tensor, Tensor]
"""(scores, experts), [T / tp, k] each, as torch.topk returns them."""


class Routing(Protocol):
    """Decides the experts of one micro-batch's tokens."""

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        """The experts in layer `layer` (from 0) of the whole model, given the router's own choice."""


class Recording:
    """Keeps what the routers choose."""

    def __init__(self) -> None:
        self._chosen: dict[int, Tensor] = {}

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        scores_Tk, experts_Tk = own
        # Without gradient, Megatron-Core 0.19.2 leaves the k experts of a token in any order on a GPU; with it, in the
        # order of their scores. The order decides the last bit of their softmax.
        order_Tk = scores_Tk.argsort(dim=1, descending=True, stable=True)
        self._chosen[layer] = experts_Tk.gather(1, order_Tk)
        return own

    def column(self, micro_batch: MicroBatch, shape: ModelShape, groups: Groups) -> Tensor:
        """`routed_experts` of the micro-batch, [T, L, k]: NO_EXPERT in padding and in layers without a router.
        Collective over the tensor-parallel ranks, which have seen a part of the tokens each, and the pipeline stages,
        which have seen their own layers."""
        layout, num_tokens = groups.layout, len(micro_batch.tokens_T)
        size = num_tokens // layout.tp, shape.num_layers, shape.experts_per_token
        seen_TLk = torch.full(size, NO_EXPERT, dtype=torch.int32, device=groups.device)
        for layer, experts_Tk in self._chosen.items():
            seen_TLk[:, layer] = experts_Tk.int()
        if layout.tp > 1:
            parts = [torch.empty_like(seen_TLk) for _ in range(layout.tp)]
            dist.all_gather(parts, seen_TLk, group=groups.tp)
            seen_TLk = torch.cat(parts)
        if layout.pp > 1:
            dist.all_reduce(seen_TLk, op=dist.ReduceOp.MAX, group=groups.pp)
        seen_TLk[~micro_batch.inside_T] = NO_EXPERT
        return seen_TLk.to(expert_dtype(shape))


class Recorded:
    """Compares the routers' choice with an earlier one, `routed_experts` of a micro-batch, and where `replay` is set,
    puts that in its place; `drift` counts what differs."""

    def __init__(self, experts_TLk: Tensor, groups: Groups, drift: RoutingDrift, *, replay: bool) -> None:
        self._experts_TLk = experts_TLk.chunk(groups.layout.tp)[groups.tp_rank]
        self._drift, self._replay = drift, replay

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        recorded_Tk, own_Tk = self._experts_TLk[:, layer].long(), own[1]
        assert recorded_Tk.shape == own_Tk.shape, (recorded_Tk.shape, own_Tk.shape)
        known_T1 = recorded_Tk[:, :1] != NO_EXPERT
        self._drift.count(layer, recorded_Tk, own_Tk, known_T1)
        if not self._replay:
            return own
        experts_Tk = torch.where(known_T1, recorded_Tk, own_Tk)
        return scores_TE.gather(1, experts_Tk), experts_Tk


class RoutingDrift:
    """Counts, for every layer, the tokens whose set of experts is not the recorded one."""

    def __init__(self, shape: ModelShape, groups: Groups) -> None:
        self.groups = groups
        self._changed_known_2L = torch.zeros(2, shape.num_layers, dtype=torch.int64, device=groups.device)

    def count(self, layer: int, recorded_Tk: Tensor, own_Tk: Tensor, known_T1: Tensor) -> None:
        differs_T1 = (recorded_Tk.sort(dim=1).values != own_Tk.sort(dim=1).values).any(dim=1, keepdim=True)
        self._changed_known_2L[:, layer] += torch.stack([(differs_T1 & known_T1).sum(), known_T1.sum()])

    def metrics(self) -> dict[str, Metric]:
        """Of each layer with recorded tokens, the share of them whose experts have changed, from the counts over all
        ranks, which start again from 0. Collective."""
        changed_L, known_L = self.groups.sum_over_ranks(self._changed_known_2L).double().cpu()
        self._changed_known_2L.zero_()
        counts = zip(changed_L.tolist(), known_L.tolist(), strict=True)
        return {
            f"router/changed_fraction/layer_{layer + 1:02d}": Metric(changed, known)
            for layer, (changed, known) in enumerate(counts)
            if known
        }


class LayerChoice:
    """Stands in `router.router_replay` of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.routing: Routing | None = None
        """Of the forward that is running."""

    def get_replay_topk(
        self,
        scores_TE: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Choice] | None = None,
    ) -> Choice:
        """Megatron-Core calls it in place of its own top-k, `default_compute_topk`."""
        assert default_compute_topk is not None
        own = default_compute_topk(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        return own if self.routing is None else self.routing.choose(self.layer, scores_TE, own)


def expert_dtype(shape: ModelShape) -> torch.dtype:
    """Of `routed_experts`: the smallest that holds NO_EXPERT and all experts."""
    return torch.int8 if shape.num_experts <= 128 else torch.int16


def install(chunks: Sequence[torch.nn.Module]) -> None:
    """Lets the routing of a forward (`PackedTokens.routing`) decide in every router of the model."""
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)):
        router = getattr(layer.mlp, "router", None)
        if isinstance(router, TopKRouter):
            router.router_replay = LayerChoice(layer.layer_number - 1)
            layer.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    layer.mlp.router.router_replay.routing = kwargs["packed_seq_params"].routing
