"""The cache of keys and values of earlier tokens, and what one forward writes to it and reads from it.

Shapes: T packed tokens, B continued rows, W entries that are written, L positions, K key/value heads of this
tensor-parallel rank, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class CacheWrite(NamedTuple):
    """Token `token_W[i]` of the pack becomes position `position_W[i]` of row `row_W[i]`. A token may be written to
    several rows."""

    token_W: Tensor
    row_W: Tensor
    position_W: Tensor


class CachedPrompts(NamedTuple):
    """Prompt p of a forward has `length_P[p]` tokens; prompt `prompt_R[i]` fills row `row_R[i]`."""

    length_P: Tensor
    prompt_R: Tensor
    row_R: Tensor


class KVCache:
    """What is kept of earlier tokens, for every layer on this rank and a fixed number of rows: one or several tensors a
    layer. Attention keeps [row, K, position, D] each, such as keys and values; a recurrent layer its states, whose size
    does not depend on the length of a row."""

    def __init__(self, num_rows: int, num_positions: int) -> None:
        self.num_rows, self.num_positions = num_rows, num_positions
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}

    def layer(self, number: int, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What is kept of a layer, allocated at its first use in sizes and number format of `like`, [T, K, D] each."""
        if number not in self._layers:
            self._layers[number] = tuple(
                x.new_zeros(self.num_rows, x.size(1), self.num_positions, x.size(2)) for x in like
            )
        return self._layers[number]

    def write(self, layer: int, new: Sequence[Tensor], write: CacheWrite) -> tuple[Tensor, ...]:
        """Stores `new`, [T, K, D] each, of a layer's tokens where `write` says. Returns all that is kept of it."""
        kept = self.layer(layer, new)
        for rows, x in zip(kept, new, strict=True):
            rows[write.row_W, :, write.position_W] = x[write.token_W]
        return kept

    def states(self, layer: int, *like: Tensor) -> tuple[Tensor, ...]:
        """The states of a recurrent layer, [row, ...] each, allocated at their first use in sizes and number formats of
        `like`. A prompt sets those of its rows, whatever they held before."""
        if layer not in self._states:
            self._states[layer] = tuple(x.new_zeros(self.num_rows, *x.shape) for x in like)
        return self._states[layer]

    def copy_rows(self, from_rows: Tensor, to_rows: Tensor, length: int) -> None:
        """Copies the first `length` positions of rows, and states, to other rows; no row is in both."""
        for layer in self._layers.values():
            for kept in layer:
                kept[to_rows, :, :length] = kept[from_rows, :, :length]
        for layer in self._states.values():
            for kept in layer:
                kept[to_rows] = kept[from_rows]


class CacheUse(NamedTuple):
    """How one forward uses a cache: `write` comes first; then the first B tokens of the pack, the newest of rows
    `first_row`, `first_row` + 1, ..., each attend to the positions of their row that `seen_BL` marks; `prompts` follow
    them."""

    cache: KVCache
    write: CacheWrite
    first_row: int
    seen_BL: Tensor
    prompts: CachedPrompts
