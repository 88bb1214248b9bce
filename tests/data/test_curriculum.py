from __future__ import annotations

import json
from collections.abc import Sequence

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup
from gspo_megatron.data.curriculum import Curriculum
from gspo_megatron.data.order import OrderedPrompts, PromptOrder
from gspo_megatron.testing.fakes import Prompts

SIZE = 6


def group(prompt: Prompt, right: Sequence[int]) -> RolloutGroup:
    return RolloutGroup(prompt, [Rollout(i, prompt, [], [], False, 0, reward=r) for i, r in enumerate(right)])


class Run:
    """Prompt 0 is always right, prompt 1 always wrong, the others now and then."""

    def __init__(self, visits: int = 2, retry: int = 0, easy: tuple[int, ...] = (0, 1)) -> None:
        self.curriculum, self.easy = Curriculum(visits, retry, lambda rollout: rollout.reward), easy
        self.prompts = OrderedPrompts(Prompts(SIZE), 1, 0, self.curriculum)

    def step(self, count: int = 3) -> list[int]:
        asked = self.prompts.next(count)
        self.prompts.pass_on([group(p, [p.id == 0] * 2 if p.id in self.easy else [1, 0]) for p in asked])
        return [p.id for p in asked]

    def epochs(self, number: int) -> list[list[int]]:
        """The prompts of each epoch of the order."""
        start = self.prompts.taken // SIZE
        found: list[list[int]] = [[] for _ in range(number + 1)]
        while not found[number]:
            (asked,) = self.step(1)
            found[(self.prompts.taken - 1) // SIZE - start].append(asked)
        return found[:number]


def test_a_prompt_that_teaches_nothing_is_set_aside_after_its_visits() -> None:
    run = Run(visits=2)
    for epoch, asked in enumerate(run.epochs(5)):
        assert sorted(asked) == (list(range(SIZE)) if epoch < 2 else [2, 3, 4, 5])
    assert run.curriculum.set_aside == 2
    order = PromptOrder(SIZE, 1)
    assert Run(visits=2).step(SIZE) == order.slice(0, SIZE)  # and what is left keeps its order


def test_it_is_tried_again_and_comes_back_when_it_teaches() -> None:
    run = Run(visits=2, retry=3)
    with_easy = [0 in asked for asked in run.epochs(9)]
    assert with_easy == [True, True, False, False, False, True, False, False, False]
    run.easy = (1,)
    with_easy = [0 in asked for asked in run.epochs(6)]
    assert with_easy.index(True) <= 3 and all(with_easy[with_easy.index(True) :]) and run.curriculum.set_aside == 1


def test_a_visit_that_teaches_begins_the_count_again() -> None:
    run = Run(visits=2)
    run.step(SIZE)
    run.easy = ()
    run.step(SIZE)
    run.easy = (0,)
    assert sorted(run.step(SIZE)) == sorted(run.step(SIZE)) == list(range(SIZE))
    assert 0 not in run.step(5)


def test_what_was_set_aside_is_taken_when_nothing_else_is_left() -> None:
    run = Run(visits=1, easy=tuple(range(SIZE)))
    assert len(run.step(SIZE)) == run.curriculum.set_aside == SIZE
    before = run.prompts.taken
    assert len(set(run.step(4))) == 4 and run.prompts.taken > before


def test_next_changes_nothing_until_the_groups_are_there() -> None:
    run = Run(visits=1)
    run.step(SIZE)
    state, taken = run.curriculum.state(), run.prompts.taken
    assert [p.id for p in run.prompts.next(3)] == [p.id for p in run.prompts.next(3)]
    assert (run.curriculum.state(), run.prompts.taken) == (state, taken)


def test_the_state_restores_what_is_remembered() -> None:
    whole, first = Run(visits=2, retry=2), Run(visits=2, retry=2)
    steps = [whole.step() for _ in range(40)]
    assert [first.step() for _ in range(17)] == steps[:17]
    second = Run(visits=2, retry=2)
    second.prompts.taken = first.prompts.taken
    second.curriculum.restore(json.loads(json.dumps(first.curriculum.state())))
    assert [second.step() for _ in range(23)] == steps[17:]
    fewer = Curriculum(1, 0, lambda rollout: rollout.reward)
    fewer.restore(first.curriculum.state())
    assert fewer.set_aside >= first.curriculum.set_aside
