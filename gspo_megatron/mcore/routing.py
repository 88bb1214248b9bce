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
from gspo_megatron.base.replay import expert_dtype, replay_of
from gspo_megatron.config.sections import AlgorithmConfig
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.models.families import has_sigmoid_router
from gspo_megatron.models.shape import ModelShape

Choice = tuple[Tensor, Tensor]
"""(scores, experts), [T / tp, k] each, as torch.topk returns them."""


class Routing(Protocol):
    """Decides the experts of one micro-batch's tokens."""

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        """The experts in layer `layer` (from 0) of the whole model, given the router's own choice."""


class Recording:
    """Keeps what the routers of one forward choose, in the dtype of the column, and with `log_prob_dtype` the log-probs
    of that."""

    def __init__(self, shape: ModelShape, groups: Groups, *, log_prob_dtype: torch.dtype | None = None) -> None:
        self.shape, self.groups = shape, groups
        self._dtype, self._log_prob_dtype = expert_dtype(shape.num_experts), log_prob_dtype
        self._experts: dict[int, Tensor] = {}
        self._log_probs: dict[int, Tensor] = {}

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        self._experts[layer] = own[1].to(self._dtype)
        if self._log_prob_dtype is not None:
            self._log_probs[layer] = log_probs_of(scores_TE, own[1]).to(self._log_prob_dtype)
        return own

    def seen(self, num_tokens: int) -> Tensor:
        """Experts [T / tp, L, k] of a forward of T = `num_tokens`, as this rank has seen it: NO_EXPERT in layers
        without a router and in those of other pipeline stages."""
        return self._by_layer(self._experts, num_tokens, NO_EXPERT, self._dtype)

    def columns(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """`routed_experts` of the micro-batch, [T, L, k], with NO_EXPERT in padding and in layers without a router, and
        `expert_log_probs`, 0 in those. Called once: what was kept is freed. Collective over the tensor-parallel ranks
        and the pipeline stages."""
        num_tokens, outside_T = len(micro_batch.tokens_T), ~micro_batch.inside_T
        experts_TLk = torch.cat(from_parts(self.seen(num_tokens), self.groups))
        experts_TLk[outside_T] = NO_EXPERT
        found = {"routed_experts": experts_TLk}
        if self._log_prob_dtype is not None:
            log_probs_TLk = self._by_layer(self._log_probs, num_tokens, 0, self._log_prob_dtype)
            found["expert_log_probs"] = torch.cat(from_parts(log_probs_TLk, self.groups))
            found["expert_log_probs"][outside_T] = 0
        self._experts.clear()
        self._log_probs.clear()
        return found

    def _by_layer(self, found: dict[int, Tensor], num_tokens: int, fill: int, dtype: torch.dtype) -> Tensor:
        size = num_tokens // self.groups.layout.tp, self.shape.num_layers, self.shape.experts_per_token
        whole_TLk = torch.full(size, fill, dtype=dtype, device=self.groups.device)
        if found:
            whole_TLk[:, list(found)] = torch.stack(list(found.values()), 1)
        return whole_TLk


def log_probs_of(scores_TE: Tensor, experts_Tk: Tensor) -> Tensor:
    """log softmax of a router's logits at some experts, in float32 or more. Scores are logits where the softmax comes
    after the choice, as in all families without a sigmoid router."""
    scores_TE = scores_TE.detach().to(torch.promote_types(scores_TE.dtype, torch.float32))
    return scores_TE.log_softmax(dim=1).gather(1, experts_Tk)


def from_parts(seen_TLk: Tensor, groups: Groups) -> list[Tensor]:
    """What each tensor-parallel rank has seen, in all layers of the model, from what the ranks have seen of it in
    theirs: where that is nothing, NO_EXPERT among integers, or 0. Collective over the tensor-parallel ranks and the
    pipeline stages."""
    parts = [seen_TLk]
    if groups.layout.tp > 1:
        parts = [torch.empty_like(seen_TLk) for _ in range(groups.layout.tp)]
        # As bytes: NCCL knows no int16.
        dist.all_gather([part.view(torch.uint8) for part in parts], seen_TLk.view(torch.uint8), group=groups.tp)
    if groups.layout.pp > 1:
        for part in parts:
            whole = part.int() if part.dtype == torch.int16 else part
            dist.all_reduce(
                whole, op=dist.ReduceOp.SUM if part.is_floating_point() else dist.ReduceOp.MAX, group=groups.pp
            )
            part.copy_(whole)
    return parts


class Recorded:
    """Compares the routers' choice with an earlier one, `routed_experts` of a micro-batch, and where `replay` is set,
    puts that in its place. `changed` counts what differs. With the log-probs that the routers gave those experts then,
    `shift` averages how far they have moved, in layer l

        d_t^l = 1/k sum_e |log p_new^l(e) - log p_old^l(e)|      over the k recorded experts e of token t  (2510.23027)
    """

    def __init__(
        self,
        experts_TLk: Tensor,
        changed: LayerMeans,
        *,
        replay: bool,
        log_probs_TLk: Tensor | None = None,
        shift: LayerMeans | None = None,
    ) -> None:
        self._groups = changed.groups
        self._experts_TLk, self._log_probs_TLk = self._part(experts_TLk), None
        if log_probs_TLk is not None:
            self._log_probs_TLk = self._part(log_probs_TLk)
        self._changed, self._shift, self._replay = changed, shift, replay
        self._shifts: dict[int, Tensor] = {}

    def _part(self, whole_T: Tensor) -> Tensor:
        return whole_T.chunk(self._groups.layout.tp)[self._groups.tp_rank]

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        recorded_Tk, own_Tk = self._experts_TLk[:, layer].long(), own[1]
        assert recorded_Tk.shape == own_Tk.shape, (recorded_Tk.shape, own_Tk.shape)
        known_T = recorded_Tk[:, 0] != NO_EXPERT
        differs_T = (recorded_Tk.sort(dim=1).values != own_Tk.sort(dim=1).values).any(dim=1)
        self._changed.add(layer, differs_T, known_T)
        if self._shift is not None and self._log_probs_TLk is not None:
            moved_Tk = log_probs_of(scores_TE, recorded_Tk.clamp(min=0)) - self._log_probs_TLk[:, layer]
            # Set, not added: the forward that recompute repeats finds the same.
            self._shifts[layer] = torch.where(known_T, moved_Tk.abs().mean(dim=1), 0.0)
            self._shift.add(layer, self._shifts[layer], known_T)
        if not self._replay:
            return own
        experts_Tk = torch.where(known_T[:, None], recorded_Tk, own_Tk)
        return scores_TE.gather(1, experts_Tk), experts_Tk

    def shift_of(self, micro_batch: MicroBatch) -> Tensor:
        """[R]: the mean of d^l over the layers with a router, of the row that predicts each trained token. Once the
        whole model has run, on a rank that has all of its layers. Collective over the tensor-parallel ranks."""
        shift_T = torch.stack(list(self._shifts.values())).mean(dim=0)
        return torch.cat(from_parts(shift_T, self._groups))[micro_batch.rows_R]


@dataclass(frozen=True)
class Both:
    """Two of them, the second of which is given the choice of the first."""

    first: Routing
    second: Routing

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        return self.second.choose(layer, scores_TE, self.first.choose(layer, scores_TE, own))


class RoutingReplay:
    """What the forwards of a step do with the experts of the sampler and of the old policy, both in turn in the column
    `routed_experts`, by the settings of `algorithm`. `score_dtype`: of log-probs, the routers' too."""

    def __init__(self, algorithm: AlgorithmConfig, shape: ModelShape, groups: Groups, score_dtype: torch.dtype) -> None:
        # A router of sigmoids has no probabilities of experts.
        replay = replay_of(algorithm.routing_replay, algorithm.router_shift_floor)
        self.replay = replay._replace(log_probs=replay.log_probs and not has_sigmoid_router(shape.family))
        self.weighs_shift = algorithm.router_shift_floor is not None
        self.shape, self.groups, self.score_dtype = shape, groups, score_dtype
        self._since_sampler = LayerMeans("sampler_changed_fraction", shape, groups)
        self._since_old = LayerMeans("changed_fraction", shape, groups)
        self._shift = LayerMeans("shift", shape, groups)

    def in_scoring(self, micro_batch: MicroBatch) -> tuple[Routing | None, Recording | None]:
        """Of the pass that scores old log-probs: what decides the experts, and the part of it that records them."""
        of_sampler, recording = micro_batch.columns.get("routed_experts"), None
        routing: Routing | None = None
        if of_sampler is not None:
            routing = Recorded(of_sampler, self._since_sampler, replay=self.replay.in_scoring)
        if self.replay.of_old:
            log_prob_dtype = self.score_dtype if self.replay.log_probs else None
            recording = Recording(self.shape, self.groups, log_prob_dtype=log_prob_dtype)
            routing = Both(routing, recording) if routing else recording
        return routing, recording

    def in_update(self, micro_batch: MicroBatch) -> Recorded | None:
        """None: the routers choose, as in a warm start."""
        recorded = micro_batch.columns.get("routed_experts")
        if recorded is None:
            return None
        return Recorded(
            recorded,
            self._since_old,
            replay=self.replay.in_updates,
            log_probs_TLk=micro_batch.columns.get("expert_log_probs"),
            shift=self._shift,
        )

    def note_shift(self, routing: Recorded | None, micro_batch: MicroBatch) -> None:
        """Fills in `router_shift` of a micro-batch whose loss comes next, where ratios are weighed by it: 0 without
        `routing`, as on a rank without sequences in a step that goes on."""
        if self.weighs_shift:
            none_R = torch.zeros(len(micro_batch.rows_R), dtype=self.score_dtype, device=self.groups.device)
            micro_batch.columns["router_shift"] = none_R if routing is None else routing.shift_of(micro_batch)

    def metrics(self) -> dict[str, Metric]:
        """See `LayerMeans.metrics`. Collective."""
        return self._since_sampler.metrics() | self._since_old.metrics() | self._shift.metrics()


class LayerMeans:
    """For every layer, the mean of a number over tokens: router/`name`/layer_NN."""

    def __init__(self, name: str, shape: ModelShape, groups: Groups) -> None:
        self.name, self.groups = name, groups
        self._sums_2L = torch.zeros(2, shape.num_layers, dtype=torch.float64, device=groups.device)

    def add(self, layer: int, values_T: Tensor, counted_T: Tensor) -> None:
        self._sums_2L[0, layer] += torch.where(counted_T, values_T, 0).sum(dtype=torch.float64)
        self._sums_2L[1, layer] += counted_T.sum()

    def metrics(self) -> dict[str, Metric]:
        """Of each layer with tokens, from the sums over all ranks, which start again from 0. Collective."""
        total_L, count_L = self.groups.sum_over_ranks(self._sums_2L).cpu()
        self._sums_2L.zero_()
        sums = zip(total_L.tolist(), count_L.tolist(), strict=True)
        return {
            f"router/{self.name}/layer_{layer + 1:02d}": Metric(total, count)
            for layer, (total, count) in enumerate(sums)
            if count
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
        if not torch.is_grad_enabled():
            own = _in_order(own)
        return own if self.routing is None else self.routing.choose(self.layer, scores_TE, own)


def _in_order(choice: Choice) -> Choice:
    """By falling score, as with gradient. Without gradient, Megatron-Core 0.19.2 leaves the k experts of a token in any
    order on a GPU (moe_utils.py, `sorted=torch.is_grad_enabled()`), and the order decides the last bit of the sum that
    their probabilities are divided by: in bf16 the mean log-ratio of a first update was off by 4e-4 on an H200, as
    much as GSPO's clip band."""
    scores_Tk, experts_Tk = choice
    scores_Tk, order_Tk = scores_Tk.sort(dim=1, descending=True, stable=True)
    return scores_Tk, experts_Tk.gather(1, order_Tk)


def install(chunks: Sequence[torch.nn.Module]) -> None:
    """Lets the routing of a forward (`PackedTokens.routing`) decide in every router of the model; where there is none,
    the routers choose as they do, in the same order with and without gradient."""
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)):
        router = getattr(layer.mlp, "router", None)
        if isinstance(router, TopKRouter):
            router.router_replay = LayerChoice(layer.layer_number - 1)
            layer.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    layer.mlp.router.router_replay.routing = kwargs["packed_seq_params"].routing
