"""A step that goes on has the experts of its sampler in its columns, if anywhere: its rollouts have none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Rollout
from gspo_megatron.testing.fakes import OneRank, Shelf, TablePolicy, TableSampler, config_of, trainer_of
from tests.run.test_trainer import Rows

R3 = ("algorithm.routing_replay=R3", "algorithm.updates_per_rollout=4", "train.steps=1")


class WithExperts(TableSampler):
    """Says that the same two experts took every token in every layer."""

    def generate(self, *args: Any, **how: Any) -> list[Rollout]:
        shape, drawn = self.config.model.shape, super().generate(*args, **how)
        for r in drawn:
            size = len(r.prompt.tokens) + len(r.tokens) - 1, shape.num_layers, shape.experts_per_token
            r.routed_experts = torch.arange(size[2], dtype=torch.int8).expand(size).clone()
        return drawn


@pytest.mark.parametrize("rewards", ["exact_match: 1", "tests.run.test_replay_continues:nothing: 1"])
def test_a_step_goes_on_with_and_without_gradient(rewards: str) -> None:
    """Where all rewards are equal no sequence is packed, and so none has a column."""
    config, policy, shelf = config_of(*R3, f"reward.functions={{{rewards}}}"), TablePolicy(OneRank()), Shelf()
    asked = itertools.count(1)
    parts = {"checkpoints": shelf, "stop": lambda: next(asked) == 3}
    assert not trainer_of(config, policy=policy, sampler=WithExperts(policy, config), **parts).run()
    position, state = shelf.saved[-1]
    assert position == (0, 0, 2)
    writer = Rows()
    trainer = trainer_of(config, policy=policy, sampler=WithExperts(policy, config), state=state, writer=writer)
    known = ["routed_experts" in s.columns for s in trainer.step_state.sequences]
    assert any(known) == ("exact" in rewards)
    assert trainer.run() and policy.version == 4 and writer.rows[-1]["step"] == 1


def nothing(response: str) -> float:
    return 0.0
