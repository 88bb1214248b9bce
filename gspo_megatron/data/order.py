"""The order in which a run takes its prompts."""

from __future__ import annotations

from gspo_megatron.base.batches import Prompt
from gspo_megatron.data.mixture import Mixture
from gspo_megatron.data.permutation import PromptOrder
from gspo_megatron.data.sources import PromptSource


def position_in(size: int | None, position: int, earlier_size: int | None) -> int:
    """Where a run goes on that has taken `position` prompts of a source of `earlier_size`, in an order that is another
    now: at the beginning of the next epoch, so that no prompt of this epoch comes twice or is left out."""
    if size is None:
        return position
    return -(-position // earlier_size) * size if earlier_size else 0


class OrderedPrompts:
    """The prompts of a source in the order of a run.

    Attributes:
        taken: prompts that the run has taken so far: the position of the next one.
    """

    def __init__(self, source: PromptSource, seed: int, taken: int = 0) -> None:
        self.source, self.taken = source, taken
        self.order = source.order(seed) if isinstance(source, Mixture) else PromptOrder(source.size, seed)

    def next(self, count: int) -> list[Prompt]:
        """The `count` prompts that come next. They count as taken once `taken` is raised."""
        return self.take(self.taken, count)

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts, starting at `position`."""
        return [self.source[index] for index in self.order.slice(position, count)]
