"""From sequences to micro-batches: the rank and the micro-batch of each sequence, and the packed tensors.

    pack = plan_micro_batches, the same on every rank, then build_micro_batch for those of this rank

S sequences of a micro-batch, T packed tokens (padding included), R trained tokens.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from gspo_megatron.base.batches import COLUMNS, IGNORED, MicroBatch, PackingRules, Sequence
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.base.ragged import joined

Plan = list[list[list[int]]]
"""plan[rank][micro-batch] -> indices of sequences."""
FREE = PackingRules()
"""The rules of a single rank: no padding, any number of micro-batches."""


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
    planned: Callable[[Plan], None] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of an update's `sequences`, which every rank passes in the same order.

    `plan_micro_batches` says what `max_tokens` and `cost` mean, `build_micro_batch` what a context-parallel rank holds.
    With rules.same_tokens the k-th micro-batch is padded to the largest k-th one of all data-parallel ranks. `planned`
    is called before sequences are read: it may add columns to those of this rank.
    """
    lengths = [len(sequence) for sequence in sequences]
    plan = plan_micro_batches(lengths, dp_size, max_tokens, cost=cost, rules=rules)
    if planned:
        planned(plan)
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
) -> Plan:
    """plan[rank][micro-batch] -> indices into `lengths`; every sequence once.

    1. Costliest first, each sequence goes to the rank with the least total `cost` so far: the totals of two ranks then
       differ by no more than one sequence.
    2. Longest first, each sequence of a rank goes to the micro-batch with the fewest tokens so far. All ranks have the
       same number of these, the smallest multiple of rules.count_multiple above 0 with which none exceeds `max_tokens`;
       of more than 100, up to 1 % more.
    3. A rank's micro-batches are ordered by tokens, largest first, so that the k-th ones of all ranks have similar
       sizes: expert layers make ranks wait for each other.

    A few more micro-batches of even size are better than the fewest, some full and some nearly empty. One is empty only
    where a rank has fewer sequences than micro-batches.

    Lengths include the padding to rules.sequence_multiple, both in `max_tokens` and in `cost(length)`, the work of a
    sequence, by default its tokens. Padding of a micro-batch as a whole is extra: with it, a micro-batch may hold
    `max_tokens` rounded up to its multiple. The order of the lengths does not matter, except that sequences of equal
    length may change places.

    Raises:
        ConfigError: one sequence alone exceeds `max_tokens`.
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
    fewest = max(1, *(_fewest([padded[i] for i in share], max_tokens) for share in shares))

    def plan_of(count: int) -> tuple[Plan, int]:
        """With `count` micro-batches a rank, and the tokens of the fullest."""
        plan = [_spread(share, padded, count) for share in shares]
        return plan, max(sum(padded[i] for i in index) for micro_batches in plan for index in micro_batches)

    return _with_fewest(plan_of, max_tokens, _round_up(fewest, rules.count_multiple), rules.count_multiple)


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
    """Packs sequences[i], i in `index`, end to end, as int64 tensors of T tokens (`cu_seqlens` int32).

    Row t of a sequence predicts its token t + 1 where that one is trained on; every other row is IGNORED. Positions
    count from 0 in each sequence and continue in the padding after its tokens. Padding after all sequences brings T to
    a multiple of rules.token_multiple, or to `num_tokens`; without sequences all of T is padding, since every rank must
    take part in the collectives of a forward pass. This padding is split into segments no longer than the longest of
    `sequences`, so that neither its positions nor its attention cost exceed theirs.

    With context parallelism everything in T and R is the part that `zigzag` gives to `cp_rank`; the rest describes
    whole sequences. A column is present if the sequences have it.

    Raises:
        DataError: the first token of a sequence is trained on.
    """
    packed = [sequences[i] for i in index]
    for i, sequence in zip(index, packed, strict=True):
        if not len(sequence) or sequence.trained[0]:
            raise DataError(f"sequence {i} has no prompt token to predict its first trained token from; add a prompt")
    lengths, padded = [len(sequence) for sequence in packed], _padded([len(s) for s in sequences], rules)
    segments = [padded[i] for i in index]
    size = num_tokens or _packed_size(segments, rules)
    padding = size - sum(segments)
    assert padding >= 0 and size % _packed_size([], rules) == 0, f"{segments} cannot be padded to {size} tokens"
    segments = segments + _cut(padding, max(padded, default=rules.sequence_multiple))
    cu_seqlens = torch.tensor([0, *segments]).cumsum(0)

    # Where the sequences' tokens go, [sum of lengths].
    first = cu_seqlens[: len(packed)] - torch.tensor([0, *lengths]).cumsum(0)[: len(packed)]
    places = torch.repeat_interleave(first, torch.tensor(lengths, dtype=torch.int64)) + torch.arange(sum(lengths))

    def laid_out(values: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> Tensor:
        """[size, *shape]: a value for each token of the sequences, `fill` in the padding."""
        empty = torch.full((size, *shape), fill, dtype=dtype)
        return empty.index_copy(0, places, torch.cat([s.to(dtype) for s in values])) if values else empty

    tokens_T = laid_out([s.tokens for s in packed], (), torch.int64, pad_id)
    trained_T = laid_out([s.trained for s in packed], (), torch.bool, 0)
    # No sequence begins with a trained token, so none is predicted from the sequence before it.
    targets_T = torch.where(trained_T, tokens_T, IGNORED).roll(-1)
    held_T = zigzag(segments, cp_rank, cp_size)
    # A trained token's place in R, at the row that predicts it; then those of the rows held here.
    scored_T = targets_T != IGNORED
    held_R = (scored_T.cumsum(0) - 1)[held_T][scored_T[held_T]]
    trained_lengths = [sequence.num_trained for sequence in packed]

    columns = {}
    for name, column in COLUMNS.items():
        values = [sequence.columns[name] for sequence in packed if name in sequence.columns]
        if column.of_model and not values:
            continue
        if len(values) < len(packed):
            assert not values, f"some sequences of a micro-batch have {name}, others do not"
            continue
        counts = lengths if column.every_token else trained_lengths
        assert [len(of_sequence) for of_sequence in values] == counts, f"{name} does not have one value per token"
        if column.ragged:
            columns[name] = joined(values)[held_R]
            continue
        dtype = column.dtype or (values[0].dtype if values else torch.float32)
        shape = tuple(values[0].shape[1:]) if column.of_model else column.shape
        if column.every_token:
            columns[name] = laid_out(values, shape, dtype, column.fill)[held_T]
        else:
            columns[name] = torch.cat([torch.empty(0, *shape, dtype=dtype), *values])[held_R]

    return MicroBatch(
        tokens_T=tokens_T[held_T],
        positions_T=torch.cat([torch.arange(length) for length in segments])[held_T],
        targets_T=targets_T[held_T],
        inside_T=torch.zeros(size, dtype=torch.bool).index_fill(0, places, True)[held_T],
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(segments),
        trained_lengths=trained_lengths,
        rows_R=scored_T[held_T].nonzero().flatten(),
        sequence_R=torch.repeat_interleave(torch.tensor(trained_lengths, dtype=torch.int64))[held_R],
        index=list(index),
        advantages_S=torch.tensor([sequence.advantage for sequence in packed], dtype=torch.float32),
        columns=columns,
    )


def zigzag(lengths: Seq[int], rank: int, size: int) -> Tensor:
    """Which of the packed tokens of sequences of `lengths` context-parallel rank `rank` of `size` holds, int64.

    Every sequence is split into 2 size equal chunks, of which rank c holds chunks c and 2 size - 1 - c, sequence by
    sequence: a late chunk, which attends to many tokens, is paired with an early one, so that causal attention is the
    same work on every rank. Transformer Engine expects this split of packed ("thd") sequences. Lengths are multiples of
    2 size; a single rank holds everything, whatever the lengths.
    """
    tokens_T = torch.arange(sum(lengths))
    if size == 1:
        return tokens_T
    assert all(length % (2 * size) == 0 for length in lengths), f"{lengths} are not all multiples of {2 * size}"
    chunks = (sequence.view(2 * size, -1) for sequence in tokens_T.split(list(lengths)))
    return torch.cat([torch.cat([chunk[rank], chunk[-1 - rank]]) for chunk in chunks])


def _fewest(lengths: Seq[int], max_tokens: int) -> int:
    """A lower bound on the micro-batches that hold `lengths`: by their sum, and for every k because at most k
    sequences longer than max_tokens / (k + 1) fit together."""
    bound, longest_first = math.ceil(sum(lengths) / max_tokens), sorted(lengths, reverse=True)
    for count, length in enumerate(longest_first, start=1):
        together = max_tokens // length
        bound = max(bound, math.ceil(count / together))
    return bound


def _with_fewest(plan_of: Callable[[int], tuple[Plan, int]], max_tokens: int, first: int, multiple: int) -> Plan:
    """The plan of the smallest count among first, first + multiple, ... with at most `max_tokens` in the fullest, or of
    one that is at most 1 % larger: a search to the end would grow with the number of sequences.

    One micro-batch more never makes the fullest fuller: each sequence still goes to the emptiest of them. So the counts
    that work are all those from one on. It is looked for in turns where the fullest would have `max_tokens` if its
    tokens were inverse to the count, which is nearly so, and in the middle of what is left, which ends any search soon.
    """
    below, above, count = first - multiple, 0, first
    best: Plan = []
    for guessing in itertools.cycle((True, False)):
        plan, fullest = plan_of(count)
        if fullest <= max_tokens:
            above, best = count, plan
        else:
            below = count
        if above and above - below <= max(multiple, above // 100):
            break
        if guessing:
            count = _round_up(math.ceil(count * fullest / max_tokens), multiple)
        else:
            count = below + _round_up((above - below) // 2, multiple) if above else 2 * below
        count = max(below + multiple, min(count, above - multiple) if above else count)
    return best


def _spread(items: Seq[int], weight: Seq[float], parts: int) -> list[list[int]]:
    """Heaviest first (in the order of `items` where equal), each item goes to the part that is lightest so far. Returns
    the parts, heaviest first."""
    heaviest_first = sorted(items, key=weight.__getitem__, reverse=True)
    members = [[item] for item in heaviest_first[:parts]]  # while parts are empty, they are the lightest
    members += [[] for _ in range(parts - len(members))]
    loads = [(sum(weight[item] for item in of_part), part) for part, of_part in enumerate(members)]
    heapq.heapify(loads)  # the first is the lightest, of equals the lowest part
    for item in heaviest_first[parts:]:
        load, lightest = loads[0]
        members[lightest].append(item)
        heapq.heapreplace(loads, (load + weight[item], lightest))
    return [members[part] for _, part in sorted(loads, key=lambda at: (-at[0], at[1]))]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded(lengths: Iterable[int], rules: PackingRules) -> list[int]:
    return [_round_up(length, rules.sequence_multiple) for length in lengths]


def _packed_size(lengths: Iterable[int], rules: PackingRules) -> int:
    """Tokens of a micro-batch of such sequences, padded by both rules; never 0."""
    multiple = math.lcm(rules.sequence_multiple, rules.token_multiple)
    return max(_round_up(sum(_padded(lengths, rules)), multiple), multiple)


def _cut(length: int, longest: int) -> list[int]:
    """`length` as segments of `longest` and a remainder."""
    whole, rest = divmod(length, longest)
    return [longest] * whole + [rest] * (rest > 0)
