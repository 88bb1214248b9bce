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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gspo_megatron.base.batches import NO_EXPERT, MicroBatch
from gspo_megatron.base.metrics import Metric
from gspo_megatron.base.replay import REPLAYS, expert_dtype
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

    def seen(self, num_tokens: int, shape: ModelShape, groups: Groups) -> Tensor:
        """[T / tp, L, k] of a forward of T = `num_tokens`, as this rank has seen it: NO_EXPERT in layers without a
        router and in those of other pipeline stages."""
        size = num_tokens // groups.layout.tp, shape.num_layers, shape.experts_per_token
        seen_TLk = torch.full(size, NO_EXPERT, dtype=expert_dtype(shape.num_experts), device=groups.device)
        if self._chosen:
            seen_TLk[:, list(self._chosen)] = torch.stack(list(self._chosen.values()), 1).to(seen_TLk.dtype)
        return seen_TLk

    def column(self, micro_batch: MicroBatch, shape: ModelShape, groups: Groups) -> Tensor:
        """`routed_experts` of the micro-batch, [T, L, k]: NO_EXPERT in padding and in layers without a router.
        Collective over the tensor-parallel ranks and the pipeline stages."""
        seen_TLk = torch.cat(from_parts(self.seen(len(micro_batch.tokens_T), shape, groups), groups))
        seen_TLk[~micro_batch.inside_T] = NO_EXPERT
        return seen_TLk


def from_parts(seen_TLk: Tensor, groups: Groups) -> list[Tensor]:
    """What each tensor-parallel rank has seen, in all layers of the model, from what the ranks have seen of it in
    theirs. Collective over the tensor-parallel ranks and the pipeline stages."""
    parts = [seen_TLk]
    if groups.layout.tp > 1:
        parts = [torch.empty_like(seen_TLk) for _ in range(groups.layout.tp)]
        # As bytes: NCCL knows no int16.
        dist.all_gather([part.view(torch.uint8) for part in parts], seen_TLk.view(torch.uint8), group=groups.tp)
    if groups.layout.pp > 1:
        for part in parts:
            largest = part if part.dtype == torch.int8 else part.int()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.pp)
            part.copy_(largest)
    return parts


class Recorded:
    """Compares the routers' choice with an earlier one, `routed_experts` of a micro-batch, and where `replay` is set,
    puts that in its place; `drift` counts what differs."""

    def __init__(self, experts_TLk: Tensor, drift: RoutingDrift, *, replay: bool) -> None:
        groups = drift.groups
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


@dataclass(frozen=True)
class Both:
    """Two of them, the second of which is given the choice of the first."""

    first: Routing
    second: Routing

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        return self.second.choose(layer, scores_TE, self.first.choose(layer, scores_TE, own))


class RoutingReplay:
    """What the forwards of a step do with the experts of the sampler and of the old policy, both in turn in the column
    `routed_experts`: `mode` is algorithm.routing_replay."""

    def __init__(self, mode: str, shape: ModelShape, groups: Groups) -> None:
        self.mode, self.shape, self.groups = REPLAYS[mode], shape, groups
        self._since_sampler = RoutingDrift("sampler_changed_fraction", shape, groups)
        self._since_old = RoutingDrift("changed_fraction", shape, groups)

    def in_scoring(self, micro_batch: MicroBatch) -> tuple[Routing | None, Recording | None]:
        """Of the pass that scores old log-probs: what decides the experts, and keeps them for `record`."""
        of_sampler, recording = micro_batch.columns.get("routed_experts"), None
        routing: Routing | None = None
        if of_sampler is not None:
            routing = Recorded(of_sampler, self._since_sampler, replay=self.mode.in_scoring)
        if self.mode.of_old:
            recording = Recording()
            routing = Both(routing, recording) if routing else recording
        return routing, recording

    def in_update(self, micro_batch: MicroBatch) -> Routing | None:
        """None: the routers choose, as in a warm start."""
        recorded = micro_batch.columns.get("routed_experts")
        return None if recorded is None else Recorded(recorded, self._since_old, replay=self.mode.in_updates)

    def metrics(self) -> dict[str, Metric]:
        """See `RoutingDrift.metrics`. Collective."""
        return self._since_sampler.metrics() | self._since_old.metrics()


class RoutingDrift:
    """Counts, for every layer, the tokens whose set of experts is not the recorded one: router/`name`."""

    def __init__(self, name: str, shape: ModelShape, groups: Groups) -> None:
        self.name, self.groups = name, groups
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
            f"router/{self.name}/layer_{layer + 1:02d}": Metric(changed, known)
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


def install(chunks: Sequence[torch.nn.Module]) -> None:
    """Lets the routing of a forward (`PackedTokens.routing`) decide in every router of the model."""
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)):
        router = getattr(layer.mlp, "router", None)
        if isinstance(router, TopKRouter):
            router.router_replay = LayerChoice(layer.layer_number - 1)
            layer.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    layer.mlp.router.router_replay.routing = kwargs["packed_seq_params"].routing
