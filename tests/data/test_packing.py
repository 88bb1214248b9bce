from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.batches import IGNORED, MicroBatch, PackingRules, Sequence
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data import packing
from gspo_megatron.data.packing import build_micro_batch, pack, plan_micro_batches, zigzag

PAD = 99
unhurried = settings(deadline=None)  # a busy machine is no failure
LENGTHS = st.lists(st.integers(1, 60), max_size=60)
RULES = st.builds(PackingRules, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.booleans())


def up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


# --- the plan ---


@unhurried
@given(LENGTHS, st.integers(1, 6), st.integers(60, 150), RULES)
def test_every_sequence_once_in_bounds_with_equal_counts(
    lengths: list[int], dp_size: int, max_tokens: int, rules: PackingRules
) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_tokens, rules=rules)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) % rules.count_multiple == 0
    assert sorted(i for rank in plan for index in rank for i in index) == list(range(len(lengths)))
    tokens = [[sum(up(lengths[i], rules.sequence_multiple) for i in index) for index in rank] for rank in plan]
    assert all(micro_batch <= max_tokens for rank in tokens for micro_batch in rank)
    assert all(rank == sorted(rank, reverse=True) for rank in tokens)
    # No rank, and no two ranks' totals, differ by more than a sequence.
    longest = up(max(lengths, default=0), rules.sequence_multiple)
    assert all(rank[0] - rank[-1] <= longest for rank in tokens if rank)
    assert max(map(sum, tokens)) - min(map(sum, tokens)) <= longest
    # A micro-batch is empty only where the rank's sequences cannot fill all.
    assert all(all(rank) or max(map(len, rank)) <= 1 for rank in plan)


@unhurried
@given(LENGTHS.filter(bool), st.integers(1, 6), st.sampled_from([lambda n: n * n + 7, lambda n: 1]))
def test_ranks_differ_in_cost_by_no_more_than_one_sequence(
    lengths: list[int], dp_size: int, cost: Callable[[int], int]
) -> None:
    plan = plan_micro_batches(lengths, dp_size, 60, cost=cost)
    totals = [sum(cost(lengths[i]) for index in rank for i in index) for rank in plan]
    assert max(totals) - min(totals) <= max(map(cost, lengths))


@unhurried
@given(LENGTHS.filter(bool), st.integers(1, 4), RULES)
def test_one_group_of_micro_batches_less_would_be_half_full(
    lengths: list[int], dp_size: int, rules: PackingRules
) -> None:
    """Where the emptiest of k has no room for the next longest sequence, all of them are more than half full."""
    plan = plan_micro_batches(lengths, dp_size, 60, rules=rules)
    fullest = max(sum(up(lengths[i], rules.sequence_multiple) for index in rank for i in index) for rank in plan)
    assert (len(plan[0]) - rules.count_multiple) * 60 < 2 * fullest


@unhurried
@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 4), RULES)
def test_the_fewest_micro_batches_that_equal_sequences_need(
    length: int, number: int, dp_size: int, rules: PackingRules
) -> None:
    plan = plan_micro_batches([length] * number, dp_size, 100, rules=rules)
    together = 100 // up(length, rules.sequence_multiple)
    assert len(plan[0]) == up(math.ceil(math.ceil(number / dp_size) / together), rules.count_multiple)


@unhurried
@given(LENGTHS, st.integers(1, 4), st.randoms(use_true_random=False), RULES)
def test_the_plan_knows_lengths_not_their_order(
    lengths: list[int], dp_size: int, random: Random, rules: PackingRules
) -> None:
    lengths = [up(length, rules.sequence_multiple) for length in lengths]
    shuffled = random.sample(lengths, len(lengths))

    def shape(values: list[int], cost: Callable[[int], float]) -> list[list[list[int]]]:
        plan = plan_micro_batches(values, dp_size, 90, cost=cost, rules=rules)
        return [[[values[i] for i in index] for index in rank] for rank in plan]

    for cost in (float, lambda length: 1.0):
        assert shape(shuffled, cost) == shape(lengths, cost)


def test_worked_examples() -> None:
    # Ranks take 8 | 7, then 5 to the lighter second, 4 to the first, 3 to the first again (12 = 12: lower rank).
    assert plan_micro_batches([3, 8, 7, 4, 5], 2, 8) == [[[1], [3, 0]], [[2], [4]]]
    assert plan_micro_batches([5, 5, 5], 2, 6) == [[[0], [2]], [[1], []]]
    assert plan_micro_batches([], 2, 6) == [[[]], [[]]]  # an update of nothing still needs a forward on every rank
    # Two would do on either rank; four have to be filled, the fullest stands first.
    lengths = [5, 5, 5, 5, 4, 4, 4, 4, 4]
    assert plan_micro_batches(lengths, 2, 12, rules=PackingRules(count_multiple=4)) == [
        [[4, 8], [0], [2], [6]],
        [[1], [3], [5], [7]],
    ]
    # Five tokens that count as six no longer go in pairs.
    assert plan_micro_batches([5] * 4, 1, 11) == [[[0, 2], [1, 3]]]
    assert plan_micro_batches([5] * 4, 1, 11, rules=PackingRules(sequence_multiple=2)) == [[[0], [1], [2], [3]]]
    # One token padded to eight is as much work as eight.
    assert plan_micro_batches([8, 1, 1, 1], 2, 16, rules=PackingRules(sequence_multiple=8)) == [[[0, 2]], [[1, 3]]]


def test_a_sequence_longer_than_a_micro_batch_is_an_error_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"sequence 1 has 9 tokens, .*\(8\); raise .*tokens_per_micro_batch.* 9$"):
        plan_micro_batches([8, 9, 1], 2, 8)
    with pytest.raises(ConfigError, match=r"sequence 1 has 9 tokens, padded to 12, .*\(11\); raise .* at least 12$"):
        plan_micro_batches([8, 9, 1], 2, 11, rules=PackingRules(sequence_multiple=4))


# --- one micro-batch ---


def sequence(tokens: list[int], prompt_length: int, advantage: float, old: list[float]) -> Sequence:
    return Sequence.after_prompt(tokens, prompt_length, advantage, {"old_log_probs": torch.tensor(old)})


SEQUENCES = [
    sequence([10, 11, 12, 13, 14], 2, 0.5, [-1.0, -2.0, -3.0]),
    sequence([20, 21], 2, 7.0, []),
    sequence([30, 31, 32], 1, -1.5, [-4.0, -5.0]),
]
no = IGNORED


def test_a_packed_micro_batch_written_out() -> None:
    batch = build_micro_batch(SEQUENCES, [2, 1, 0], pad_id=PAD, rules=PackingRules(token_multiple=7))
    assert batch.tokens_T.tolist() == [30, 31, 32, 20, 21, 10, 11, 12, 13, 14, *[PAD] * 4]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.targets_T.tolist() == [31, 32, no, no, no, no, 12, 13, 14, no, *[no] * 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10, 14]
    assert batch.max_seqlen == 5
    assert batch.trained_lengths == [2, 0, 3]
    assert batch.sequence_R.tolist() == [0, 0, 2, 2, 2]
    assert batch.index == [2, 1, 0]
    assert batch.advantages_S.tolist() == [-1.5, 7.0, 0.5]
    assert batch.columns["old_log_probs"].tolist() == [-4.0, -5.0, -1.0, -2.0, -3.0]
    assert batch.columns.keys() == {"old_log_probs"}
    types = [batch.tokens_T.dtype, batch.positions_T.dtype, batch.targets_T.dtype, batch.sequence_R.dtype]
    assert types == [torch.int64] * 4 and batch.cu_seqlens.dtype == torch.int32
    assert batch.advantages_S.dtype == batch.columns["old_log_probs"].dtype == torch.float32


def test_context_parallel_parts_written_out() -> None:
    """Sequences padded to 4 and 8, the whole to 20: chunks of one, two and two tokens, outer ones here, inner there."""
    outer, inner = (
        build_micro_batch(
            SEQUENCES, [2, 0], pad_id=PAD, rules=PackingRules(4, 20), cp_rank=cp_rank, cp_size=2, num_tokens=20
        )
        for cp_rank in (0, 1)
    )
    assert outer.tokens_T.tolist() == [30, PAD, 10, 11, PAD, PAD, PAD, PAD, PAD, PAD]
    assert inner.tokens_T.tolist() == [31, 32, 12, 13, 14, PAD, PAD, PAD, PAD, PAD]
    assert outer.positions_T.tolist() == [0, 3, 0, 1, 6, 7, 0, 1, 6, 7]
    assert inner.positions_T.tolist() == [1, 2, 2, 3, 4, 5, 2, 3, 4, 5]
    assert outer.targets_T.tolist() == [31, no, no, 12, no, no, no, no, no, no]
    assert inner.targets_T.tolist() == [32, no, 13, 14, no, no, no, no, no, no]
    for part, sequence_R, old_log_probs_R in ((outer, [0, 1], [-4.0, -1.0]), (inner, [0, 1, 1], [-5.0, -2.0, -3.0])):
        assert part.sequence_R.tolist() == sequence_R and part.columns["old_log_probs"].tolist() == old_log_probs_R
        assert part.cu_seqlens.tolist() == [0, 4, 12, 20] and part.max_seqlen == 8
        assert part.trained_lengths == [2, 3] and part.advantages_S.tolist() == [-1.5, 0.5]


def test_a_full_micro_batch_gets_no_padding_segment() -> None:
    batch = build_micro_batch(SEQUENCES, [0, 2], pad_id=PAD, rules=PackingRules(token_multiple=4))
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.max_seqlen == 5
    assert PAD not in batch.tokens_T


@pytest.mark.parametrize(
    ("rules", "num_tokens", "borders"),
    [
        (PackingRules(), None, [0, 1]),
        (PackingRules(4, 8), None, [0, 8]),
        (PackingRules(token_multiple=4), None, [0, 4]),
        # A position is never higher than in the longest sequence, and attention's work never larger.
        (PackingRules(4, 8), 40, [0, 8, 16, 24, 32, 40]),
        (PackingRules(token_multiple=4), 12, [0, 5, 10, 12]),
    ],
)
def test_an_empty_micro_batch_is_all_padding(rules: PackingRules, num_tokens: int | None, borders: list[int]) -> None:
    batch = build_micro_batch(SEQUENCES, [], pad_id=PAD, rules=rules, num_tokens=num_tokens)
    assert batch.tokens_T.tolist() == [PAD] * borders[-1]
    assert batch.targets_T.tolist() == [IGNORED] * borders[-1]
    assert batch.cu_seqlens.tolist() == borders
    assert (batch.max_seqlen, batch.trained_lengths, batch.index) == (borders[1], [], [])
    assert batch.advantages_S.shape == batch.columns["old_log_probs"].shape == batch.sequence_R.shape == (0,)


def test_log_probs_of_a_float64_run_stay_float64() -> None:
    double = Sequence.after_prompt([1, 2], 1, columns={"old_log_probs": torch.tensor([-0.1], dtype=torch.float64)})
    batch = build_micro_batch(
        [double, Sequence.after_prompt([3], 1, columns={"old_log_probs": torch.empty(0)})], [1, 0], pad_id=PAD
    )
    assert batch.columns["old_log_probs"].item() == -0.1


def test_a_sequence_without_a_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="sequence 1 has no prompt token"):
        build_micro_batch([Sequence.after_prompt([1, 2], 1), Sequence.after_prompt([1, 2], 0)], [0, 1], pad_id=PAD)


@pytest.mark.parametrize("num_tokens", [4, 9])
def test_a_size_that_cannot_be_reached_is_a_mistake(num_tokens: int) -> None:
    with pytest.raises(AssertionError, match=rf"\[6\] cannot be padded to {num_tokens} tokens"):
        build_micro_batch(SEQUENCES, [0], pad_id=PAD, rules=PackingRules(2, 4), num_tokens=num_tokens)


# --- context parallel ---


def test_zigzag_written_out() -> None:
    assert zigzag([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag([6, 12], 2, 3).tolist() == [2, 3, 10, 11, 12, 13]
    assert zigzag([3, 2], 0, 1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError, match=r"\[4, 6\] are not all multiples of 4"):
        zigzag([4, 6], 0, 2)


@unhurried
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(2, 5))
def test_zigzag_is_a_fair_cut_of_every_sequence(chunks: list[int], size: int) -> None:
    """Every token once, in order, and of every sequence as many (query, earlier key) pairs on each rank."""
    lengths = [2 * size * chunk for chunk in chunks]
    sequence_T = torch.repeat_interleave(torch.tensor(lengths))
    position_T = torch.cat([torch.arange(length) for length in lengths])
    parts = [zigzag(lengths, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(sum(lengths)))
    assert all(torch.equal(part, part.sort().values) for part in parts)
    for number, length in enumerate(lengths):
        pairs = [int((position_T[part] + 1)[sequence_T[part] == number].sum()) for part in parts]
        assert pairs == [length * (length + 1) // 2 // size] * size


# --- everything together ---


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Sequence], PackingRules, int, int]:
    """Sequences in which every token has a number of its own, told by its log-probs too; rules, dp and cp size."""
    start, sequences = 100, []
    for prompt_length, response_length in draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12)):
        tokens = list(range(start, start + prompt_length + response_length))
        start += len(tokens)
        old_log_probs = -torch.tensor(tokens[prompt_length:], dtype=torch.float64)
        columns = {"old_log_probs": old_log_probs, "ref_log_probs": old_log_probs - 0.5}
        sequences.append(Sequence.after_prompt(tokens, prompt_length, len(tokens) / 8, columns))
    cp_size = draw(st.integers(1, 3))
    rules = draw(RULES)
    if cp_size > 1:
        rules = replace(rules, sequence_multiple=2 * cp_size * draw(st.integers(1, 2)))
    return sequences, rules, draw(st.integers(1, 4)), cp_size


MAX_TOKENS = 30


def packed(packing: tuple[list[Sequence], PackingRules, int, int], dp_rank: int, cp_rank: int) -> list[MicroBatch]:
    sequences, rules, dp_size, cp_size = packing
    return pack(
        sequences,
        pad_id=PAD,
        max_tokens=MAX_TOKENS,
        rules=rules,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cp_rank=cp_rank,
        cp_size=cp_size,
    )


@unhurried
@given(packings())
def test_packed_whole(packing: tuple[list[Sequence], PackingRules, int, int]) -> None:
    """Every sequence stands once on one rank, each token behind the row that predicts it, padding only behind."""
    sequences, rules, dp_size, _ = packing
    ranks = [packed((sequences, rules, dp_size, 1), dp_rank, 0) for dp_rank in range(dp_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(i for batch in batches for i in batch.index) == list(range(len(sequences)))
    assert len({len(rank) for rank in ranks}) == 1
    multiple = math.lcm(rules.sequence_multiple, rules.token_multiple)
    longest = up(max((len(s) for s in sequences), default=1), rules.sequence_multiple)
    for batch in batches:
        size = len(batch.tokens_T)
        assert size % multiple == 0 and 0 < size <= up(MAX_TOKENS, multiple)
        lengths = batch.cu_seqlens.diff().tolist()
        assert sum(lengths) == size and max(lengths) == batch.max_seqlen
        assert batch.max_seqlen <= longest, "padding reaches positions that no sequence does"
        assert min(lengths) > 0 and all(length % rules.sequence_multiple == 0 for length in lengths)
        tokens, positions, targets = (
            x_T.split(lengths) for x_T in (batch.tokens_T, batch.positions_T, batch.targets_T)
        )
        assert all(segment.tolist() == list(range(len(segment))) for segment in positions)
        here = [sequences[i] for i in batch.index]
        for number, s in enumerate(here):
            behind = [PAD] * (-len(s) % rules.sequence_multiple)
            assert tokens[number].tolist() == s.tokens.tolist() + behind
            following = [t if trained else no for t, trained in zip(s.tokens.tolist(), s.trained.tolist(), strict=True)]
            assert targets[number].tolist() == following[1:] + [no] * (1 + len(behind))
        assert {t for segment in tokens[len(here) :] for t in segment.tolist()} <= {PAD}
        assert {t for segment in targets[len(here) :] for t in segment.tolist()} <= {no}
        assert rules.same_tokens or size == max(up(sum(lengths[: len(here)]), multiple), multiple)
        assert batch.trained_lengths == [s.num_trained for s in here]
        assert batch.advantages_S.tolist() == [s.advantage for s in here]


@unhurried
@given(packings())
def test_the_same_tokens_on_every_data_parallel_rank(packing: tuple[list[Sequence], PackingRules, int, int]) -> None:
    """Of the k-th micro-batches each is as large as the largest would be by itself; nothing but padding is added."""
    sequences, rules, dp_size, _ = packing
    same, free = (
        [packed((sequences, replace(rules, same_tokens=on), dp_size, 1), rank, 0) for rank in range(dp_size)]
        for on in (True, False)
    )
    for kth_same, kth_free in zip(zip(*same, strict=True), zip(*free, strict=True), strict=True):
        largest = max(len(batch.tokens_T) for batch in kth_free)
        for padded, batch in zip(kth_same, kth_free, strict=True):
            assert len(padded.tokens_T) == largest
            length = len(batch.tokens_T)
            assert padded.tokens_T.tolist() == batch.tokens_T.tolist() + [PAD] * (largest - length)
            assert padded.index == batch.index and torch.equal(padded.sequence_R, batch.sequence_R)


def rows(batch: MicroBatch) -> list[tuple[float | None, ...]]:
    """(token, position, target, sequence, old log-prob, reference log-prob) of every row."""
    columns = (batch.sequence_R, batch.columns["old_log_probs"], batch.columns["ref_log_probs"])
    of_response = zip(*(column.tolist() for column in columns), strict=True)
    fixed = zip(batch.tokens_T.tolist(), batch.positions_T.tolist(), batch.targets_T.tolist(), strict=True)
    result = [(*row, *(next(of_response) if row[2] != no else (None, None, None))) for row in fixed]
    assert next(of_response, None) is None, "more entries in R than rows that predict"
    return result


@unhurried
@given(packings())
def test_context_parallel_parts_make_up_the_whole(packing: tuple[list[Sequence], PackingRules, int, int]) -> None:
    sequences, rules, dp_size, cp_size = packing
    for dp_rank in range(dp_size):
        wholes = packed((sequences, rules, dp_size, 1), dp_rank, 0)
        parts_of = zip(*(packed(packing, dp_rank, cp_rank) for cp_rank in range(cp_size)), strict=True)
        for whole, parts in zip(wholes, parts_of, strict=True):
            assert sum((Counter(rows(part)) for part in parts), Counter()) == Counter(rows(whole))
            for part in parts:
                assert len(part.tokens_T) == len(whole.tokens_T) // cp_size
                assert torch.equal(part.cu_seqlens, whole.cu_seqlens) and part.max_seqlen == whole.max_seqlen
                assert torch.equal(part.advantages_S, whole.advantages_S) and part.index == whole.index
                assert part.trained_lengths == whole.trained_lengths
                # What a token's log-prob is told by its number, and that of its sequence by its place in `index`.
                for _, _, target, number, old, ref in rows(part):
                    if target != no:
                        assert (old, ref) == (-target, -target - 0.5)
                        assert target in sequences[part.index[number]].tokens.tolist()
            pairs = {int((part.positions_T + 1).sum()) for part in parts}
            assert len(pairs) == 1, f"work differs: {pairs}"


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 64), max_size=40), st.integers(1, 3), st.sampled_from([1, 2]))
def test_the_search_for_a_count_may_start_at_its_bound(lengths: list[int], dp_size: int, multiple: int) -> None:
    """The plan is that of a search from 1."""
    rules = PackingRules(count_multiple=multiple)
    plan = plan_micro_batches(lengths, dp_size, 64, rules=rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_fewest", lambda lengths, max_tokens: 1)
        assert plan_micro_batches(lengths, dp_size, 64, rules=rules) == plan


@pytest.mark.parametrize("length", [33, 22, 17, 64, 3])
def test_as_many_tries_for_many_sequences_as_for_few(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just above a half, a third or a quarter of a micro-batch: a search from the sum of the tokens was far off."""
    spread = Mock(wraps=packing._spread)
    monkeypatch.setattr(packing, "_spread", spread)

    def tries(num_sequences: int) -> int:
        spread.reset_mock()
        plan_micro_batches([length] * num_sequences, 1, 64)
        return spread.call_count

    assert tries(16 * 512) == tries(512) <= 3
