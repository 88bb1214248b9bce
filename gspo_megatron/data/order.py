"""The order in which a run takes its prompts."""

from __future__ import annotations

from random import Random

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
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        if self._size is None:
            return position
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            random = Random(f"order {self._seed} epoch {epoch}")
            # Sorting by random() and not shuffle(): only random() is guaranteed to stay the same in later Pythons.
            self._permutation = sorted(range(self._size), key=lambda _: random.random())
            self._epoch = epoch
        return self._permutation[offset]


class OrderedPrompts:
    """The prompts of a source in the order of a run."""

    def __init__(self, source: PromptSource, seed: int) -> None:
        self.source, self.order = source, PromptOrder(source.size, seed)

    def take(self, position: int, count: int) -> list[Prompt]:
        """`count` prompts, starting at `position`."""
        return [self.source[self.order[position + i]] for i in range(count)]
