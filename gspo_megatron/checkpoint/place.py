"""Where a rank's tensor belongs in the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a rank's tensor belongs in the whole model: slice `index` of `count` along `dim`, with `stride` matrices
    stacked in it. An unsharded tensor is slice 0 of 1."""

    name: str
    dim: int = 0
    stride: int = 1
    index: int = 0
    count: int = 1

    def cut(self, whole: Tensor) -> Tensor:
        """This slice of the whole tensor, whose `dim` is divisible by stride * count."""
        return torch.cat(whole.chunk(self.stride * self.count, self.dim)[self.index :: self.count], self.dim)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole tensor from its `count` slices: the inverse of `cut`."""
        cut = [piece.chunk(self.stride, self.dim) for piece in slices]
        return torch.cat([pieces[i] for i in range(self.stride) for pieces in cut], self.dim)
