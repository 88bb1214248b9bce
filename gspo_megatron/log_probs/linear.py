"""Log-probs and entropies directly from hidden states and the vocabulary matrix.

Communication in the tensor-parallel group: the forward makes one all-gather of 2 or 3 numbers per row and, with
sequence parallelism, one of the scored hidden rows; the backward makes, for every chunk of rows, one reduce-scatter
(with sequence parallelism) or all-reduce of the hidden gradient, overlapped with the matmuls of the weight gradient.
There is none when no row is scored.

Shape suffixes: N rows of a micro-batch, n the scored ones, b some rows of a chunk of these, V vocabulary, Vp one rank's
shard, v the columns of the shard that are token ids, K statistics of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.base.tensors import on_device
from gspo_megatron.log_probs import backends, blocks
from gspo_megatron.log_probs.arguments import check_lse, checked_targets
from gspo_megatron.log_probs.products import accumulator
from gspo_megatron.log_probs.rows import Chunk, GradientReturn, Rows
from gspo_megatron.log_probs.shards import Shards, merge
from gspo_megatron.log_probs.support import Places


class Scoring(NamedTuple):
    """How trained tokens are scored: the arguments of the same names of `linear_log_probs`."""

    temperature: float
    with_entropy: bool = False
    store_bytes: int = 0
    skip_zero_rows: bool = True
    backend: str = "auto"

    @property
    def forward_only(self) -> Scoring:
        """The same for log-probs that nothing is differentiated through."""
        return Scoring(self.temperature, backend=self.backend)


def linear_log_probs(
    hidden_NH: Tensor,
    weight_VpH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    support: Ragged | None = None,
    backend: str = "auto",
    store_bytes: int = 0,
    skip_zero_rows: bool = True,
    validate: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log p(y) = z_y - log sum_v e^{z_v} and H = -sum_v p_v log p_v of z = h W^T / temperature, v < vocab_size.

    hidden_NH: [N, H]; with `sequence_parallel` this rank's contiguous rows of it, [N / t, H].
    weight_VpH: this rank's contiguous shard of the vocabulary, ids [rank * Vp, (rank + 1) * Vp). If it has a place in
        Megatron's gradient buffers (`main_grad`, `grad_added_to_main_grad`), its gradient is added there.
    targets_N: int64 [N], the same full list on every rank. Rows whose target is IGNORED never reach the matmul: their
        results and gradients are 0, whatever their hidden state holds. Targets on the host cost no synchronisation.
    group: the ranks that share the vocabulary; None: this process holds all of it.
    vocab_size: number of true ids (default t * Vp). Columns beyond it have probability 0 and gradient 0, so that
        results do not depend on how the matrix was padded.
    support: for each row with a target, in order, the ids that its softmax runs over, with its target among them: the
        others have probability 0 and gradient 0. None: all ids. The fused forward of Triton is then not used.
    backend: `torch`; `triton`, for Hopper and newer GPUs in float32, bf16 and fp16; `auto`: Triton where it runs on
        every rank of the group, see `backends.agree`.
    store_bytes: memory for exponentials kept between forward and backward, 2 to 8 bytes for each scored row and column.
        What is not kept is recomputed: a quarter of all the work where nothing is kept.
    skip_zero_rows: leave rows whose gradients are exactly 0, such as those of a clipped sequence, out of the backward.
        Finding them costs one synchronisation.
    validate: check values as well as shapes: targets, finite rows, and that all ranks of the group received the same
        rows. Costs a small collective and a synchronisation.

    Returns log-probs (natural logarithm) and, on request, entropies (nats): [N], float32 (float64 for float64 inputs),
    bitwise equal on every rank. No logit is rounded to bf16 on the way, whose spacing is far above the clip band of
    3e-4 (arXiv 2507.18071, section 5.1).

    Differentiable in hidden and weight, for a loss that is bitwise equal on every rank. The gradient of hidden is that
    of the whole vocabulary, that of weight is the shard's own; both are accumulated in float32 (float64) and rounded
    once.

    Raises:
        ConfigError: a setting or shape that cannot work.
        DataError: a target that is not an id, a row that is not finite, or different rows on different ranks. With
            `validate`, both are raised on every rank of the group together.
    """
    shards = Shards.of(group)
    vocab_size, targets_host_N = checked_targets(
        hidden_NH,
        weight_VpH,
        targets_N,
        shards,
        temperature,
        sequence_parallel,
        vocab_size,
        store_bytes,
        support,
        validate=validate,
    )
    rows = Rows.of(targets_host_N != IGNORED, shards, sequence_parallel=sequence_parallel)
    first_id = shards.rank * len(weight_VpH)
    number_N = (targets_host_N != IGNORED).cumsum(0) - 1
    call = _Call(
        kernels=backends.choose(backend, hidden_NH, shards.group),
        rows=rows,
        columns_n=on_device(targets_host_N[rows.order_n] - first_id, hidden_NH.device),
        num_columns=min(max(vocab_size - first_id, 0), len(weight_VpH)),
        first_id=first_id,
        support=None if support is None else support[number_N[rows.order_n]],
        inverse_temperature=1.0 / temperature,
        with_entropy=with_entropy,
        store_bytes=store_bytes if torch.is_grad_enabled() else 0,
        skip_zero_rows=skip_zero_rows,
        validate=validate,
        main_grad=_main_grad(weight_VpH),
    )
    log_probs_n, entropy_n = _LinearLogProbs.apply(hidden_NH, weight_VpH, call)
    order_n = on_device(rows.order_n, hidden_NH.device)
    log_probs_N = log_probs_n.new_zeros(len(targets_N)).index_copy(0, order_n, log_probs_n)
    if not with_entropy:
        return log_probs_N, None
    return log_probs_N, entropy_n.new_zeros(len(targets_N)).index_copy(0, order_n, entropy_n)


@torch.no_grad()
def vocab_parallel_logits(
    hidden_NH: Tensor, weight_VpH: Tensor, *, group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """z = h W^T over the whole vocabulary, gathered from its shards: [N, vocab_size], the same on every rank.

    For the few rows a sampler draws from: it holds N * V float32 numbers (float64 for float64 inputs). No gradient.
    Arguments as for `linear_log_probs`.
    """
    shards = Shards.of(group)
    shard_NVp = blocks.logits(hidden_NH, weight_VpH)
    return shards.gather(shard_NVp).movedim(0, 1).flatten(1)[:, :vocab_size]


@dataclass(frozen=True)
class _Call:
    """What a call consists of besides the two differentiable tensors."""

    kernels: blocks.Kernels
    rows: Rows
    columns_n: Tensor
    num_columns: int
    first_id: int
    support: Ragged | None
    inverse_temperature: float
    with_entropy: bool
    store_bytes: int
    skip_zero_rows: bool
    validate: bool
    main_grad: Tensor | None

    def places(self, index: Tensor | slice, like: Tensor) -> Places | None:
        """Of the support of some of the n rows."""
        if self.support is None:
            return None
        width = blocks.block_shape(like)[1]
        return Places(self.support[index], self.first_id, self.num_columns, width, like.device)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VpH: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
        rows = call.rows
        ctx.chunks = list(rows.chunks(blocks.block_shape(hidden_NH)[0]))
        store = blocks.Store(call.store_bytes, [x.num_rows for x in ctx.chunks], call.num_columns, hidden_NH)
        hidden_H = rows.gather(hidden_NH)
        stats, ctx.kept = [blocks.no_statistics(hidden_NH, 0, call.with_entropy)], []
        for chunk in ctx.chunks:
            stats_Kb, kept = blocks.statistics(
                call.kernels,
                rows.take(hidden_H, torch.arange(chunk.rows.start, chunk.rows.stop)),
                weight_VpH[: call.num_columns],
                call.columns_n[chunk.rows],
                call.inverse_temperature,
                with_entropy=call.with_entropy,
                store=store,
                support=call.places(chunk.rows, hidden_NH),
            )
            stats.append(stats_Kb)
            ctx.kept.append(kept)
        shard_Kn = torch.cat(stats, 1)
        # Every rank has the same rows, so where there are none all skip the collective.
        lse_n, log_probs_n, *rest = merge(rows.shards.gather(shard_Kn) if len(rows) else shard_Kn[None])
        if call.validate:
            check_lse(lse_n, rows, hidden_H)
        entropy_n = rest[0] if call.with_entropy else None
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, hidden_H, weight_VpH, lse_n, log_probs_n, entropy_n)
        return log_probs_n, entropy_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs_n: Tensor | None, d_entropy_n: Tensor | None) -> tuple[Tensor, Any, None]:
        call: _Call = ctx.call
        hidden_NH, hidden_H, weight_VpH, lse_n, log_probs_n, entropy_n = ctx.saved_tensors
        row_n = blocks.RowGradients(
            lse_n,
            log_probs_n,
            torch.zeros_like(lse_n) if d_log_probs_n is None else d_log_probs_n * call.inverse_temperature,
            None if d_entropy_n is None else entropy_n,
            None if d_entropy_n is None else d_entropy_n * call.inverse_temperature,
        )
        d_weight_VpH = call.main_grad
        if ctx.needs_input_grad[1] and d_weight_VpH is None:
            d_weight_VpH = torch.zeros_like(weight_VpH, dtype=accumulator(weight_VpH))
        d_hidden = GradientReturn(call.rows, hidden_NH)
        kept, ctx.kept = ctx.kept, [[] for _ in ctx.chunks]  # it is overwritten: a second backward recomputes it
        indices = _rows_with_gradient(ctx.chunks, row_n, skip_zero_rows=call.skip_zero_rows)
        for chunk, kept_of_chunk, index_b in zip(ctx.chunks, kept, indices, strict=True):
            if not len(index_b):
                continue
            on_device_b = on_device(index_b, hidden_NH.device)
            is_whole = len(index_b) == chunk.num_rows
            blocks.gradients(
                call.kernels,
                call.rows.take(hidden_H, index_b),
                weight_VpH[: call.num_columns],
                call.columns_n[on_device_b],
                call.inverse_temperature,
                row_n.each(itemgetter(on_device_b)),
                kept_of_chunk,
                None if is_whole else on_device_b - chunk.rows.start,
                d_weight_vH=None if d_weight_VpH is None else d_weight_VpH[: call.num_columns],
                with_hidden=partial(d_hidden.send, chunk, index_b),
                support=call.places(index_b, hidden_NH),
            )
        if call.main_grad is not None:
            return d_hidden.finish(), _added_to_main_grad(weight_VpH), None
        return d_hidden.finish(), None if d_weight_VpH is None else d_weight_VpH.to(weight_VpH.dtype), None


def _rows_with_gradient(
    chunks: Sequence[Chunk], row_n: blocks.RowGradients, *, skip_zero_rows: bool
) -> Iterator[Tensor]:
    """For each chunk, the rows that take part in the backward, as indices among the n, on the host."""
    if not skip_zero_rows:
        yield from (torch.arange(chunk.rows.start, chunk.rows.stop) for chunk in chunks)
        return
    has_gradient_n = row_n.d_log_probs != 0  # True for NaN
    if row_n.d_entropy is not None:
        has_gradient_n |= row_n.d_entropy != 0
    has_gradient_n = has_gradient_n.cpu()
    for chunk in chunks:
        yield has_gradient_n[chunk.rows].nonzero().flatten() + chunk.rows.start


def _main_grad(weight_VpH: Tensor) -> Tensor | None:
    """The place of the weight's gradient in Megatron's buffers, if it has one."""
    has_place = weight_VpH.requires_grad and hasattr(weight_VpH, "grad_added_to_main_grad")
    return getattr(weight_VpH, "main_grad", None) if has_place else None


def _added_to_main_grad(weight_VpH: Any) -> Tensor | None:
    """Marks the gradient as already in Megatron's buffer, and returns what autograd needs to call Megatron's hook.

    With overlapped reduction the hook requires a gradient, which it then drops unread: any tensor of the right shape
    will do, and the weight itself takes no memory. Nothing may be added to it, so where another gradient is added, that
    of a tied embedding (`zero_out_wgrad`) or an older one, it is None.
    """
    weight_VpH.grad_added_to_main_grad = True
    if getattr(weight_VpH, "zero_out_wgrad", False) or weight_VpH.grad is not None:
        return None
    return weight_VpH.detach()
