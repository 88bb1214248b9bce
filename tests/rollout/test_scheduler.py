"""Which rollout has which row of the cache, and when it enters."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.batches import Prompt
from gspo_megatron.rollout.native.scheduler import DecodeScheduler, Part, tokens_of_forward

EOS = 1


def scheduler_of(
    group_sizes: list[int], *, max_rows: int = 4, num_parts: int = 1, max_prompt_tokens: int = 100
) -> DecodeScheduler:
    """Prompt i has i + 1 tokens and `group_sizes[i]` rollouts."""
    prompts = [Prompt(i, "", (7,) * (i + 1), "") for i, size in enumerate(group_sizes) for _ in range(size)]
    return DecodeScheduler(
        prompts,
        range(100, 100 + len(prompts)),
        max_rows=max_rows,
        max_new_tokens=5,
        max_prompt_tokens=max_prompt_tokens,
        num_parts=num_parts,
        eos_id=EOS,
    )


def drawn_by(parts: list[Part]) -> np.ndarray:
    return np.concatenate(
        [np.concatenate([p.going_on, *(admission.rollout_index for admission in p.entering)]) for p in parts]
    )


def finish(scheduler: DecodeScheduler, ends: list[int], rollout_index: np.ndarray) -> None:
    """Everyone draws; those in `ends` draw EOS."""
    scheduler.record(rollout_index, np.where(np.isin(rollout_index, ends), EOS, 5), np.zeros(len(rollout_index)))


def entering(parts: list[Part]) -> list[list[int]]:
    return [admission.rollout_index.tolist() for part in parts for admission in part.entering]


def test_a_prompt_enters_when_all_its_rollouts_have_rows() -> None:
    """Groups of 2 in eight rows: the fifth enters when two rows are free, not when one is."""
    scheduler = scheduler_of([2, 2, 2, 2, 2], max_rows=8)
    parts = scheduler.next_parts()
    assert entering(parts) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    finish(scheduler, [6], drawn_by(parts))
    parts = scheduler.next_parts()
    assert entering(parts) == []
    finish(scheduler, [0], drawn_by(parts))
    parts = scheduler.next_parts()
    assert entering(parts) == [[8, 9]]
    assert scheduler.active.tolist() == [7, 1, 2, 3, 4, 5, 8, 9], "the last took the free row, the new ones came behind"
    assert [admission.rows for admission in parts[0].entering] == [range(6, 8)]


def test_a_prompt_with_many_rollouts_enters_a_quarter_of_all_rows_at_a_time_where_it_has_to() -> None:
    """Nine rollouts in eight rows: eight at once, from one prefill, and the last where anyone ends."""
    scheduler = scheduler_of([9], max_rows=8)
    assert scheduler.next_tokens().tolist() == [1]
    parts = scheduler.next_parts()
    assert entering(parts) == [list(range(8))]
    finish(scheduler, [3], drawn_by(parts))
    assert scheduler.next_tokens().tolist() == [7 + 1]
    assert entering(scheduler.next_parts()) == [[8]]


def test_prompts_of_one_forward_are_limited_in_tokens() -> None:
    """Prompts of 1, 2, 3 and 4 tokens: 1 + 2 fit into 5, then 3 alone, then 4 alone, beside those that go on."""
    scheduler = scheduler_of([1, 1, 1, 1], max_prompt_tokens=5)
    tokens = []
    for _ in range(3):
        tokens.append(scheduler.next_tokens().tolist())
        parts = scheduler.next_parts()
        finish(scheduler, [], drawn_by(parts))
    assert tokens == [[3], [2 + 3], [3 + 4]]
    assert entering(scheduler_of([1] * 4, max_prompt_tokens=5, num_parts=2).next_parts()) == [[0], [2], [1]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), max_size=8),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_rollout_keeps_its_row(
    group_sizes: list[int], max_rows: int, num_parts: int, max_prompt_tokens: int, random: object
) -> None:
    """With responses of any lengths: `cache[row]` is whose tokens a cache would hold, with the moves carried out."""
    scheduler = scheduler_of(group_sizes, max_rows=max_rows, num_parts=num_parts, max_prompt_tokens=max_prompt_tokens)
    cache: dict[int, tuple[int, int]] = {}  # row: (rollout, tokens of it)
    lengths, entered = Counter[int](), list[int]()
    while (announced := scheduler.next_tokens()).any():
        move, parts = scheduler.move, scheduler.next_parts()
        assert not set(move.from_rows.tolist()) & set(move.to_rows.tolist())
        for old, new in zip(move.from_rows.tolist(), move.to_rows.tolist(), strict=True):
            cache[new] = (cache[old][0], min(cache[old][1], move.length))
        for part, num_tokens in zip(parts, announced, strict=True):
            prompt_tokens = [len(admission.tokens) for admission in part.entering]
            own = len(part.going_on) + sum(prompt_tokens)
            assert own <= num_tokens < own + num_parts, "only the last shares may be smaller than the first"
            assert sum(prompt_tokens) <= max_prompt_tokens or len(prompt_tokens) == 1
            for row, i in enumerate(part.going_on.tolist(), part.first_row):
                assert cache[row] == (i, scheduler.positions(np.array([i]))[0])
                cache[row] = (i, cache[row][1] + 1)
            for admission in part.entering:
                cache |= {
                    row: (i, len(admission.tokens))
                    for row, i in zip(admission.rows, admission.rollout_index.tolist(), strict=True)
                }
                entered += admission.rollout_index.tolist()
        rollout_index = drawn_by(parts)
        assert (
            sorted(rollout_index) == sorted(scheduler.active)
            and len(set(rollout_index)) == len(rollout_index) <= max_rows
        )
        lengths.update(rollout_index.tolist())
        ends = [i for i in rollout_index.tolist() if random.random() < 0.4]  # type: ignore[attr-defined]
        scheduler.record(
            rollout_index, np.where(np.isin(rollout_index, ends), EOS, 10 + rollout_index), -1.0 - rollout_index
        )
    rollouts = scheduler.rollouts(7)
    assert sorted(entered) == list(range(sum(group_sizes))) and [r.id for r in rollouts] == scheduler.ids.tolist()
    for i, r in enumerate(rollouts):
        assert len(r.tokens) == lengths[i] <= 5 and set(r.tokens[:-1]) <= {10 + i}
        assert r.truncated == (r.tokens[-1] == 10 + i) and len(r.tokens) in (range(1, 6) if not r.truncated else [5])
        assert r.log_probs == [-1.0 - i] * lengths[i] and r.prompt is scheduler.prompts[i] and r.policy_version == 7


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("going_on", [0, 1, 3, 4])
def test_host_and_device_count_alike(num_parts: int, going_on: int) -> None:
    for group_sizes in ([], [2, 1, 3, 1], [4]):
        scheduler = scheduler_of(group_sizes, num_parts=num_parts)
        on_host = tokens_of_forward(going_on, scheduler.max_going_on_W, scheduler.prompt_tokens_WP)
        told = torch.from_numpy(scheduler.max_going_on_W), torch.from_numpy(scheduler.prompt_tokens_WP)
        assert tokens_of_forward(torch.tensor(going_on), *told).tolist() == on_host.tolist()
