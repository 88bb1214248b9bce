"""Sequences to micro-batches: which rank and which micro-batch each one goes to, and the packed tensors of one.

    pack = plan_micro_batches, the same on every rank, then build_micro_batch for those of this rank

S sequences of a micro-batch, T packed tokens (padding included), R response tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gspo_megatron.base.batches import IGNORED, MicroBatch, PackingRules, Sequence
from gspo_megatron.base.errors import ConfigError, DataError

FREE = PackingRules()
"""What one rank alone asks for: no padding, any number of micro-batches."""


def pack(
    sequences: Seq[Sequence],
    *,
    pad_id: int,
    max_tokens: int,
    rules: PackingRules = FREE,
    cost: Callable[[int], float] = float,
    dp_rank: int = 0,
    dp_size: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> list[MicroBatch]:
    """This rank's micro-batches of an update's `sequences`, which every rank passes in the same order.

    `plan_micro_batches` says what `max_tokens` and `cost` mean, `build_micro_batch` what a context-parallel rank holds.
    With rules.same_tokens the k-th micro-batch is padded to the largest of the data-parallel ranks' k-th ones.
    """
    lengths = [len(sequence.tokens) for sequence in sequences]
    plan = plan_micro_batches(lengths, dp_size, max_tokens, cost=cost, rules=rules)
    micro_batches = []
    for index_by_rank in zip(*plan, strict=True):
        sizes = [_packed_size([lengths[i] for i in index], rules) for index in index_by_rank]
        micro_batches.append(
            build_micro_batch(
                sequences,
                index_by_rank[dp_rank],
                pad_id=pad_id,
                rules=rules,
                num_tokens=max(sizes) if rules.same_tokens else None,
                cp_rank=cp_rank,
                cp_size=cp_size,
            )
        )
    return micro_batches


def plan_micro_batches(
    lengths: Seq[int],
    dp_size: int,
    max_tokens: int,
    *,
    cost: Callable[[int], float] = float,
    rules: PackingRules = FREE,
) -> list[list[list[int]]]:
    """plan[rank][micro-batch] -> indices into `lengths`; every sequence once.

    1. Costliest first, each sequence goes to the rank with the least total `cost` so far: the totals of two ranks then
       differ by no more than one sequence.
    2. Longest first, each sequence of a rank goes to the micro-batch with the fewest tokens so far. All ranks have the
       same number of these, the smallest multiple of rules.count_multiple above 0 with which none exceeds `max_tokens`.
    3. A rank's micro-batches are ordered by tokens, largest first, so that the k-th ones of all ranks are of similar
       size: experts make ranks wait for one another.

    A few more even micro-batches are worth more than the fewest, some full and some nearly empty. One is empty only
    where a rank has fewer sequences than micro-batches.

    Lengths count with their padding to rules.sequence_multiple, in `max_tokens` as in `cost(length)`, the work of a
    sequence, by default its tokens. What pads a micro-batch as a whole comes on top: with it one may hold `max_tokens`
    rounded up to its multiple. The same lengths in another order give the same micro-batches, up to which of several
    equally long sequences is where.
    Errors: ConfigError when one sequence alone exceeds `max_tokens`.
    """
    padded = _padded(lengths, rules)
    if max(padded, default=0) > max_tokens:
        longest = max(padded)
        index = padded.index(longest)
        raise ConfigError(
            f"sequence {index} has {lengths[index]} tokens, padded to {longest}, more than a micro-batch may hold "
            f"({max_tokens}); raise train.tokens_per_micro_batch to at least {longest}"
        )
    longest_first = sorted(range(len(padded)), key=padded.__getitem__, reverse=True)
    shares = _spread(longest_first, [cost(length) for length in padded], dp_size)
    fewest = max(1, *(math.ceil(sum(padded[i] for i in share) / max_tokens) for share in shares))
    counts = itertools.count(_round_up(fewest, rules.count_multiple), rules.count_multiple)
    plans = ([_spread(share, padded, count) for share in shares] for count in counts)
    return next(
        plan
        for plan in plans
        if all(sum(padded[i] for i in index) <= max_tokens for micro_batches in plan for index in micro_batches)
    )


def build_micro_batch(
    sequences: Seq[Sequence],
    index: Seq[int],
    *,
    pad_id: int,
    rules: PackingRules = FREE,
    num_tokens: int | None = None,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> MicroBatch:
    """Packs sequences[i], i in `index`, one behind the other, as int64 tensors of T tokens (`cu_seqlens` int32).

    Row t of a sequence of length L and prompt length P predicts its token t + 1 where P - 1 <= t < L - 1; every other
    row is IGNORED. Positions count from 0 in each sequence and go on in the padding behind its tokens. Padding behind
    all sequences brings T to a multiple of rules.token_multiple, or to `num_tokens`; without sequences all of T is
    padding, since every rank has to take part in the collectives of a forward pass. It is cut into segments no longer
    than the longest of `sequences`, so that it neither reaches a position nor costs attention that they do not.

    With context parallel everything in T and R is the part that `zigzag` gives to `cp_rank`; the rest is of whole
    sequences. Old and reference log-probs are there when the sequences have them.
    Errors: DataError for a sequence without prompt tokens.
    """
    packed = [sequences[i] for i in index]
    for i, sequence in zip(index, packed, strict=True):
        if sequence.prompt_length < 1:
            raise DataError(f"sequence {i} has no prompt token to predict its first response token from; add a prompt")
    padded = _padded([len(sequence.tokens) for sequence in sequences], rules)
    segments = [padded[i] for i in index]
    size = num_tokens or _packed_size(segments, rules)
    padding = size - sum(segments)
    assert padding >= 0 and size % _packed_size([], rules) == 0, f"{segments} cannot be padded to {size} tokens"
    pieces = _cut(padding, max(padded, default=rules.sequence_multiple))
    # A sequence that is all prompt predicts nothing.
    rows, segments = packed + [Sequence([pad_id] * piece, piece) for piece in pieces], segments + pieces

    targets_T = torch.tensor(_filled([_targets(row) for row in rows], segments, IGNORED))
    held_T = zigzag(segments, cp_rank, cp_size)
    # A response token's place in R, at the row that predicts it; then those of the rows held here.
    scored_T = targets_T != IGNORED
    held_R = (scored_T.cumsum(0) - 1)[held_T][scored_T[held_T]]
    response_lengths = [sequence.response_length for sequence in packed]
    return MicroBatch(
        tokens_T=torch.tensor(_filled([row.tokens for row in rows], segments, pad_id))[held_T],
        positions_T=torch.cat([torch.arange(length) for length in segments])[held_T],
        targets_T=targets_T[held_T],
        cu_seqlens=torch.tensor([0, *segments]).cumsum(0).to(torch.int32),
        max_seqlen=max(segments),
        response_lengths=response_lengths,
        rows_R=scored_T[held_T].nonzero().flatten(),
        sequence_R=torch.repeat_interleave(torch.tensor(response_lengths, dtype=torch.int64))[held_R],
        index=list(index),
        advantages_S=torch.tensor([sequence.advantage for sequence in packed], dtype=torch.float32),
        old_log_probs_R=_joined([sequence.old_log_probs for sequence in packed], response_lengths, held_R),
        ref_log_probs_R=_joined([sequence.ref_log_probs for sequence in packed], response_lengths, held_R),
    )


def zigzag(lengths: Seq[int], rank: int, size: int) -> Tensor:
    """Which of the packed tokens of sequences of `lengths` context-parallel rank `rank` of `size` holds, int64.

    Every sequence is cut into 2 size equal chunks, of which rank c holds chunks c and 2 size - 1 - c, sequence by
    sequence: a late chunk, which attends to much, goes with an early one, so that causal attention is the same work on
    every rank. It is the split that Transformer Engine expects of packed ("thd") sequences. Lengths are multiples of
    2 size; one rank alone holds everything, whatever the lengths.
    """
    tokens_T = torch.arange(sum(lengths))
    if size == 1:
        return tokens_T
    assert all(length % (2 * size) == 0 for length in lengths), f"no {2 * size} equal chunks in one of {lengths}"
    chunks = (sequence.view(2 * size, -1) for sequence in tokens_T.split(list(lengths)))
    return torch.cat([torch.cat([chunk[rank], chunk[-1 - rank]]) for chunk in chunks])


def _spread(items: Seq[int], weight: Seq[float], parts: int) -> list[list[int]]:
    """Heaviest first (in the order of `items` where equal), each of the items goes to the part that is lightest so far;
    the heaviest part first."""
    members: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for item in sorted(items, key=weight.__getitem__, reverse=True):
        lightest = loads.index(min(loads))
        members[lightest].append(item)
        loads[lightest] += weight[item]
    return [members[part] for part in sorted(range(parts), key=loads.__getitem__, reverse=True)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded(lengths: Iterable[int], rules: PackingRules) -> list[int]:
    return [_round_up(length, rules.sequence_multiple) for length in lengths]


def _packed_size(lengths: Iterable[int], rules: PackingRules) -> int:
    """Tokens of a micro-batch of such sequences, padded by both rules; never 0."""
    multiple = math.lcm(rules.sequence_multiple, rules.token_multiple)
    return max(_round_up(sum(_padded(lengths, rules)), multiple), multiple)


def _cut(length: int, longest: int) -> list[int]:
    """`length` in pieces of `longest`, and what is left."""
    whole, rest = divmod(length, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _filled(rows: Iterable[list[int]], lengths: Iterable[int], fill: int) -> list[int]:
    """The rows one behind the other, each filled up to its length."""
    return [value for row, n in zip(rows, lengths, strict=True) for value in row + [fill] * (n - len(row))]


def _targets(sequence: Sequence) -> list[int]:
    """Each row's next token where that is a response token; the last row has none."""
    prompt_rows = [IGNORED] * (sequence.prompt_length - 1)
    targets = [*prompt_rows, *sequence.tokens[sequence.prompt_length :], IGNORED]
    assert len(targets) == len(sequence.tokens), "the prompt is longer than the whole sequence"
    return targets


def _joined(log_probs: list[Tensor | None], response_lengths: list[int], held_R: Tensor) -> Tensor | None:
    """Those held here of the sequences' log-probs; None when they have none. Without sequences: no elements."""
    present = [values for values in log_probs if values is not None]
    assert len(present) in (0, len(log_probs)), "some sequences of a micro-batch have log-probs, others have none"
    if len(present) < len(log_probs):
        return None
    assert [len(values) for values in present] == response_lengths
    return torch.cat([torch.empty(0), *present])[held_R]
