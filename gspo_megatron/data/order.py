"""The order in which a run takes its prompts."""

from __future__ import annotations

from random import Random

import numpy as np

from gspo_megatron.base.batches import Prompt
from gspo_megatron.data.sources import PromptSource


class PromptOrder:
    """Position k of a run -> index of a prompt: k itself in an endless source, else pi_e[k - e * size], e = k // size.

    pi_e is a permutation that depends on (seed, e) only. Any position can be read at any time, so a resumed run needs
    only the number k, whatever its layout.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        if self._size is None:
            return position
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            random = Random(f"order {self._seed} epoch {epoch}")
            # Sorting by random() and not shuffle(): only random() is guaranteed to stay the same in later Pythons.
            draws = np.fromiter((random.random() for _ in range(self._size)), dtype=np.float64, count=self._size)
            self._permutation = draws.argsort(kind="stable")
            self._epoch = epoch
        return int(self._permutation[offset])


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
        self.source, self.order, self.taken = source, PromptOrder(source.size, seed), taken

    def next(self, count: int) -> list[Prompt]:
        """The `count` prompts that come next. They count as taken once `taken` is raised."""
        return self.take(self.taken, count)

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts, starting at `position`."""
        return [self.source[self.order[position + i]] for i in range(count)]
