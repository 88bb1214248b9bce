"""Dynamic sampling: which groups a step gets, and that a run goes on exactly where its sampling was stopped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sampling, Taken
from gspo_megatron.base.errors import ConfigError, StopRequested
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.rewards.rewards import Reward
from gspo_megatron.rollout.dynamic_sampling import DynamicSampling
from gspo_megatron.run.state import RunState
from gspo_megatron.testing.fakes import (
    OneRank,
    Prompts,
    Replicas,
    Shelf,
    TablePolicy,
    TableSampler,
    config_of,
    trainer_of,
)
from tests.run.test_trainer import Rows, without_times

# --- which groups ---


class Script:
    """A source whose n-th prompt gets the rewards of the n-th letter: + differ, 1 all right, 0 all wrong."""

    metrics: dict[str, float] = {"prompts/set_aside": 3}  # noqa: RUF012

    def __init__(self, script: str) -> None:
        self.script, self.at, self.asked = script, 0, list[int]()

    @property
    def taken(self) -> Taken:
        return Taken(self.at, 2 * self.at)

    def groups(self, step: int, count: int | None = None) -> list[RolloutGroup]:
        assert count is not None
        self.asked.append(count)
        self.at += count
        return [self._group(n) for n in range(self.at - count, self.at)]

    def _group(self, number: int) -> RolloutGroup:
        prompt, rewards = Prompt(number, "", (1,), ""), {"+": (0, 1), "1": (1, 1), "0": (0, 0)}[self.script[number]]
        return RolloutGroup(prompt, [Rollout(0, prompt, [1] * 5, [0.0] * 5, False, 0, reward=r) for r in rewards])

    def held_out(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, reward: Reward) -> list[RolloutGroup]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("script", "rounds", "asked", "chosen", "metrics"),
    [
        # rounds, share kept, all right, all wrong, surplus, filled, unused tokens
        ("++++", 3, [4], [0, 1, 2, 3], [1, 1.0, 0, 0, 0, 0, 0]),
        # Half are kept: for 2 that are missing 4 are asked for, and all of them are kept.
        ("+01+++++", 3, [4, 4], [0, 3, 4, 5], [2, 6 / 8, 1, 1, 2, 0, 40]),
        # 3 of 5 later, 1 is missing, and 1 / (3 / 6) are asked for.
        ("++10" + "+000" + "0+", 3, [4, 4, 3], None, None),
        # Nothing teaches: the first ones are trained on after all.
        ("0010" + "1111", 1, [4, 4], [0, 1, 2, 3], [2, 0.0, 5, 3, 0, 4, 40]),
        ("0+10" + "10+1", 1, [4, 4], [1, 6, 0, 2], [2, 2 / 8, 3, 3, 0, 2, 40]),
    ],
)
def test_groups_without_variance_are_replaced(
    script: str, rounds: int, asked: list[int], chosen: list[int] | None, metrics: list[float] | None
) -> None:
    inner = Script(script + "+" * 8)
    source = DynamicSampling(inner, 4, rounds, accuracy=lambda rollout: rollout.reward)
    groups = source.groups(1)
    assert inner.asked == asked and len(groups) == 4
    if chosen is not None:
        assert [group.prompt.id for group in groups] == chosen
        assert source.metrics["prompts/set_aside"] == 3 and [*source.metrics.values()][1:] == metrics
    assert source.taken == Taken(sum(asked), 2 * sum(asked))


# --- a run ---

SETTINGS = (
    "train.steps=4",
    "rollout.prompts_per_step=4",
    "rollout.dynamic_sampling=2",
    "data.curriculum=2",
    "checkpoint.load=latest",
)


class Stopping(TableSampler):
    """Is asked to stop at its n-th call for a step's rollouts."""

    calls, stop_at = 0, 0

    def generate(
        self, prompts: Sequence[Prompt], ids: Sequence[int], *, greedy: bool = False, **how: Any
    ) -> list[Rollout]:
        self.calls += not greedy
        if not greedy and self.calls == self.stop_at:
            raise StopRequested
        return super().generate(prompts, ids, greedy=greedy, **how)


class Run:
    """Until the sampler's n-th call, or until it asks for the n-th time whether to stop."""

    def __init__(
        self,
        ranks: Ranks | None = None,
        *,
        in_call: int = 0,
        at_point: int = 0,
        state: RunState | None = None,
        policy: TablePolicy | None = None,
    ) -> None:
        ranks = ranks or OneRank()
        self.policy, self.rows, self.shelf = policy or TablePolicy(ranks), Rows(), Shelf(ranks)
        asked = itertools.count(1)
        self.sampler = Stopping(self.policy, config := config_of(*SETTINGS))
        self.sampler.stop_at = in_call
        self.trainer = trainer_of(
            config,
            ranks,
            self.policy,
            sampler=self.sampler,
            train_prompts=Prompts(size=24),
            writer=self.rows,
            checkpoints=self.shelf,
            state=state,
            stop=lambda: next(asked) == at_point,
        )
        self.completed = self.trainer.run()


def test_a_run_goes_on_where_its_sampling_was_stopped() -> None:
    whole = Run()
    rows = whole.rows.rows[1:]
    assert max(row["groups/rounds"] for row in rows) == 3 and min(row["groups/rounds"] for row in rows) < 3
    assert all((row["groups/zero_variance_fraction"] * 4 == row["groups/filled"]) for row in rows)
    # In every second round of sampling, and between updates and steps.
    stops = [{"in_call": n} for n in range(2, whole.sampler.calls + 1, 2)] + [{"at_point": n} for n in (3, 6)]
    for stop in stops:
        first = Run(**stop)  # type: ignore[arg-type]
        assert not first.completed
        second = Run(state=first.shelf.saved[-1][1], policy=first.policy) if first.shelf.saved else Run()
        assert second.completed
        joined = [*first.rows.rows, *second.rows.rows] if first.shelf.saved else second.rows.rows
        assert without_times(joined) == without_times(whole.rows.rows), stop
        assert torch.equal(second.policy.logits_VV, whole.policy.logits_VV)


def test_it_does_not_depend_on_the_number_of_ranks() -> None:
    alone = Run()
    for of_replica in Replicas(3).run(Run):
        assert of_replica.trainer.parts.source.taken == alone.trainer.parts.source.taken
        torch.testing.assert_close(of_replica.policy.logits_VV, alone.policy.logits_VV, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_never_differs() -> None:
    settings = ["precision.device=cpu", "model.vocab_size=13", "rollout.dynamic_sampling=2", "rollout.group_size=1"]
    with pytest.raises(ConfigError, match=r"rollout.dynamic_sampling=2 with rollout.group_size=1"):
        check_config(load_config(None, settings), 1)
