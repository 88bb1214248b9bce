"""How evenly the routers of an update spread its tokens over the experts.

L  layers of the whole model      E  experts of a layer      T  tokens that a router sees on this rank
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch
from gspo_megatron.base.metrics import Metric
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.models.shape import ModelShape


class RouterLoad:
    """Counts the tokens of every expert in the training forwards of an update.

    Only rows that predict a trained token count, so that padding, and with it the layout, makes no difference. Forwards
    outside `counting` do not count: the sampler's, those that score, and the second one of activation recompute.
    """

    def __init__(self, model: Sequence[torch.nn.Module], shape: ModelShape, groups: Groups) -> None:
        self.groups = groups
        routers = [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
        for router in routers:
            router.register_forward_hook(self._count)
        self._here = [router.layer_number - 1 for router in routers]
        self._layers: list[int] | None = None
        """The layers with a router, on any rank: known once `metrics` has asked."""
        self._counts_LE = torch.zeros(shape.num_layers, shape.num_experts, dtype=torch.int64, device=groups.device)
        self._rows_T: Tensor | None = None

    @contextmanager
    def counting(self, micro_batch: MicroBatch) -> Iterator[None]:
        """While it is open, routers are counted; they see the tokens of `micro_batch`."""
        rows_T = torch.zeros(len(micro_batch.tokens_T), dtype=torch.bool, device=self._counts_LE.device)
        rows_T[micro_batch.rows_R] = True
        # Sequence parallel: each tensor-parallel rank has an equal part of the tokens.
        self._rows_T = rows_T.chunk(self.groups.layout.tp)[self.groups.tp_rank]
        try:
            yield
        finally:
            self._rows_T = None

    def _count(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._rows_T is not None:
            _, chosen_TE = output
            self._counts_LE[router.layer_number - 1] += (chosen_TE.bool() & self._rows_T[:, None]).sum(0)

    def metrics(self) -> dict[str, Metric]:
        """Of each layer with a router, from the counts n_e over all ranks, which start again from 0: max(n) / mean(n),
        the number of experts with n_e = 0, and -sum(p ln p) / ln E for p = n / sum(n). A layer without tokens has
        nothing to average. Collective."""
        layers = self._layers = self._layers if self._layers is not None else self._layers_of_all()
        if not layers:
            return {}
        counts_LE = self.groups.sum_over_ranks(self._counts_LE)[layers].double().cpu()
        self._counts_LE.zero_()
        tokens_L, num_experts = counts_LE.sum(1), counts_LE.shape[1]
        share_LE = counts_LE / tokens_L.clamp(min=1)[:, None]
        found = {
            "max_load": share_LE.amax(1) * num_experts,
            "dead_experts": (counts_LE == 0).sum(1),
            "entropy": torch.special.entr(share_LE).sum(1) / (math.log(num_experts) if num_experts > 1 else 1),
        }
        weights = (tokens_L > 0).double().tolist()
        return {
            f"router/{name}/layer_{layer + 1:02d}": Metric(value * weight, weight)
            for name, values_L in found.items()
            for layer, value, weight in zip(layers, values_L.tolist(), weights, strict=True)
        }

    def _layers_of_all(self) -> list[int]:
        here_L = torch.zeros(len(self._counts_LE), dtype=torch.int64, device=self.groups.device)
        here_L[self._here] = 1
        return self.groups.sum_over_ranks(here_L).nonzero().flatten().tolist()
