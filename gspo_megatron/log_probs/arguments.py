"""Checks of the arguments of `linear_log_probs`, which fail on all ranks of a group together.

Shape suffixes: N rows of a micro-batch, n the scored ones, Vp one rank's shard of the vocabulary, H hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.base.tensors import on_device
from gspo_megatron.log_probs.rows import Rows
from gspo_megatron.log_probs.shards import Shards


def checked_targets(
    hidden_NH: Tensor,
    weight_VpH: Tensor,
    targets_N: Tensor,
    shards: Shards,
    temperature: float,
    sequence_parallel: bool,
    vocab_size: int | None,
    store_bytes: int,
    support: Ragged | None = None,
    *,
    validate: bool,
) -> tuple[int, Tensor]:
    """(true size of the vocabulary, targets on the host).

    With `validate` all ranks raise together: otherwise they would wait for the failed one in the next collective.

    Raises:
        ConfigError: a setting or shape that cannot work.
        DataError: with `validate`, a target that is not an id or not in its row's support, or ranks whose arguments
            differ.
    """
    num_ids = shards.size * len(weight_VpH)
    targets_host_N, objection = targets_N.cpu(), None
    try:
        _check_settings(
            hidden_NH, weight_VpH, targets_N, shards, temperature, sequence_parallel, vocab_size, store_bytes
        )
        scored_n = (targets_host_N != IGNORED).nonzero().flatten()
        if support is not None and len(support) != len(scored_n):
            raise ConfigError(
                f"support has {len(support)} lists of ids for {len(scored_n)} scored rows; pass one for each of them"
            )
        if validate:
            _check_targets(targets_host_N, num_ids if vocab_size is None else vocab_size)
            _check_support(support, targets_host_N, scored_n, num_ids if vocab_size is None else vocab_size)
    except (ConfigError, DataError) as error:
        if not validate:
            raise
        objection = error
    if validate and shards.size > 1:
        seen = {
            "the number of rows": len(targets_N),
            "the number of scored rows": int((targets_host_N != IGNORED).sum()),
            "the sum of row * target": int((targets_host_N.flatten() * torch.arange(targets_N.numel())).sum()),
            "the sum of the ids kept": 0 if support is None else int(support.ids_E.sum()),
            "the hidden size": hidden_NH.shape[-1],
            "the shard of the vocabulary": len(weight_VpH),
        }
        _compare(seen, objection, shards, hidden_NH)
    if objection:
        raise objection
    return num_ids if vocab_size is None else vocab_size, targets_host_N


def check_lse(lse_n: Tensor, rows: Rows, hidden_H: Tensor) -> None:
    """Checks that every log-sum-exp is finite.

    Raises:
        DataError: one is not. Names the first such row, on every rank.
    """
    bad_n = (~lse_n.isfinite()).nonzero().flatten().cpu()
    if not len(bad_n):
        return
    first = bad_n[int(rows.order_n[bad_n].argmin())][None]
    hidden_is_bad = not bool(rows.take(hidden_H, first).isfinite().all())
    raise DataError(
        f"row {int(rows.order_n[first])}: "
        + (
            "its hidden state is not finite"
            if hidden_is_bad
            else "its logits are not finite, though its hidden state is"
        )
        + f" (log-sum-exp {float(lse_n[int(first)])}), as in {len(bad_n)} of {len(rows)} scored rows; "
        + ("check the forward pass that produced it" if hidden_is_bad else "check the vocabulary matrix")
    )


def _check_settings(
    hidden_NH: Tensor,
    weight_VpH: Tensor,
    targets_N: Tensor,
    shards: Shards,
    temperature: float,
    sequence_parallel: bool,
    vocab_size: int | None,
    store_bytes: int,
) -> None:
    shapes = tuple(hidden_NH.shape), tuple(weight_VpH.shape), tuple(targets_N.shape)
    if [*map(len, shapes)] != [2, 2, 1] or not hidden_NH.is_floating_point():
        raise ConfigError(
            f"hidden {shapes[0]} ({hidden_NH.dtype}), weight {shapes[1]} and targets {shapes[2]} must have the shapes "
            "(N, H), (V, H) and (N), with hidden and weight in a floating-point format"
        )
    num_rows, num_ids = len(targets_N), shards.size * len(weight_VpH)
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature={temperature} must be positive; score greedy samples at temperature 1")
    if store_bytes < 0:
        raise ConfigError(f"store_bytes={store_bytes} must not be negative; 0 keeps nothing")
    if sequence_parallel and num_rows % shards.size:
        raise ConfigError(
            f"{num_rows} rows do not divide evenly over {shards.size} sequence-parallel ranks; "
            f"pad the micro-batch to a multiple of {shards.size} rows"
        )
    expected = num_rows // shards.size if sequence_parallel else num_rows
    if len(hidden_NH) != expected:
        raise ConfigError(
            f"hidden has {len(hidden_NH)} rows, but {num_rows} targets, {shards.size} ranks and "
            f"sequence_parallel={sequence_parallel} require {expected}"
        )
    if hidden_NH.shape[1] != weight_VpH.shape[1]:
        raise ConfigError(
            f"hidden has {hidden_NH.shape[1]} columns and weight {weight_VpH.shape[1]}; both must be the hidden size"
        )
    if hidden_NH.dtype != weight_VpH.dtype:
        raise ConfigError(f"hidden is {hidden_NH.dtype} and weight {weight_VpH.dtype}; cast one to the other's dtype")
    if vocab_size is not None and not 1 <= vocab_size <= num_ids:
        raise ConfigError(f"vocab_size={vocab_size} must lie in [1, {num_ids}], the columns of the vocabulary matrix")


def _check_targets(targets_N: Tensor, vocab_size: int) -> None:
    is_bad_N = (targets_N != IGNORED) & ((targets_N < 0) | (targets_N >= vocab_size))
    if is_bad_N.any():
        row = int(is_bad_N.nonzero()[0])
        raise DataError(
            f"target {int(targets_N[row])} of row {row} is neither an id in [0, {vocab_size}) nor IGNORED ({IGNORED}); "
            "does the tokenizer belong to this model?"
        )


def _check_support(support: Ragged | None, targets_N: Tensor, scored_n: Tensor, vocab_size: int) -> None:
    if support is None:
        return
    if len(bad := ((support.ids_E < 0) | (support.ids_E >= vocab_size)).nonzero()):
        raise DataError(f"support has the id {int(support.ids_E[bad[0]])}, which is not in [0, {vocab_size})")
    if len(lacking := support.lacks(targets_N[scored_n]).nonzero()):
        row = int(scored_n[lacking[0]])
        raise DataError(
            f"target {int(targets_N[row])} of row {row} is not among the ids that its softmax runs over: its "
            "probability is 0; pass the ids that were kept when it was sampled"
        )


def _compare(seen: dict[str, int], objection: Exception | None, shards: Shards, like: Tensor) -> None:
    """Compares `seen` over the ranks. Collective.

    Raises:
        DataError: on a rank without an objection, when another has one or has seen other numbers.
    """
    mine = on_device(torch.tensor([objection is not None, *seen.values()]), like.device)
    objects, *columns = shards.gather(mine).T.tolist()
    if objection:
        return
    if any(objects):
        raise DataError(
            f"rank {objects.index(1)} of the {shards.size} that share the vocabulary rejected its arguments; "
            "its own message says why"
        )
    for name, values in zip(seen, columns, strict=True):
        if len(set(values)) > 1:
            raise DataError(
                f"{name} differs between the {shards.size} ranks that share the vocabulary: {values}, in rank order; "
                "pass the same targets on all of them"
            )
