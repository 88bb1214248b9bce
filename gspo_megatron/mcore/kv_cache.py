"""Keys and values of the tokens that a sampler has already processed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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

    def move(self, from_rows: Tensor, to_rows: Tensor, length: int) -> None:
        """Copies the first `length` positions of rows to other rows; no row is both."""
        for layer in self._layers.values():
            for kept in layer:
                kept[to_rows, :, :length] = kept[from_rows, :, :length]


@dataclass
class CacheWrite:
    """Token `source[i]` of the pack becomes position `positions[i]` of cache row `rows[i]`; a token may fill many
    rows."""

    source: Tensor
    rows: Tensor
    positions: Tensor
