"""The policy under training: model, optimizer, frozen reference, behind the protocol that the trainer drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, UpdateBatch
from gspo_megatron.base.metrics import Metric, merge
from gspo_megatron.base.protocols import Accept, Loss
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.log_probs import Scoring
from gspo_megatron.mcore import schedule
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import PolicyModel, build_model
from gspo_megatron.mcore.optimizer import build_optimizer, wait_for_weights, wrap_model
from gspo_megatron.mcore.parameters import named_parameters
from gspo_megatron.mcore.replica_check import differing_replicas
from gspo_megatron.mcore.router_load import RouterLoad
from gspo_megatron.mcore.routing import Routing, RoutingReplay
from gspo_megatron.mcore.weights import load_weights, whole_sizes, whole_weights
from gspo_megatron.models.names import HubSize, NameRule, Sliceable


class MegatronModel:
    """The model on any layout, without an optimizer: it is scored, sampled from and exported.

    `scoring`: how trained tokens are scored; `log_probs` uses its temperature and backend. `num_ids`: how many ids the
    tokenizer has, where the vocabulary has more; the others are neither sampled nor part of a softmax. None: all.
    """

    def __init__(
        self,
        config: Config,
        groups: Groups,
        device: Device,
        use_te: bool,
        scoring: Scoring,
        *,
        num_ids: int | None = None,
    ) -> None:
        self.config, self.groups, self.device, self.use_te = config, groups, device, use_te
        self.scoring, self.num_ids = scoring, num_ids
        self._model = build_model(config, groups, device, use_te, num_ids=num_ids)
        self.chunks: list[Any] = self._model
        """The same as they are called in a forward."""
        self.version = 0
        self.score_dtype = torch.float64 if device.dtype == torch.float64 else torch.float32

    @property
    def model(self) -> list[PolicyModel]:
        """This rank's parts of the model."""
        return self._model

    def log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See `Scores.log_probs`."""
        return self._scored(self.model, [self._here(m) for m in micro_batches], [None] * len(micro_batches))

    def _scored(
        self, chunks: Sequence[PolicyModel], here: Sequence[MicroBatch], routings: Sequence[Routing | None]
    ) -> list[Tensor]:
        scored = schedule.log_probs(chunks, self.groups, here, self.scoring, routings)
        counts = [len(m.sequence_R) for m in here]
        joined = (
            torch.cat(scored)
            if scored
            else torch.empty(sum(counts), dtype=self.score_dtype, device=self.device.torch_device)
        )
        return list(self.groups.from_last_stage(joined).split(counts))

    def weights(self, rules: Sequence[NameRule], *, only_to: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `whole_weights`."""
        return whole_weights(self.model, self.config.model.shape, self.groups, rules, only_to=only_to)

    def weight_sizes(self, rules: Sequence[NameRule]) -> dict[str, HubSize]:
        """See `whole_sizes`."""
        return whole_sizes(self.model, self.config.model.shape, self.groups, rules)

    def load_weights(self, read: Callable[[str], Sliceable], rules: Sequence[NameRule]) -> None:
        """See `load_weights`."""
        load_weights(self.model, self.config.model.shape, self.groups, rules, read)
        for chunk in self.model:
            chunk.weights_changed = True

    def _here(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch.to(self.device.torch_device)


class MegatronPolicy(MegatronModel):
    """`Policy` of base/protocols.py on Megatron-Core, on any layout."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        device: Device,
        use_te: bool,
        scoring: Scoring,
        *,
        num_ids: int | None = None,
    ) -> None:
        super().__init__(config, groups, device, use_te, scoring, num_ids=num_ids)
        self.reference: list[PolicyModel] | None = None
        self.chunks = wrap_model(self._model, device, config.optimizer)
        self._gathering = False
        self.router_load = RouterLoad(self._model, config.model.shape, groups)
        self.routing = RoutingReplay(config.algorithm, config.model.shape, groups, self.score_dtype)
        self.optimizer = build_optimizer(self.chunks, device, config.optimizer)

    @property
    def model(self) -> list[PolicyModel]:
        """This rank's parts of the model, with complete weights. The first use after an update is collective."""
        if self._gathering:
            wait_for_weights(self.chunks)
            self._gathering = False
        return self._model

    def begin(self, *, with_reference: bool) -> None:
        """See `Policy.begin`."""
        self.version = 0
        if with_reference:
            self.freeze_reference()

    def freeze_reference(self) -> None:
        """Copies the current policy, for `log_probs(reference=True)` to score."""
        self.reference = build_model(self.config, self.groups, self.device, self.use_te, num_ids=self.num_ids)
        for frozen, chunk in zip(self.reference, self.model, strict=True):
            frozen.load_state_dict(chunk.state_dict())
            frozen.requires_grad_(False).eval()

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], *, reference: bool = False, as_old: bool = False
    ) -> list[Tensor]:
        """See `Policy.log_probs`.

        Raises:
            RuntimeError: the reference is requested before `freeze_reference`.
        """
        chunks = self.reference if reference else self.model
        if chunks is None:
            raise RuntimeError("no reference policy was frozen; call freeze_reference() first")
        here = [self._here(m) for m in micro_batches]
        plans = [self.routing.in_scoring(m) if as_old else (None, None) for m in here]
        scored = self._scored(chunks, here, [routing for routing, _ in plans])
        for micro_batch, moved, (_, recording) in zip(micro_batches, here, plans, strict=True):
            if recording:
                micro_batch.columns |= recording.columns(moved)
        return scored

    def update(self, batch: UpdateBatch, loss: Loss, *, lr: float, accept: Accept | None = None) -> dict[str, Metric]:
        """See `Policy.update`."""
        for group in self.optimizer.param_groups:
            # Megatron's own scheduler, not used here, would apply these factors; norms have wd_mult 0.
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.config.optimizer.weight_decay * group.get("wd_mult", 1.0)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        here = UpdateBatch([self._here(m) for m in batch.micro_batches], batch.num_sequences, batch.num_tokens)
        metrics = merge(
            schedule.train(self.chunks, self.groups, here, loss, self.scoring, self.router_load, self.routing)
        )
        with self.device.optimizer_scope():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
        bad_loss = "loss" in metrics and not math.isfinite(metrics["loss"].total)
        # Only the last stage has the loss, and replicas may sum the same norm in a different order. All ranks use the
        # maximum, so that they make the same decision and clip alike.
        norm = norm if math.isfinite(norm) else math.inf
        grad_norm, bad, peak = self.groups.max_over_ranks([norm, float(bad_loss), self.device.peak_memory_gib()])
        if accept is None or accept(grad_norm, not bad):
            self._step(grad_norm)
        self._gathering = self.chunks[0].ddp_config.overlap_param_gather
        self.version += 1
        of_all = {
            "grad_norm": Metric(grad_norm),
            "memory/peak_gib": Metric(peak, reduction="max"),
            **self.router_load.metrics(),
            **self.routing.metrics(),
        }
        first = (self.groups.dp_rank, self.groups.cp_rank) == (0, 0)  # equal on all ranks; counted once
        return metrics | (of_all if first else {})

    def _step(self, grad_norm: float) -> None:
        """The rest of `self.optimizer.step()`, which in one call would leave no room for a decision after the norm."""
        clip_grad = self.config.optimizer.clip_grad
        with self.device.optimizer_scope():
            for part in self.optimizer.chained_optimizers:
                if clip_grad > 0 and (parameters := part.get_parameters()):
                    clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
            self.optimizer.step_with_ready_grads()

    def differing_replicas(self) -> list[str]:
        """See `Policy.differing_replicas`."""
        return differing_replicas(self.model, self.config.model.shape, self.groups)

    def gradients(self) -> Iterator[tuple[Place, Tensor]]:
        """The last update's gradients of this rank's parameters, reduced over all ranks. Complete only
        if optimizer.distributed is off, and unclipped only if the norm was within optimizer.clip_grad."""
        for chunk in self.model:
            for place, parameter in named_parameters(chunk, self.config.model.shape, self.groups):
                yield place, parameter.main_grad

    def load_weights(self, read: Callable[[str], Sliceable], rules: Sequence[NameRule]) -> None:
        """See `load_weights`: the policy continues from these weights, with the optimizer as it is."""
        super().load_weights(read, rules)
        self.optimizer.reload_model_params()
