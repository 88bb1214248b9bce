"""The order in which a run takes its prompts."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from gspo_megatron.base.batches import Prompt, RolloutGroup
from gspo_megatron.data.curriculum import Curriculum
from gspo_megatron.data.mixture import Mixture
from gspo_megatron.data.permutation import PromptOrder
from gspo_megatron.data.sources import PromptSource

LONGEST_SEARCH = 10_000
"""Prompts of a mixture that are skipped, before what was set aside is taken after all; of one source, two epochs."""


def position_in(size: int | None, position: int, earlier_size: int | None) -> int:
    """Where a run goes on that has taken `position` prompts of a source of `earlier_size`, in an order that is another
    now: at the beginning of the next epoch, so that no prompt of this epoch comes twice or is left out."""
    if size is None:
        return position
    return -(-position // earlier_size) * size if earlier_size else 0


class OrderedPrompts:
    """The prompts of a source in the order of a run.

    Attributes:
        taken: prompts that the run has taken or skipped so far: the position of the next one.
        curriculum: which prompts are skipped.
    """

    def __init__(self, source: PromptSource, seed: int, taken: int = 0, curriculum: Curriculum | None = None) -> None:
        self.source, self.taken, self.curriculum = source, taken, curriculum
        self.order = source.order(seed) if isinstance(source, Mixture) else PromptOrder(source.size, seed)
        self._skipped: list[int] = []

    def next(self, count: int) -> list[Prompt]:
        """The `count` prompts that come next. They count as taken once `taken` is raised, or `pass_on` is called."""
        chosen, self._skipped, position = list[int](), [], self.taken
        while self.curriculum and len(chosen) < count:
            if len(self._skipped) >= (2 * self.source.size if self.source.size else LONGEST_SEARCH):
                break  # there is nothing else: what was set aside is taken after all
            for index in self.order.slice(position, count):
                wanted = self.curriculum.wants(index)
                (chosen if wanted else self._skipped).append(index)
                position += 1
                if len(chosen) == count:
                    break
        chosen += self.order.slice(position, count - len(chosen)) if len(chosen) < count else []
        return [self.source[index] for index in chosen]

    def pass_on(self, groups: Seq[RolloutGroup]) -> None:
        """The prompts of the last `next` are taken, and these are their rollouts."""
        self.taken += len(groups) + len(self._skipped)
        if self.curriculum:
            self.curriculum.observe(groups, self._skipped)

    def begin(self, count: int) -> list[Prompt]:
        """The `count` prompts that come next, which are taken with it; their rollouts come in any order."""
        chosen = self.next(count)
        self.taken += count + len(self._skipped)
        if self.curriculum:
            self.curriculum.observe((), self._skipped)
        return chosen

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts, starting at `position`."""
        return [self.source[index] for index in self.order.slice(position, count)]
