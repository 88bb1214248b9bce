"""Log-probs and entropies straight from hidden states and the vocabulary matrix.

What crosses the tensor-parallel group: in a forward one all-gather of 2 or 3 numbers a row and, with sequence
parallelism, one of the scored hidden rows; in a backward one reduce-scatter (with sequence parallelism) or all-reduce
of the hidden gradient. Nothing when no row is scored.

Shape suffixes: N rows of a micro-batch, n those of them that are scored, m this rank's share of the n (all of them
without sequence parallelism), t tensor-parallel ranks, V vocabulary, Vp one rank's shard, v the columns of the shard
that are token ids, K statistics of a row, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_megatron.log_probs import torch_backend
from gspo_megatron.log_probs.shards import Shards, merge
from gspo_megatron.types import IGNORED, ConfigError, DataError

BACKENDS: dict[str, ModuleType] = {"auto": torch_backend, "torch": torch_backend}


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """log p(y) = z_y - log sum_v e^{z_v} and H = -sum_v p_v log p_v of z = h W^T / temperature, v < vocab_size.

    hidden_NH: [N, H]; with `sequence_parallel` this rank's contiguous rows of it, [N / t, H].
    weight_VpH: this rank's contiguous shard of the vocabulary, ids [rank * Vp, (rank + 1) * Vp).
    targets_N: int64 [N], the same full list on every rank. Rows whose target is IGNORED never reach the matmul: their
        results and gradients are 0, whatever their hidden state holds.
    group: the ranks that hold the vocabulary between them; None: this process holds all of it.
    vocab_size: number of true ids (default t * Vp). Columns beyond it have probability 0 and gradient 0, so that
        results do not depend on how the matrix was padded.

    Returns log-probs (natural logarithm) and, on request, entropies (nats): [N], float32 (float64 for float64 inputs),
    bitwise equal on every rank. No logit is rounded to bf16 on the way: its spacing is far above the clip band of 3e-4
    (arXiv 2507.18071, section 5.1).

    Differentiable in hidden and weight, for a loss that is the same on every rank. The gradient of hidden is that of
    the whole vocabulary, that of weight is the shard's own; both are added up in float32 (float64) and rounded once.

    Raises ConfigError (settings, shapes) and DataError (a target that is no id) on every rank, before any exchange.
    """
    shards = Shards.of(group)
    vocab_size = _check_settings(hidden_NH, weight_VpH, targets_N, shards, sequence_parallel, vocab_size)
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} must be positive; score greedy samples at temperature 1")
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    # On the host: the exchange needs the counts as Python numbers, and one copy of the targets is one device wait.
    targets_host_N = targets_N.cpu()
    _check_targets(targets_host_N, vocab_size)

    is_scored_N = targets_host_N != IGNORED
    scored_n = is_scored_N.nonzero().flatten()
    own_m, counts = scored_n, None
    if not len(scored_n):
        shards = Shards.of(None)
    elif sequence_parallel and shards.size > 1:
        own_m, counts = shards.own_rows(is_scored_N)

    first_id = shards.rank * len(weight_VpH)
    call = _Call(
        backend=BACKENDS[backend],
        shards=shards,
        counts=counts,
        columns_n=(targets_host_N[scored_n] - first_id).to(hidden_NH.device),
        num_columns=min(max(vocab_size - first_id, 0), len(weight_VpH)),
        inverse_temperature=1.0 / temperature,
        with_entropy=with_entropy,
    )
    hidden_mH = hidden_NH.index_select(0, own_m.to(hidden_NH.device))
    log_probs_n, entropy_n = _LinearLogProbs.apply(hidden_mH, weight_VpH, call)
    log_probs_N = _spread(log_probs_n, scored_n, len(targets_N))
    return log_probs_N, _spread(entropy_n, scored_n, len(targets_N)) if with_entropy else None


@torch.no_grad()
def vocab_parallel_logits(
    hidden_NH: Tensor, weight_VpH: Tensor, *, group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> Tensor:
    """z = h W^T over the whole vocabulary, gathered from its shards: [N, vocab_size], the same on every rank.

    For the few rows a sampler draws from: it holds N * V float32 numbers (float64 for float64 inputs). No gradient.
    Arguments as for `linear_log_probs`.
    """
    shards = Shards.of(group)
    shard_NVp = torch_backend.logits(hidden_NH, weight_VpH)
    return shards.gather(shard_NVp).movedim(0, 1).flatten(1)[:, :vocab_size]


def _spread(values_n: Tensor, rows_n: Tensor, num_rows: int) -> Tensor:
    return values_n.new_zeros(num_rows).index_copy(0, rows_n.to(values_n.device), values_n)


def _check_settings(
    hidden_NH: Tensor,
    weight_VpH: Tensor,
    targets_N: Tensor,
    shards: Shards,
    sequence_parallel: bool,
    vocab_size: int | None,
) -> int:
    """Returns the true size of the vocabulary."""
    num_rows, num_ids = len(targets_N), shards.size * len(weight_VpH)
    if sequence_parallel and num_rows % shards.size:
        raise ConfigError(
            f"{num_rows} rows do not divide over {shards.size} sequence-parallel ranks; "
            f"pad the micro-batch to a multiple of {shards.size} rows"
        )
    expected = num_rows // shards.size if sequence_parallel else num_rows
    if len(hidden_NH) != expected:
        raise ConfigError(
            f"hidden has {len(hidden_NH)} rows where {num_rows} targets, {shards.size} ranks and "
            f"sequence_parallel={sequence_parallel} ask for {expected}"
        )
    if hidden_NH.dtype != weight_VpH.dtype:
        raise ConfigError(f"hidden is {hidden_NH.dtype} and weight {weight_VpH.dtype}; cast one to the other's dtype")
    if vocab_size is not None and not 1 <= vocab_size <= num_ids:
        raise ConfigError(f"vocab_size={vocab_size} must lie in [1, {num_ids}], the columns of the vocabulary matrix")
    return num_ids if vocab_size is None else vocab_size


def _check_targets(targets_N: Tensor, vocab_size: int) -> None:
    is_bad_N = (targets_N != IGNORED) & ((targets_N < 0) | (targets_N >= vocab_size))
    if is_bad_N.any():
        row = int(is_bad_N.nonzero()[0])
        raise DataError(
            f"target {int(targets_N[row])} of row {row} is neither an id in [0, {vocab_size}) nor IGNORED ({IGNORED}); "
            "does the tokenizer belong to this model?"
        )


@dataclass(frozen=True)
class _Call:
    """What one call fixes besides the two differentiable tensors. `counts` has the scored rows of every rank when
    they must be exchanged, None when this rank has them all."""

    backend: ModuleType
    shards: Shards
    counts: list[int] | None
    columns_n: Tensor
    num_columns: int
    inverse_temperature: float
    with_entropy: bool


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_mH: Tensor, weight_VpH: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
        hidden_nH = hidden_mH if call.counts is None else call.shards.gather_rows(hidden_mH, call.counts)
        shard_Kn = call.backend.statistics(
            hidden_nH,
            weight_VpH[: call.num_columns],
            call.columns_n,
            call.inverse_temperature,
            with_entropy=call.with_entropy,
        )
        lse_n, log_probs_n, *rest = merge(call.shards.gather(shard_Kn))
        entropy_n = rest[0] if call.with_entropy else None
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_nH, weight_VpH, lse_n, entropy_n)
        return log_probs_n, entropy_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_probs_n: Tensor | None, d_entropy_n: Tensor | None) -> tuple[Tensor, Tensor, None]:
        call: _Call = ctx.call
        hidden_nH, weight_VpH, lse_n, entropy_n = ctx.saved_tensors
        d_weight_VpH = torch.zeros_like(weight_VpH)
        d_hidden_nH = call.backend.gradients(
            hidden_nH,
            weight_VpH[: call.num_columns],
            call.columns_n,
            call.inverse_temperature,
            lse_n,
            torch.zeros_like(lse_n) if d_log_probs_n is None else d_log_probs_n,
            None if d_entropy_n is None else (entropy_n, d_entropy_n),
            d_weight_vH=d_weight_VpH[: call.num_columns],
        )
        if call.counts is None:
            d_hidden_mH = call.shards.sum(d_hidden_nH)
        else:
            d_hidden_mH = call.shards.sum_own_rows(d_hidden_nH, call.counts)
        return d_hidden_mH.to(hidden_nH.dtype), d_weight_VpH, None
