from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.data.packing import build_micro_batch, plan_micro_batches
from gspo_megatron.types import IGNORED, ConfigError, DataError, Sequence

PAD = 99
unhurried = settings(deadline=None)  # a busy machine is no failure
LENGTHS = st.lists(st.integers(1, 60), max_size=60)


def loads(plan: list[list[list[int]]], lengths: list[int], cost: Callable[[int], int] = int) -> list[int]:
    return [sum(cost(lengths[i]) for micro_batch in rank for i in micro_batch) for rank in plan]


@unhurried
@given(LENGTHS, st.integers(1, 6), st.integers(60, 150))
def test_every_sequence_once_in_bounds_with_equal_counts(lengths: list[int], dp_size: int, max_tokens: int) -> None:
    plan = plan_micro_batches(lengths, dp_size, max_tokens)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert sorted(i for rank in plan for micro_batch in rank for i in micro_batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in micro_batch) <= max_tokens for rank in plan for micro_batch in rank)


@unhurried
@given(LENGTHS.filter(bool), st.integers(1, 6), st.sampled_from([lambda n: n, lambda n: n * n + 7]))
def test_ranks_differ_by_no_more_than_one_sequence(
    lengths: list[int], dp_size: int, cost: Callable[[int], int]
) -> None:
    totals = loads(plan_micro_batches(lengths, dp_size, 60, cost), lengths, cost)
    assert max(totals) - min(totals) <= max(map(cost, lengths))


@unhurried
@given(LENGTHS.filter(bool), st.integers(1, 4))
def test_no_micro_batch_more_than_first_fit_needs(lengths: list[int], dp_size: int) -> None:
    """First fit leaves at most one micro-batch half empty, so a rank with k > 1 of them holds more than (k - 1) / 2."""
    plan = plan_micro_batches(lengths, dp_size, 60)
    needed = [sum(map(bool, rank)) for rank in plan]
    assert len(plan[0]) == max(needed)
    assert all(total > (k - 1) * 30 for k, total in zip(needed, loads(plan, lengths), strict=True) if k > 1)


@unhurried
@given(LENGTHS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_plan_knows_lengths_not_their_order(lengths: list[int], dp_size: int, random: Random) -> None:
    shuffled = random.sample(lengths, len(lengths))

    def shape(values: list[int]) -> list[list[list[int]]]:
        return [[[values[i] for i in part] for part in rank] for rank in plan_micro_batches(values, dp_size, 90)]

    assert shape(shuffled) == shape(lengths)


def test_a_worked_example() -> None:
    """Ranks take 8 | 7, then 5 to the lighter second, 4 to the first, 3 to the first again (12 = 12: lower rank)."""
    assert plan_micro_batches([3, 8, 7, 4, 5], 2, 8) == [[[1], [3, 0]], [[2], [4]]]
    assert plan_micro_batches([5, 5, 5], 2, 6) == [[[0], [2]], [[1], []]]
    assert plan_micro_batches([], 2, 6) == [[], []]


def test_a_sequence_longer_than_a_micro_batch_is_an_error_with_the_fix() -> None:
    with pytest.raises(
        ConfigError, match=r"sequence 1 has 9 tokens.*\(8\); raise .*tokens_per_micro_batch to at least 9"
    ):
        plan_micro_batches([8, 9, 1], 2, 8)


def sequence(tokens: list[int], prompt_length: int, advantage: float, old: list[float]) -> Sequence:
    return Sequence(tokens, prompt_length, advantage, old_log_probs=torch.tensor(old))


SEQUENCES = [
    sequence([10, 11, 12, 13, 14], 2, 0.5, [-1.0, -2.0, -3.0]),
    sequence([20, 21], 2, 7.0, []),
    sequence([30, 31, 32], 1, -1.5, [-4.0, -5.0]),
]


def test_a_packed_micro_batch_written_out() -> None:
    batch = build_micro_batch(SEQUENCES, [2, 1, 0], pad_id=PAD, multiple_of=8)
    no = IGNORED
    assert batch.tokens_T.tolist() == [30, 31, 32, 20, 21, 10, 11, 12, 13, 14, *[PAD] * 6]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert batch.targets_T.tolist() == [31, 32, no, no, no, no, 12, 13, 14, no, *[no] * 6]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10, 16]
    assert batch.max_seqlen == 6
    assert batch.response_lengths == [2, 0, 3]
    assert batch.index == [2, 1, 0]
    assert batch.advantages_S.tolist() == [-1.5, 7.0, 0.5]
    assert batch.old_log_probs_R is not None
    assert batch.old_log_probs_R.tolist() == [-4.0, -5.0, -1.0, -2.0, -3.0]
    assert batch.ref_log_probs_R is None
    types = [batch.tokens_T.dtype, batch.positions_T.dtype, batch.targets_T.dtype, batch.cu_seqlens.dtype]
    assert types == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert batch.advantages_S.dtype == batch.old_log_probs_R.dtype == torch.float32


def test_a_full_micro_batch_gets_no_padding_segment() -> None:
    batch = build_micro_batch(SEQUENCES, [0, 2], pad_id=PAD, multiple_of=4)
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.max_seqlen == 5
    assert PAD not in batch.tokens_T


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_an_empty_micro_batch_is_all_padding(multiple_of: int) -> None:
    batch = build_micro_batch(SEQUENCES, [], pad_id=PAD, multiple_of=multiple_of)
    assert batch.tokens_T.tolist() == [PAD] * multiple_of
    assert batch.targets_T.tolist() == [IGNORED] * multiple_of
    assert batch.cu_seqlens.tolist() == [0, multiple_of]
    assert (batch.max_seqlen, batch.response_lengths, batch.index) == (multiple_of, [], [])
    assert batch.old_log_probs_R is not None
    assert batch.advantages_S.shape == batch.old_log_probs_R.shape == (0,)


@unhurried
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12), st.integers(1, 16))
def test_the_targets_are_the_responses_and_each_stands_before_its_token(
    shapes: list[tuple[int, int]], multiple_of: int
) -> None:
    start, sequences = 0, []
    for prompt_length, response_length in shapes:
        size = prompt_length + response_length
        sequences.append(Sequence(list(range(start, start + size)), prompt_length))
        start += size
    batch = build_micro_batch(sequences, range(len(sequences)), pad_id=-1, multiple_of=multiple_of)
    rows = (batch.targets_T != IGNORED).nonzero().squeeze(1)
    responses = [token for s in sequences for token in s.tokens[s.prompt_length :]]
    assert len(batch.tokens_T) % multiple_of == 0 and len(batch.tokens_T) - start < multiple_of
    assert batch.targets_T[rows].tolist() == responses == batch.tokens_T[rows + 1].tolist()
    assert batch.cu_seqlens.diff().min() > 0 and batch.cu_seqlens[-1] == len(batch.tokens_T)
    assert sum(batch.response_lengths) == len(responses)


def test_log_probs_of_a_float64_run_stay_float64() -> None:
    double = Sequence([1, 2], 1, old_log_probs=torch.tensor([-0.1], dtype=torch.float64))
    batch = build_micro_batch([double, Sequence([3], 1, old_log_probs=torch.empty(0))], [1, 0], pad_id=PAD)
    assert batch.old_log_probs_R is not None
    assert batch.old_log_probs_R.item() == -0.1


def test_a_sequence_without_a_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="sequence 1 has no prompt token"):
        build_micro_batch([Sequence([1, 2], 1), Sequence([1, 2], 0)], [0, 1], pad_id=PAD)
