"""Checks that the copies of a parameter are bit-identical on all ranks that hold them.

Copies are equal when weights are drawn or loaded, and stay equal because every rank applies the same update. Nothing in
a step compares them: a rank whose memory or arithmetic failed would go on training unnoticed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.checkpoint.place import Place
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.parameters import is_vocabulary, named_tensors
from gspo_megatron.models.shape import ModelShape

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type for an element size in bytes."""
CHUNK = 1 << 22
"""Elements that are converted to int64 at a time."""


def differing_replicas(chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups) -> list[str]:
    """See `Policy.differing_replicas`. A few small collectives, whatever the size of the model."""
    held = [pair for chunk in chunks for pair in named_tensors(chunk, shape, groups)]
    sums = {place: fingerprint(parameter.detach()) for place, parameter in held}
    dense = [place for place in sums if ".experts." not in place.name]
    experts = [place for place in sums if ".experts." in place.name]
    differing = {
        *_differing(groups.collection.dp_cp, sums, dense),
        # Tensor-parallel ranks hold copies of what is not split over them.
        *_differing(groups.tp, sums, [place for place in dense if place.count == 1]),
        *_differing(groups.collection.expt_dp, sums, experts),
    }
    if shape.tie_embeddings and groups.layout.pp > 1 and (groups.is_first_stage or groups.is_last_stage):
        differing |= {*_differing(groups.collection.embd, sums, [p for p in dense if is_vocabulary(p.name)])}
    if not groups.any_rank(bool(differing)):
        return []
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, [(place, tuple(sums[place].tolist())) for place in sums if place in differing])
    return _named(heard)


def fingerprint(parameter: Tensor) -> Tensor:
    """[sum_i b_i, sum_i i b_i] modulo 2^64, where b_i are the bits of element i, read as an integer.

    Any change of one element shows in the first sum, a swap of two in the second.
    """
    bits = parameter.contiguous().view(-1).view(BITS[parameter.element_size()])
    index = torch.arange(min(CHUNK, bits.numel()), device=bits.device)
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        plain = part.sum()
        total += torch.stack([plain, start * plain + (part * index[: part.numel()]).sum()])
    return total


def _differing(group: dist.ProcessGroup, sums: Mapping[Place, Tensor], places: Sequence[Place]) -> list[Place]:
    """Those of `places` whose sums are not the same on all ranks of `group`."""
    if group.size() == 1 or not places:
        return []
    mine = torch.stack([sums[place] for place in places])
    # ~x = -x - 1 is largest where x is smallest.
    most = torch.stack([mine, ~mine])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    differs = (most[0] != ~most[1]).any(dim=1).tolist()
    return [place for place, differ in zip(places, differs, strict=True) if differ]


def _named(heard: Sequence[Sequence[tuple[Place, tuple[int, int]]]]) -> list[str]:
    """A line per differing parameter: its ranks, grouped by equal copies, the largest group first."""
    ranks: dict[Place, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, brought in enumerate(heard):
        for place, sums in brought:
            ranks[place][sums].append(rank)
    return [
        f"{place.name} on ranks "
        + " | ".join(", ".join(map(str, same)) for same in sorted(by_sums.values(), key=len, reverse=True))
        for place, by_sums in ranks.items()
    ]
