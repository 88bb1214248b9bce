"""Micro-batches through Megatron's pipeline schedules, and the one place where the loss is scaled.

**The scale.** The objective returns a micro-batch's share l_m of the update's loss, already divided by the global
number of sequences (or tokens), so that the gradient wanted is the plain sum over micro-batches and data-parallel
ranks,
    g = sum_{d, m} grad l_{d,m}.
Megatron, given a loss function that returns (loss, metrics), computes instead
    g' = 1 / (dp * cp) * sum_{d, c} sum_m grad(cp / num_micro_batches * loss_{d,c,m}):
forward_step_calc_loss multiplies by cp and divides by the number of micro-batches (pipeline_parallel/schedules.py), and
DistributedDataParallel divides by the size of the data- and context-parallel group (distributed_data_parallel.py),
experts included. With loss = l * num_micro_batches * dp both cancel and g' = g, however the batch is split. Every rank
of a group has the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, UpdateBatch
from gspo_megatron.base.metrics import Metric
from gspo_megatron.base.protocols import Loss
from gspo_megatron.log_probs import Scoring, linear_log_probs
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.optimizer import wait_for_weight
from gspo_megatron.mcore.packed_tokens import PackedTokens, packed
from gspo_megatron.mcore.router_load import RouterLoad
from gspo_megatron.mcore.routing import Recorded, Routing, RoutingReplay

ModelInput = tuple[Tensor, PackedTokens]
Chunks = Sequence[Any]
"""This rank's parts of the model, wrapped for training or bare."""


def train(
    chunks: Chunks,
    groups: Groups,
    batch: UpdateBatch,
    loss: Loss,
    scoring: Scoring,
    load: RouterLoad,
    replay: RoutingReplay,
) -> list[dict[str, Metric]]:
    """Forward and backward of one update; leaves reduced gradients in the buffers, and the tokens of every expert in
    `load`. `replay` decides the experts. Metrics exist on the last stage only, on
    its device. Nothing here waits for the device, except that scoring.skip_zero_rows reads which rows to skip."""
    scale = len(batch.micro_batches) * groups.dp_size

    def micro_batch_loss(
        micro_batch: MicroBatch, routing: Recorded | None, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        head = _bare(chunks[-1])
        wait_for_weight(chunks[-1], head.head_weight())
        log_probs_R, entropy_R = response_log_probs(head, groups, micro_batch, hidden, scoring)
        replay.note_shift(routing, micro_batch)
        terms = loss(log_probs_R, entropy_R, micro_batch, batch)
        return terms.loss * scale, terms.metrics | {"loss": Metric(terms.loss.detach().double(), reduction="sum")}

    def forward_step(micro_batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(micro_batches)
        routing = replay.in_update(micro_batch)
        with load.counting(micro_batch):
            hidden = model(*model_input(micro_batch, groups, routing))
        return hidden, partial(micro_batch_loss, micro_batch, routing)

    return _run(forward_step, chunks, batch.micro_batches, forward_only=False)


@torch.no_grad()
def log_probs(
    chunks: Chunks,
    groups: Groups,
    micro_batches: Sequence[MicroBatch],
    scoring: Scoring,
    routings: Sequence[Routing | None],
) -> list[Tensor]:
    """Log-probs of every micro-batch's response tokens, [R] each, without gradient; an empty list before the last
    stage. `routings` decide the experts of each, None: the routers."""
    module = _bare(chunks[-1])

    def score(micro_batch: MicroBatch, hidden: Tensor) -> Tensor:
        return response_log_probs(module, groups, micro_batch, hidden, scoring.forward_only)[0]

    steps = [(model_input(m, groups, r), partial(score, m)) for m, r in zip(micro_batches, routings, strict=True)]
    return forward(chunks, steps)


@torch.no_grad()
def forward(chunks: Chunks, steps: Sequence[tuple[ModelInput, Callable[[Tensor], Any]]]) -> list[Any]:
    """Runs each step's input through the pipeline and its function on the hidden states; results on the last stage
    only. With a virtual pipeline the number of steps is a multiple of the pipeline's stages."""

    def forward_step(remaining: Iterator[tuple[ModelInput, Callable[[Tensor], Any]]], model: Any) -> Any:
        inputs, use = next(remaining)

        def non_loss(hidden: Tensor, non_loss_data: bool) -> Any:
            return use(hidden)

        return model(*inputs), non_loss

    return _run(forward_step, chunks, steps, forward_only=True)


def model_input(micro_batch: MicroBatch, groups: Groups, routing: Routing | None = None) -> ModelInput:
    m = micro_batch
    return m.tokens_T, packed(m.positions_T, m.cu_seqlens, m.max_seqlen, groups.cp, routing)


def response_log_probs(
    module: PolicyModel,
    groups: Groups,
    micro_batch: MicroBatch,
    hidden: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor | None]:
    """(log-probs [R], entropy [R]) of the response tokens, from hidden states [T, 1, H] (or this rank's share of T)."""
    log_probs_T, entropy_T = linear_log_probs(
        hidden.squeeze(1),
        module.head_weight(),
        micro_batch.targets_T,
        **scoring._asdict(),
        group=groups.tp if groups.layout.tp > 1 else None,
        sequence_parallel=module.config.sequence_parallel,
        vocab_size=module.true_vocab_size,
        kept_ids=micro_batch.columns.get("support"),
        # Token ids are checked with the prompts, ranks of a group build the same micro-batches, and run/guards.py
        # checks the loss and the gradient.
        validate=False,
    )
    rows_R = micro_batch.rows_R
    return log_probs_T[rows_R], None if entropy_T is None else entropy_T[rows_R]


def _bare(chunk: Any) -> PolicyModel:
    return chunk if isinstance(chunk, PolicyModel) else chunk.module


def _run(forward_step: Callable[..., Any], chunks: Chunks, items: Sequence[Any], *, forward_only: bool) -> list[Any]:
    models = [_bare(chunk) for chunk in chunks]
    # Transformer Engine quantises weights in the first forward after they have changed, and keeps the copies.
    changed = any(model.weights_changed for model in models)
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(items),
        seq_length=1,  # micro-batches are ragged; stages exchange their lengths (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        first_val_step=changed,
    )
    for model in models:
        model.weights_changed = not forward_only  # the optimizer's step comes next
    return results
