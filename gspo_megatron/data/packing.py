"""Sequences to micro-batches: which rank and which micro-batch each one goes to, and the packed tensors of one.

S sequences of a micro-batch, T packed tokens (padding included), R response tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gspo_megatron.types import IGNORED, ConfigError, DataError, MicroBatch, Sequence


def plan_micro_batches(
    lengths: Seq[int], dp_size: int, max_tokens: int, cost: Callable[[int], float] = float
) -> list[list[list[int]]]:
    """plan[rank][micro-batch] -> indices into `lengths`; every sequence once.

    1. Costliest first, each sequence goes to the rank with the least total `cost` so far: the totals of two ranks then
       differ by no more than one sequence.
    2. Longest first, each sequence of a rank goes to its first micro-batch with room for it in `max_tokens`.
    3. Empty micro-batches are added until all ranks have the same number, as the collectives of pipeline and expert
       parallelism need it.

    `cost(length)` is the work of a sequence, by default its tokens. The same lengths in another order give the same
    micro-batches, up to which of several equally long sequences is where.
    Errors: ConfigError when one sequence alone is longer than `max_tokens`.
    """
    if max(lengths, default=0) > max_tokens:
        longest = max(lengths)
        raise ConfigError(
            f"sequence {lengths.index(longest)} has {longest} tokens, more than a micro-batch may hold ({max_tokens}); "
            f"raise train.tokens_per_micro_batch to at least {longest}"
        )
    loads = [(0.0, rank) for rank in range(dp_size)]
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    for index in sorted(range(len(lengths)), key=lambda index: (-cost(lengths[index]), -lengths[index], index)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + cost(lengths[index]), rank))
        shares[rank].append(index)
    plan = [_first_fit(lengths, share, max_tokens) for share in shares]
    count = max(map(len, plan))
    return [micro_batches + [[] for _ in range(count - len(micro_batches))] for micro_batches in plan]


def build_micro_batch(sequences: Seq[Sequence], index: Seq[int], *, pad_id: int, multiple_of: int = 1) -> MicroBatch:
    """Packs sequences[i], i in `index`, one behind the other, as int64 tensors of T tokens (`cu_seqlens` int32).

    Row t of a sequence of length L and prompt length P predicts its token t + 1 where P - 1 <= t < L - 1; every other
    row is IGNORED. Positions count from 0 in each sequence. Up to multiple_of - 1 tokens of padding bring T to a
    multiple and form one more segment; without sequences all of T = multiple_of is padding, since every rank has to
    take part in the collectives of a forward pass. Old and reference log-probs are there when the sequences have them.
    Errors: DataError for a sequence without prompt tokens.
    """
    packed = [sequences[i] for i in index]
    for i, sequence in zip(index, packed, strict=True):
        if sequence.prompt_length < 1:
            raise DataError(f"sequence {i} has no prompt token to predict its first response token from; add a prompt")
    tokens = [token for sequence in packed for token in sequence.tokens]
    targets = [target for sequence in packed for target in _targets(sequence)]
    padding = -len(tokens) % multiple_of if tokens else multiple_of
    segments = [len(sequence.tokens) for sequence in packed] + [padding] * (padding > 0)
    return MicroBatch(
        tokens_T=torch.tensor(tokens + [pad_id] * padding),
        positions_T=torch.cat([torch.arange(length) for length in segments]),
        targets_T=torch.tensor(targets + [IGNORED] * padding),
        cu_seqlens=torch.tensor([0, *segments]).cumsum(0).to(torch.int32),
        max_seqlen=max(segments),
        response_lengths=[sequence.response_length for sequence in packed],
        index=list(index),
        advantages_S=torch.tensor([sequence.advantage for sequence in packed], dtype=torch.float32),
        old_log_probs_R=_joined([sequence.old_log_probs for sequence in packed], packed),
        ref_log_probs_R=_joined([sequence.ref_log_probs for sequence in packed], packed),
    )


def _first_fit(lengths: Seq[int], share: Seq[int], max_tokens: int) -> list[list[int]]:
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(share, key=lambda index: (-lengths[index], index)):
        place = next((k for k, free in enumerate(room) if lengths[index] <= free), len(room))
        if place == len(room):
            micro_batches.append([])
            room.append(max_tokens)
        micro_batches[place].append(index)
        room[place] -= lengths[index]
    return micro_batches


def _targets(sequence: Sequence) -> list[int]:
    """Each row's next token where that is a response token; the last row has none."""
    prompt_rows = [IGNORED] * (sequence.prompt_length - 1)
    targets = [*prompt_rows, *sequence.tokens[sequence.prompt_length :], IGNORED]
    assert len(targets) == len(sequence.tokens), "the prompt is longer than the whole sequence"
    return targets


def _joined(log_probs: list[Tensor | None], packed: list[Sequence]) -> Tensor | None:
    """[R] log-probs of the sequences; None when they have none. Without sequences: a tensor of no elements."""
    present = [values for values in log_probs if values is not None]
    assert len(present) in (0, len(packed)), "some sequences of a micro-batch have log-probs, others have none"
    if len(present) < len(packed):
        return None
    assert [len(values) for values in present] == [sequence.response_length for sequence in packed]
    return torch.cat([torch.empty(0), *present])
