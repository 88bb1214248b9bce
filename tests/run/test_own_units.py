"""What a run counts is continued in its own unit, whatever the settings say a step takes now."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.base.batches import Position, Taken
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.data.order import PromptOrder, position_in
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.resume import Continuation
from gspo_megatron.run.state import Contents, GuardState, RunState, SavedStep
from gspo_megatron.testing.fakes import OneRank, Prompts, Shelf, TablePolicy, TableSampler, config_of, trainer_of

SIZE = 64
DECAY = ("optimizer.lr_decay=linear", "train.steps=6", "train.warm_start_steps=2", "train.warm_start_batch=8")


class Followed:
    """A run in two parts: `before` until it is asked for the n-th time whether to stop, then `after`."""

    def __init__(self, before: tuple[str, ...], after: tuple[str, ...], n: int, size: int | None = None) -> None:
        policy, asked, shelf = TablePolicy(OneRank()), itertools.count(1), Shelf()
        config = config_of(*DECAY, *before)
        samplers = [TableSampler(policy, config)]
        parts: dict[str, Any] = {"checkpoints": shelf, "train_prompts": Prompts(size=SIZE), "sampler": samplers[0]}
        first = trainer_of(config, OneRank(), policy, **parts, stop=lambda: next(asked) == n)
        assert not first.run()
        self.state = shelf.saved[-1][1]
        config = config_of(*DECAY, *before, *after)
        samplers.append(TableSampler(policy, config))
        now = Contents({}, size or SIZE)
        found = Continuation.of(self.state, config, Algorithm.of(config), has_reference=False, contents=now)
        self.said = found.other_contents
        state = replace(self.state, taken=found.taken)
        parts = {"train_prompts": Prompts(size=size or SIZE), "sampler": samplers[1]}
        trainer_of(config, OneRank(), policy, state=state, **parts).run()
        self.policy = policy
        self.of_each: list[list[int]] = []
        """The prompts of every step, in the order in which the run took them."""
        self.ids: list[int] = []
        for sampler in samplers:
            group = sampler.config.rollout.group_size
            for ids, prompts in zip(sampler.ids, sampler.prompts, strict=True):
                if len(prompts) == group * sampler.config.rollout.prompts_per_step:
                    self.of_each.append(prompts[::group])
                    self.ids += ids
        self.rates = [float(call.split()[-1]) for call in policy.calls if call.startswith("update, lr")]


def order(count: int, first: int = 0, size: int = SIZE, seed: int = 1) -> list[int]:
    whole = PromptOrder(size, seed)
    return [whole[k] for k in range(first, first + count)]


CHANGES = [
    ("rollout.prompts_per_step=16",),
    ("rollout.prompts_per_step=4",),
    ("rollout.group_size=2",),
    ("rollout.group_size=8",),
    ("algorithm.updates_per_rollout=4",),
    ("algorithm.updates_per_rollout=1",),
    ("train.warm_start_steps=5", "train.warm_start_batch=3"),
    ("rollout.prompts_per_step=2", "rollout.group_size=3", "algorithm.updates_per_rollout=1", "train.steps=9"),
]
IN_THE_WARM_START, BETWEEN_STEPS = 2, 5


@pytest.mark.parametrize("changed", CHANGES, ids=" ".join)
def test_no_prompt_is_left_out_or_repeated_and_no_rollout_has_a_number_twice(changed: tuple[str, ...]) -> None:
    run = Followed((), changed, BETWEEN_STEPS)
    assert run.state.position == Position(2, 1, 0)
    taken = [prompt for prompts in run.of_each for prompt in prompts]
    assert taken == order(len(taken), first=16)  # 2 batches of 8 went to the warm start
    assert max(Counter(run.ids).values()) == 1


def test_the_warm_start_counts_prompts_as_well() -> None:
    run = Followed((), ("train.warm_start_batch=5", "train.warm_start_steps=3"), IN_THE_WARM_START)
    assert run.state.position == Position(1, 0, 0) and run.state.taken.prompts == 8
    assert run.of_each[0] == order(8, first=8 + 2 * 5)


@pytest.mark.parametrize(("updates", "steps"), [(1, 6), (4, 6), (8, 6), (2, 4), (4, 9)])
def test_the_learning_rate_ends_with_the_last_update(updates: int, steps: int) -> None:
    """One step of 2 updates, then steps of `updates`: from the change on, a straight line that reaches 0 with the
    update after the last."""
    changed = (f"algorithm.updates_per_rollout={updates}", f"train.steps={steps}")
    rates = Followed((), changed, BETWEEN_STEPS).rates[2:]  # after those of the warm start
    end = 2 + (steps - 1) * updates
    assert len(rates) == end
    assert rates[2:] == pytest.approx([5 * (1 - k / end) for k in range(2, end)], rel=1e-5)


def test_another_number_of_prompts_begins_an_epoch() -> None:
    run = Followed((), (), BETWEEN_STEPS, size=40)
    assert run.state.taken.prompts == 16 + 8 and run.state.contents == Contents({}, SIZE)
    later = [prompt for prompts in run.of_each[1:] for prompt in prompts]
    assert later == order(len(later), first=40, size=40)
    why = "data.train=task:sort_digits has 40 prompts, and had 64 when the run was saved"
    assert run.said == (f"{why}: the next step begins epoch 2",)


def test_another_seed_begins_an_epoch() -> None:
    run = Followed((), ("run.seed=7",), BETWEEN_STEPS)
    later = [prompt for prompts in run.of_each[1:] for prompt in prompts]
    assert later == order(len(later), first=SIZE, seed=7)
    assert run.said == ("run.seed=7 is another order of the prompts: the next step begins epoch 2",)


def test_positions_in_another_number_of_prompts() -> None:
    assert [position_in(10, k, 7) for k in (0, 1, 7, 8)] == [0, 10, 10, 20]
    assert position_in(10, 5, None) == 0 and position_in(None, 5, 7) == 5


def test_an_earlier_checkpoint_counts_in_steps() -> None:
    config = config_of("train.warm_start_steps=3", "train.warm_start_batch=5")
    state = RunState.of(config, Position(3, 2, 1), began=True, guards=GuardState(), step=None)
    about = json.loads(json.dumps(state.to_json()))
    del about["taken"], about["contents"]
    assert RunState.from_saved(about, []).taken == Taken(15 + 2 * 8, 3 * 8 * 4)
    inside = about | {"step": {"number": 3, "prompts": [], "rollouts": [], "updates": []}}
    assert RunState.from_saved(inside, []).taken == Taken(15 + 3 * 8, 4 * 8 * 4)


def test_what_has_changed_under_its_name_is_said() -> None:
    def said(then: dict[str, str], now: dict[str, str], *changed: str) -> tuple[str, ...]:
        before = Contents(then, 8)
        state = RunState.of(config_of(), Position(0, 1, 0), began=True, guards=GuardState(), step=None, contents=before)
        config = config_of(*changed)
        state = RunState.from_saved(json.loads(json.dumps(state.to_json())), [])
        found = Continuation.of(
            state, config, Algorithm.of(config), has_reference=False, contents=Contents(now, 8)
        ).other_contents
        return found

    assert said({"data.train": "a" * 64}, {"data.train": "a" * 64, "data.eval": "c" * 64}) == ()
    [text] = said({"data.train": "a" * 64}, {"data.train": "b" * 64})
    assert text.startswith(
        "data.train=task:sort_digits is not what the run was saved with (SHA-256 bbbbbbbbbbbb, was aaaaaaaaaaaa)"
    )
    # With another name the settings say so themselves.
    assert said({"data.train": "a" * 64}, {"data.train": "b" * 64}, "data.train=other.jsonl") == ()
    [text] = said({"reward module mine": "a" * 64}, {"reward module mine": "b" * 64})
    assert text.startswith("reward module mine is not what")


def test_settings_of_the_old_log_probs_do_not_change_inside_a_step() -> None:
    state = RunState.of(config_of(), Position(0, 1, 1), began=True, guards=GuardState(), step=None)
    inside = replace(state, step=SavedStep({"number": 2}, ()))
    contents = Contents({}, None)
    for setting in ("rollout.temperature=0.7", "model.rope_base=5000"):
        config = config_of(setting)
        with pytest.raises(CheckpointError, match=setting.partition("=")[0]):
            Continuation.of(inside, config, Algorithm.of(config), has_reference=False, contents=contents)
        Continuation.of(state, config, Algorithm.of(config), has_reference=False, contents=contents)


def test_a_changed_warm_start_that_is_over_has_no_effect_and_says_so() -> None:
    state = RunState.of(config_of(), Position(0, 1, 0), began=True, guards=GuardState(), step=None)
    config = config_of("train.warm_start_batch=3")
    contents = Contents({}, None)

    def changed(state: RunState) -> tuple[str, ...]:
        return Continuation.of(state, config, Algorithm.of(config), has_reference=False, contents=contents).changed

    assert changed(state) == ("train.warm_start_batch: 3, was 64 (without effect: the warm start is over)",)
    assert changed(replace(state, began=False)) == ("train.warm_start_batch: 3, was 64",)
