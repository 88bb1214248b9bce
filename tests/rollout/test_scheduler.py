"""Which rollout has which row of the cache, and when it enters."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.rollout.native.scheduler import DecodeMicroBatch, DecodeScheduler, num_tokens_of_forward
from gspo_megatron.rollout.native.stopping import Stops, StopTable

EOS, END_OF_TURN = 1, 3


def scheduler_of(
    group_sizes: list[int], *, max_rows: int = 4, num_micro_batches: int = 1, max_prompt_tokens: int = 100
) -> DecodeScheduler:
    """Prompt i has i + 1 tokens and `group_sizes[i]` rollouts."""
    prompts = [Prompt(i, "", (7,) * (i + 1), "") for i, size in enumerate(group_sizes) for _ in range(size)]
    return DecodeScheduler(
        prompts,
        range(100, 100 + len(prompts)),
        max_rows=max_rows,
        max_new_tokens=5,
        max_prompt_tokens=max_prompt_tokens,
        num_micro_batches=num_micro_batches,
        stops=StopTable.of(Stops((EOS, END_OF_TURN)), 200),
    )


def drawn_by(micro_batches: list[DecodeMicroBatch]) -> np.ndarray:
    return np.concatenate([micro_batch.rollout_index for micro_batch in micro_batches])


def finish(scheduler: DecodeScheduler, ends: list[int], rollout_index: np.ndarray) -> None:
    """Everyone draws; those in `ends` draw EOS."""
    scheduler.record(rollout_index, np.where(np.isin(rollout_index, ends), EOS, 5), np.zeros(len(rollout_index)))


def admitted(micro_batches: list[DecodeMicroBatch]) -> list[list[int]]:
    return [admission.rollout_index.tolist() for each in micro_batches for admission in each.admissions]


def test_a_prompt_enters_when_all_its_rollouts_have_rows() -> None:
    """Groups of 2 in eight rows: the fifth enters when two rows are free, not when one is."""
    scheduler = scheduler_of([2, 2, 2, 2, 2], max_rows=8)
    micro_batches = scheduler.next_micro_batches()
    assert admitted(micro_batches) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    finish(scheduler, [6], drawn_by(micro_batches))
    assert scheduler.progress() == "sampling: 1 of 10 rollouts of this process have ended, 8 tokens so far"
    micro_batches = scheduler.next_micro_batches()
    assert admitted(micro_batches) == []
    finish(scheduler, [0], drawn_by(micro_batches))
    assert scheduler.progress() == "sampling: 2 of 10 rollouts of this process have ended, 15 tokens so far"
    micro_batches = scheduler.next_micro_batches()
    assert admitted(micro_batches) == [[8, 9]]
    assert scheduler.active.tolist() == [7, 1, 2, 3, 4, 5, 8, 9], "the last took the free row, the new ones came behind"
    assert [admission.rows for admission in micro_batches[0].admissions] == [range(6, 8)]


def test_a_prompt_with_many_rollouts_enters_a_quarter_of_all_rows_at_a_time_where_it_has_to() -> None:
    """Nine rollouts in eight rows: eight at once, from one prefill, and the last where anyone ends."""
    scheduler = scheduler_of([9], max_rows=8)
    assert scheduler.next_num_tokens().tolist() == [1]
    micro_batches = scheduler.next_micro_batches()
    assert admitted(micro_batches) == [list(range(8))]
    finish(scheduler, [3], drawn_by(micro_batches))
    assert scheduler.next_num_tokens().tolist() == [7 + 1]
    assert admitted(scheduler.next_micro_batches()) == [[8]]


def test_prompts_of_one_forward_are_limited_in_tokens() -> None:
    """Prompts of 1, 2, 3 and 4 tokens: 1 + 2 fit into 5, then 3 alone, then 4 alone, along with those that continue."""
    scheduler = scheduler_of([1, 1, 1, 1], max_prompt_tokens=5)
    tokens = []
    for _ in range(3):
        tokens.append(scheduler.next_num_tokens().tolist())
        micro_batches = scheduler.next_micro_batches()
        finish(scheduler, [], drawn_by(micro_batches))
    assert tokens == [[3], [2 + 3], [3 + 4]]
    assert admitted(scheduler_of([1] * 4, max_prompt_tokens=5, num_micro_batches=2).next_micro_batches()) == [
        [0],
        [2],
        [1],
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=8),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_rollout_keeps_its_row(
    group_sizes: list[int], max_rows: int, num_micro_batches: int, max_prompt_tokens: int, random: object
) -> None:
    """With responses of any lengths: `cache[row]` is whose tokens a cache would hold, with the copies carried out."""
    scheduler = scheduler_of(
        group_sizes, max_rows=max_rows, num_micro_batches=num_micro_batches, max_prompt_tokens=max_prompt_tokens
    )
    cache: dict[int, tuple[int, int]] = {}  # row: (rollout, tokens of it)
    lengths, entered, rollouts = Counter[int](), list[int](), list[Rollout]()
    while (announced := scheduler.next_num_tokens()).any():
        row_copy, micro_batches = scheduler.row_copy, scheduler.next_micro_batches()
        assert not set(row_copy.from_rows.tolist()) & set(row_copy.to_rows.tolist())
        for old, new in zip(row_copy.from_rows.tolist(), row_copy.to_rows.tolist(), strict=True):
            cache[new] = (cache[old][0], min(cache[old][1], row_copy.length))
        for micro_batch, num_tokens in zip(micro_batches, announced, strict=True):
            prompt_tokens = [len(admission.prompt_tokens) for admission in micro_batch.admissions]
            own = len(micro_batch.continuing) + sum(prompt_tokens)
            assert own <= num_tokens < own + num_micro_batches, "only the last shares may be smaller than the first"
            assert sum(prompt_tokens) <= max_prompt_tokens or len(prompt_tokens) == 1
            for row, i in enumerate(micro_batch.continuing.tolist(), micro_batch.first_row):
                assert cache[row] == (i, scheduler.positions(np.array([i]))[0])
                cache[row] = (i, cache[row][1] + 1)
            for admission in micro_batch.admissions:
                cache |= {
                    row: (i, len(admission.prompt_tokens))
                    for row, i in zip(admission.rows, admission.rollout_index.tolist(), strict=True)
                }
                entered += admission.rollout_index.tolist()
        rollout_index = drawn_by(micro_batches)
        assert (
            sorted(rollout_index) == sorted(scheduler.active)
            and len(set(rollout_index)) == len(rollout_index) <= max_rows
        )
        lengths.update(rollout_index.tolist())
        ends = [i for i in rollout_index.tolist() if random.random() < 0.4]  # type: ignore[attr-defined]
        ended = scheduler.record(
            rollout_index, np.where(np.isin(rollout_index, ends), EOS, 10 + rollout_index), -1.0 - rollout_index
        )
        rollouts += [scheduler.rollout(i, 7) for i in ended]
    rollouts.sort(key=lambda r: r.id)
    assert sorted(entered) == list(range(sum(group_sizes))) and [r.id for r in rollouts] == scheduler.ids.tolist()
    for i, r in enumerate(rollouts):
        assert len(r.tokens) == lengths[i] <= 5 and set(r.tokens[:-1]) <= {10 + i}
        assert r.truncated == (r.tokens[-1] == 10 + i) and len(r.tokens) in (range(1, 6) if not r.truncated else [5])
        assert r.log_probs == [-1.0 - i] * lengths[i] and r.prompt is scheduler.prompts[i] and r.policy_version == 7


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("num_continuing", [0, 1, 3, 4])
def test_host_and_device_count_alike(num_micro_batches: int, num_continuing: int) -> None:
    for group_sizes in ([], [2, 1, 3, 1], [4]):
        scheduler = scheduler_of(group_sizes, num_micro_batches=num_micro_batches)
        on_host = num_tokens_of_forward(num_continuing, scheduler.max_continuing_W, scheduler.prompt_tokens_WM)
        tensors = torch.from_numpy(scheduler.max_continuing_W), torch.from_numpy(scheduler.prompt_tokens_WM)
        assert num_tokens_of_forward(torch.tensor(num_continuing), *tensors).tolist() == on_host.tolist()


def test_any_of_the_stop_ids_ends_a_rollout() -> None:
    scheduler = scheduler_of([3])
    scheduler.record(drawn_by(scheduler.next_micro_batches()), np.array([EOS, END_OF_TURN, 5]), np.zeros(3))
    assert scheduler.active.tolist() == [2]
    scheduler.record(drawn_by(scheduler.next_micro_batches()), np.array([END_OF_TURN]), np.zeros(1))
    assert not scheduler.next_num_tokens().any()
    rollouts = [scheduler.rollout(i, policy_version=0) for i in range(3)]
    assert [(r.tokens, r.truncated) for r in rollouts] == [
        ([1], False),
        ([3], False),
        ([5, 3], False),
    ]
