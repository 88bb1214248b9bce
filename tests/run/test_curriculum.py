"""A run that sets prompts aside goes on exactly where it was stopped."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from gspo_megatron.base.batches import Taken
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.run.resume import taken_from
from gspo_megatron.run.state import Contents, RunState
from gspo_megatron.testing.fakes import OneRank, Prompts, Shelf, TablePolicy, config_of, trainer_of
from tests.run.test_trainer import Rows, without_times

SETTINGS = ("train.steps=10", "rollout.prompts_per_step=4", "algorithm.updates_per_rollout=2", "data.curriculum=1")


def run(
    n: int = 0, state: RunState | None = None, policy: TablePolicy | None = None
) -> tuple[Rows, Shelf, TablePolicy]:
    """Until it asks for the n-th time whether to stop."""
    policy, writer, shelf, asked = policy or TablePolicy(OneRank()), Rows(), Shelf(), itertools.count(1)
    parts = {"writer": writer, "checkpoints": shelf, "train_prompts": Prompts(size=12), "state": state}
    trainer_of(config_of(*SETTINGS), OneRank(), policy, **parts, stop=lambda: next(asked) == n).run()
    return writer, shelf, policy


def test_it_is_continued_exactly() -> None:
    rows, _, whole = run()
    set_aside = [row["prompts/set_aside"] for row in rows.rows[1:]]
    assert max(set_aside) > 0
    for n in (8, 13, 18):  # between steps, and inside one
        first, shelf, policy = run(n)
        _, state = shelf.saved[-1]
        second, _, policy = run(state=state, policy=policy)
        assert without_times([*first.rows, *second.rows]) == without_times(rows.rows)
        assert torch.equal(policy.logits_VV, whole.logits_VV)


def test_other_data_is_not_what_was_visited() -> None:
    _, shelf, _ = run(8)
    _, state = shelf.saved[-1]
    assert isinstance(state, RunState) and state.taken.curriculum["streaks"]
    saved = json.loads(json.dumps(state.to_json()))
    for wrong in ({"streaks": {"x": [1]}}, {"streaks": {"1": [-1]}}, {"streaks": []}, "x"):
        taken = saved["taken"] | {"curriculum": wrong}
        with pytest.raises(CheckpointError, match=r"curriculum is .* expected objects with lists of counts"):
            RunState.from_saved(saved | {"taken": taken}, [])
    config = config_of(*SETTINGS)
    state = RunState.from_saved(saved | {"contents": {"digests": {"data.train": "a"}, "num_prompts": 12}}, [])
    for digest, kept in (("a", state.taken.curriculum), ("b", {})):
        taken, _ = taken_from(state, config, Contents({"data.train": digest}, 12))
        assert taken == Taken(state.taken.prompts, state.taken.rollouts, kept)
