"""The cache of keys and values of earlier tokens, and what one forward writes to it and reads from it.

Shapes: T packed tokens, B continued rows, W entries that are written, L positions, K key/value heads of this
tensor-parallel rank, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CacheWrite(NamedTuple):
    """Token `token_W[i]` of the pack becomes position `position_W[i]` of row `row_W[i]`. A token may be written to
    several rows."""

    token_W: Tensor
    row_W: Tensor
    position_W: Tensor


class KVCache:
    """Keys and values of every layer on this rank for a fixed number of rows, [row, K, position, D]."""

    def __init__(self, num_rows: int, num_positions: int) -> None:
        self.num_rows, self.num_positions = num_rows, num_positions
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, allocated at its first use in the number format of `like` [T, K, D]."""
        if number not in self._layers:
            shape = (self.num_rows, like.size(1), self.num_positions, like.size(2))
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def write(self, layer: int, key: Tensor, value: Tensor, write: CacheWrite) -> tuple[Tensor, Tensor]:
        """Stores the keys and values [T, K, D] of a layer's tokens where `write` says. Returns all of that layer."""
        keys, values = self.layer(layer, key)
        keys[write.row_W, :, write.position_W] = key[write.token_W]
        values[write.row_W, :, write.position_W] = value[write.token_W]
        return keys, values

    def copy_rows(self, from_rows: Tensor, to_rows: Tensor, length: int) -> None:
        """Copies the first `length` positions of rows to other rows; no row is in both."""
        for layer in self._layers.values():
            for kept in layer:
                kept[to_rows, :, :length] = kept[from_rows, :, :length]


class CacheUse(NamedTuple):
    """How one forward uses a cache: `write` comes first; then the first B tokens of the pack, the newest of rows
    `first_row`, `first_row` + 1, ..., each attend to the positions of their row that `seen_BL` marks."""

    cache: KVCache
    write: CacheWrite
    first_row: int
    seen_BL: Tensor
