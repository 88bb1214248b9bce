"""Several sources of prompts, mixed by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from gspo_megatron.base.batches import Prompt
from gspo_megatron.data.permutation import PromptOrder, key_of, permuted, random_words
from gspo_megatron.data.sources import PromptSource

BLOCK = 1000
"""Prompts that hold every source by its weight, to one prompt."""


@dataclass(frozen=True)
class Part:
    """A source of a mixture. `weight` is its share of the prompts, relative to the other sources' weights."""

    name: str
    weight: float
    prompts: PromptSource


@dataclass(frozen=True)
class Mixture:
    """Prompt `index` is number index // S of source index % S, of S sources; its `source` is that one's name. The
    mixture has no end: a source begins its next epoch when all its prompts were taken."""

    parts: Sequence[Part]
    size: None = None

    @property
    def dropped(self) -> Mapping[str, int]:
        return {
            f"{reason} in {part.name}": number for part in self.parts for reason, number in part.prompts.dropped.items()
        }

    @property
    def digest(self) -> str:
        return " ".join(filter(None, (part.prompts.digest for part in self.parts)))

    def __getitem__(self, index: int) -> Prompt:
        own, number = divmod(index, len(self.parts))
        part = self.parts[number]
        return replace(part.prompts[own], id=index, source=part.name)

    def order(self, seed: int) -> MixedOrder:
        return MixedOrder(self, seed)


@dataclass(frozen=True)
class MixedOrder:
    """Position k -> index of a prompt.

    Blocks of BLOCK positions are shuffled on their own. In block b, source s has the points (j + u_b) / BLOCK,
    0 <= j < BLOCK, that lie between its bounds in the cumulative weights; u_b is a random number in [0, 1). So a block
    has BLOCK w_s of its prompts, rounded up or down, and the mean over blocks is exact.
    """

    mixture: Mixture
    seed: int
    _newest: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __getitem__(self, position: int) -> int:
        return self.slice(position, 1)[0]

    def slice(self, position: int, count: int) -> list[int]:
        """The indices at `count` positions, starting at `position`."""
        found: list[int] = []
        while count > 0:
            block, offset = divmod(position, BLOCK)
            here = min(count, BLOCK - offset)
            found += self._of_block(block)[offset : offset + here]
            position, count = position + here, count - here
        return found

    @cached_property
    def _orders(self) -> list[PromptOrder]:
        return [PromptOrder(part.prompts.size, self.seed) for part in self.mixture.parts]

    def _of_block(self, block: int) -> list[int]:
        if block not in self._newest:
            before, counts = self._counts(block)
            sources = np.repeat(np.arange(len(counts)), counts)
            sources = sources[permuted(range(BLOCK), BLOCK, key_of(f"mixture of block {block}, seed {self.seed}"))]
            indices = np.empty(BLOCK, np.int64)
            for source, (order, first, number) in enumerate(zip(self._orders, before, counts, strict=True)):
                indices[sources == source] = np.array(order.slice(first, number)) * len(counts) + source
            self._newest.clear()
            self._newest[block] = indices.tolist()
        return self._newest[block]

    def _counts(self, block: int) -> tuple[list[int], list[int]]:
        """Prompts of each source in all blocks before this one, and in it."""
        bounds = self._bounds(np.arange(block + 1, dtype=np.uint64))
        of_blocks = np.diff(bounds, axis=1, prepend=0)
        return of_blocks[:-1].sum(0).tolist(), of_blocks[-1].tolist()

    def _bounds(self, blocks: NDArray[np.uint64]) -> NDArray[np.int64]:
        """[blocks, sources]: points of a block below the upper bound of each source."""
        weights = [part.weight for part in self.mixture.parts]
        upper = np.array(list(accumulate(weights))) / sum(weights)
        words = random_words(key_of(f"mixture, seed {self.seed}"), blocks)
        u = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        points = np.ceil(upper * BLOCK - u[:, None]).clip(0, BLOCK).astype(np.int64)
        points[:, -1] = BLOCK
        return points
