"""The policy's whole tensors under their Hugging Face names, one at a time, from any layout and into any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.parameters import is_vocabulary, named_tensors
from gspo_megatron.models.names import (
    HubSize,
    NameRule,
    Sliceable,
    copy_rows,
    read_ours,
    reading_order,
    sizes_on_hub,
    stacked_in,
    to_theirs,
)
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.models.tensors import sizes_of


class Source(NamedTuple):
    """The rank that sends a slice of a tensor, and the slice's size and format."""

    rank: int
    size: tuple[int, ...]
    dtype: torch.dtype


def whole_weights(
    chunks: Sequence[PolicyModel],
    shape: ModelShape,
    groups: Groups,
    rules: Sequence[NameRule],
    *,
    only_to: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name on the hub, whole tensor) of every tensor, the same on every rank and in the same order on every layout.

    Collective: all ranks iterate together, to the end. One rank that holds a slice broadcasts it to all others, so
    every rank receives the model once, and holds one whole tensor and its slices at a time. With `only_to` it sends it
    to that rank, in whose host memory it then is, and the others iterate over nothing. Otherwise a tensor is on the
    rank's device. It is contiguous, without the vocabulary's padding, and may share memory with the policy: copy it to
    keep it beyond the next update.

    Raises:
        ValueError: a tensor has no rule, or several.
    """
    ours = _whole_tensors(chunks, shape, groups, only_to)
    yield from ((name, part.contiguous()) for name, part in to_theirs(rules, ours, shape))


def _whole_tensors(
    chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups, only_to: int | None
) -> Iterator[tuple[str, Tensor]]:
    """The same by our names."""
    held = _held(chunks, shape, groups)
    sources = _sources(held, groups)
    for first in _in_order(sources):
        places = [replace(first, index=i) for i in range(first.count)]
        if only_to in (None, dist.get_rank()):
            slices = [_received(held.get(place), sources[place], groups, only_to) for place in places]
        else:
            for place in places:
                _send(held.get(place), sources[place], only_to)
            continue
        whole = first.join(slices) if first.count > 1 else slices[0]
        del slices
        if is_vocabulary(first.name):
            whole = whole[: shape.vocab_size]
        # Who wants them alone writes them, and a layer's stacked experts would not fit beside the model on its device.
        yield first.name, whole if only_to is None else whole.cpu()
        del whole


def whole_sizes(
    chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups, rules: Sequence[NameRule]
) -> dict[str, HubSize]:
    """The size of every tensor that `whole_weights` yields, by its name and in that order. Collective."""
    sources = _sources(_held(chunks, shape, groups), groups)

    def ours() -> Iterator[tuple[str, list[int]]]:
        for first in _in_order(sources):
            size = list(sources[first].size)
            size[first.dim] *= first.count
            if is_vocabulary(first.name):
                size[0] = shape.vocab_size or 0
            yield first.name, size

    return sizes_on_hub(rules, ours(), shape)


@torch.no_grad()
def load_weights(
    chunks: Sequence[PolicyModel],
    shape: ModelShape,
    groups: Groups,
    rules: Sequence[NameRule],
    read: Callable[[str], Sliceable],
) -> None:
    """Sets every tensor of this rank from tensors on the hub, the inverse of `whole_weights`. `read` finds one by its
    name; only the slice that this rank holds is read of it. Not collective.

    Raises:
        CheckpointError: a tensor has another size than in this model.
        ValueError: a tensor has no rule, or several.
    """
    for chunk in chunks:
        for place, tensor in named_tensors(chunk, shape, groups):
            rule, theirs = read_ours(rules, place.name, read)
            _check_sizes(rule, place.name, theirs, shape)
            if is_vocabulary(place.name):
                _copy_vocabulary(theirs[0], place, tensor)
                continue
            slicing = {"dim": place.dim, "index": place.index, "count": place.count}
            if not stacked_in(rule.op, theirs, tensor, shape, **slicing):
                tensor.copy_(rule.op.to_our_slice(theirs, shape, **slicing))


def _check_sizes(rule: NameRule, ours: str, theirs: Sequence[Sliceable], shape: ModelShape) -> None:
    names = rule.their_names(ours)
    assert names is not None, "the rule was found by this name"
    for name, x, size in zip(names, theirs, sizes_of(rule, shape), strict=True):
        wanted = list(size[1:] if rule.stacks_experts else size)
        if x.get_shape() != wanted:
            raise CheckpointError(
                f"{name} has size {x.get_shape()}, but a model of these settings has {wanted}; the settings of section "
                "model must be those of the weights"
            )


def _copy_vocabulary(theirs: Sliceable, place: Place, tensor: Tensor) -> None:
    """This rank's rows, zeros where they pad the vocabulary."""
    rows, columns = theirs.get_shape()
    start, end = (min(bound * len(tensor), rows) for bound in (place.index, place.index + 1))
    copy_rows(theirs, (slice(start, end), slice(0, columns)), tensor[: end - start])
    tensor[end - start :] = 0


def _held(chunks: Sequence[PolicyModel], shape: ModelShape, groups: Groups) -> dict[Place, Tensor]:
    return {place: p.detach() for chunk in chunks for place, p in named_tensors(chunk, shape, groups)}


def _in_order(sources: Mapping[Place, Source]) -> list[Place]:
    """The first slice of every tensor."""
    return sorted((place for place in sources if place.index == 0), key=lambda place: reading_order(place.name))


def _sources(held: Mapping[Place, Tensor], groups: Groups) -> dict[Place, Source]:
    """The source of every slice of the model, from what all ranks hold."""
    mine = sources_of(held, groups)
    if dist.get_world_size() == 1:
        return mine
    told: list[dict[Place, Source]] = [{}] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    # Of several ranks that list the same slice, the lowest sends it.
    return {place: source for theirs in reversed(told) for place, source in theirs.items()}


def sources_of(held: Mapping[Place, Tensor], groups: Groups) -> dict[Place, Source]:
    """The slices that this rank lists as their source."""
    rank = dist.get_rank()
    return {place: Source(rank, tuple(p.shape), p.dtype) for place, p in held.items() if _is_first(place, groups)}


def _is_first(place: Place, groups: Groups) -> bool:
    """Whether this rank lists a slice for all ranks that hold it; otherwise most of the lists would be duplicates."""
    if ".experts." in place.name:
        return groups.collection.expt_dp.rank() == 0
    return groups.collection.dp_cp.rank() == 0 and (place.count > 1 or groups.tp_rank == 0)


def _received(own: Tensor | None, source: Source, groups: Groups, only_to: int | None) -> Tensor:
    """The slice as its source holds it, on all ranks, or on the one it is `only_to`."""
    mine = dist.get_rank() == source.rank
    assert own is not None or not mine, "a source holds what it lists"
    if own is None or not mine:
        own = torch.empty(source.size, dtype=source.dtype, device=groups.device)
    own = own.contiguous()
    if only_to is None and dist.get_world_size() > 1:
        dist.broadcast(own, src=source.rank)
    elif not mine:
        _exchange(dist.irecv, own, source.rank)
    return own


def _send(own: Tensor | None, source: Source, to: int) -> None:
    """The slice to the rank that wants it, if this rank is its source."""
    if own is not None and dist.get_rank() == source.rank:
        _exchange(dist.isend, own.contiguous(), to)


def _exchange(operation: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    """In a batch, since NCCL otherwise makes a communicator for every pair of ranks."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()
