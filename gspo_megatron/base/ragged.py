"""Lists of integers of different lengths, one for each token.

Shape suffixes: R tokens, E integers of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """Token r has the `counts_R[r]` integers of `ids_E` after those of the tokens before it. Both are int32 and on the
    host. It is indexed and joined by tokens, as a tensor is by rows."""

    ids_E: Tensor
    counts_R: Tensor

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        flat = [i for of_token in lists for i in of_token]
        return cls(torch.tensor(flat, dtype=torch.int32), torch.tensor([len(x) for x in lists], dtype=torch.int32))

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        """End to end; at least one."""
        return cls(torch.cat([p.ids_E for p in parts]), torch.cat([p.counts_R for p in parts]))

    def __len__(self) -> int:
        return len(self.counts_R)

    def __getitem__(self, index: Tensor | slice) -> Ragged:
        """The lists of some tokens, by positions, a mask or a slice."""
        return Ragged(self.ids_E[entries_of(self.counts_R.long(), index)], self.counts_R[index])

    @property
    def token_E(self) -> Tensor:
        """Which token each integer belongs to, int64."""
        return torch.repeat_interleave(self.counts_R.long())

    def lacks(self, value_R: Tensor) -> Tensor:
        """[R]: whether a token's list does not have its value."""
        found_E = self.ids_E == value_R[self.token_E]
        return torch.zeros(len(self), dtype=torch.int64).index_add(0, self.token_E, found_E.long()) == 0

    def each(self) -> Iterator[Ragged]:
        """The list of every token by itself."""
        ids = self.ids_E.split(self.counts_R.tolist())
        return (Ragged(*of_token) for of_token in zip(ids, self.counts_R.view(-1, 1), strict=True))

    def cpu(self) -> Ragged:
        """Itself, which is on the host."""
        return self

    def tolist(self) -> list[list[int]]:
        return [part.tolist() for part in self.ids_E.split(self.counts_R.tolist())]


def entries_of(counts_R: Tensor, index: Tensor | slice) -> Tensor:
    """Positions among the E of what belongs to some of the R tokens, in their order."""
    first_r, counts_r = (counts_R.cumsum(0) - counts_R)[index], counts_R[index]
    shift_r = first_r - (counts_r.cumsum(0) - counts_r)
    return torch.arange(int(counts_r.sum())) + torch.repeat_interleave(shift_r, counts_r)


def joined(parts: Sequence[Any]) -> Any:
    """Tensors, or Ragged, end to end; at least one."""
    return Ragged.join(parts) if isinstance(parts[0], Ragged) else torch.cat(list(parts))
