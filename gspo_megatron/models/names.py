"""Names and layouts of tensors, here and on the Hugging Face hub: rules with invertible operations.

    rule = NameRule("decoder.layers.{layer}.self_attention.linear_proj.weight",
                    ("model.layers.{layer}.self_attn.o_proj.weight",))

Our names are those of `mcore.parameters.global_name`: Megatron-Core's local layer spec, with layers and experts
numbered over the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gspo_megatron.models.shape import ModelShape


class Op(Protocol):
    """One of our whole tensors <-> the tensors on the hub with the same numbers. `to_ours` and `to_theirs` are each
    other's inverse."""

    gives_views: ClassVar[bool] = False
    """Whether `to_theirs` returns views of any slice of ours, which are the same slices of theirs."""

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        """In the order of the rule's names; may be views of `ours`."""

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        """The inverse."""

    def to_our_slice(
        self, theirs: Sequence[Sliceable], shape: ModelShape, *, dim: int = 0, index: int = 0, count: int = 1
    ) -> Tensor:
        """Slice `index` of `count` along `dim` of ours, from the same slice of each of theirs: cutting and `to_ours`
        commute, since tensor parallel cuts between query groups, and gate and up each into parts."""
        heads, groups = shape.num_attention_heads // count, shape.num_query_groups // count
        of_slice = replace(shape, num_attention_heads=heads, num_query_groups=groups) if dim == 0 else shape
        return self.to_ours([_part(x, dim, index, count) for x in theirs], of_slice)


@dataclass(frozen=True)
class Copy(Op):
    """The same tensor."""

    gives_views = True

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        return (ours,)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        [whole] = theirs
        return whole


@dataclass(frozen=True)
class QKV(Op):
    """[q_1 .. q_n, k, v] for each query group, one group after the other <-> all queries, all keys, all values.

    Each block has head_dim rows; n = num_attention_heads / num_query_groups. Weights [rows, H] and biases [rows].
    """

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        groups, d = shape.num_query_groups, shape.head_dim
        by_group = ours.unflatten(0, (groups, -1))
        parts = by_group.split([shape.num_attention_heads // groups * d, d, d], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        by_group = [part.unflatten(0, (shape.num_query_groups, -1)) for part in theirs]
        return torch.cat(by_group, dim=1).flatten(0, 1)


@dataclass(frozen=True)
class GatedQKV(Op):
    """[q_1 .. q_n, gate_1 .. gate_n, k, v] for each query group, one group after the other <-> each head's [q, gate],
    all keys, all values. Blocks and n as in QKV."""

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        groups, d = shape.num_query_groups, shape.head_dim
        by_group = ours.unflatten(0, (groups, -1, d))
        n = shape.num_attention_heads // groups
        query, gate, key, value = by_group.split([n, n, 1, 1], dim=1)
        queries = torch.stack([query, gate], dim=2)
        return queries.flatten(0, 3), key.flatten(0, 2), value.flatten(0, 2)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        queries, *others = theirs
        groups, d = shape.num_query_groups, shape.head_dim
        query, gate = queries.unflatten(0, (groups, -1, 2, d)).unbind(dim=2)
        key, value = (x.unflatten(0, (groups, 1, d)) for x in others)
        return torch.cat([query, gate, key, value], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class KeyHeadChannels(Op):
    """[q, k, v_1 .. v_r] for each key head of a gated delta net, one after the other <-> all queries, all keys, all
    values, stacked by rows in one tensor; r = value heads / key heads."""

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        heads, d = shape.linear_num_key_heads, shape.linear_key_head_dim
        values = shape.linear_num_value_heads // heads * shape.linear_value_head_dim
        parts = ours.unflatten(0, (heads, -1)).split([d, d, values], dim=1)
        return (torch.cat([part.flatten(0, 1) for part in parts]),)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        [whole] = theirs
        heads, keys = shape.linear_num_key_heads, shape.linear_num_key_heads * shape.linear_key_head_dim
        parts = whole.split([keys, keys, len(whole) - 2 * keys])
        return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_our_slice(
        self, theirs: Sequence[Sliceable], shape: ModelShape, *, dim: int = 0, index: int = 0, count: int = 1
    ) -> Tensor:
        """From the whole of theirs: a slice of theirs has other channels than one of ours."""
        return self.to_ours([_part(x, dim, 0, 1) for x in theirs], shape).chunk(count, dim)[index]


@dataclass(frozen=True)
class GateUp(Op):
    """[gate; up], stacked by rows <-> gate, up."""

    gives_views = True

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        return ours.chunk(2)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        return torch.cat(list(theirs))


@dataclass(frozen=True)
class Transpose(Op):
    """The transposed matrix."""

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        return (ours.t(),)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        [whole] = theirs
        return whole.t()


@dataclass(frozen=True)
class InterleavedGateUp(Op):
    """[gate; up], stacked by rows <-> rows of gate and up in turns, as columns of a matrix. Weights [rows, H] <->
    [H, rows] and biases [rows]. The parts that tensor parallel makes do not commute with it."""

    def to_theirs(self, ours: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
        rows = torch.stack(ours.chunk(2), dim=1).flatten(0, 1)
        return (rows.t(),)

    def to_ours(self, theirs: Sequence[Tensor], shape: ModelShape) -> Tensor:
        [whole] = theirs
        return torch.cat([whole.t()[0::2], whole.t()[1::2]])


COPY = Copy()
BLOCK_BYTES = 1 << 18
"""Read, checked and copied together."""


class Sliceable(Protocol):
    """A tensor of which parts can be read, such as safetensors' `get_slice(name)`."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor: ...


@runtime_checkable
class RowReader(Sliceable, Protocol):
    """A Sliceable that can read whole rows to where they belong."""

    def read_rows(self, start: int, end: int, into: Tensor) -> bool:
        """Sets `into`, or returns False where it is not such memory."""


@dataclass(frozen=True)
class InMemory:
    """A tensor as a Sliceable."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        return self.tensor[part]


@dataclass(frozen=True)
class RowOf:
    """Row `index` of a Sliceable."""

    whole: Sliceable
    index: int

    def get_shape(self) -> list[int]:
        return list(self.whole.get_shape()[1:])

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        row = (slice(self.index, self.index + 1),)
        return self.whole[row + part].squeeze(0)


@dataclass(frozen=True)
class NameRule:
    """`ours` and `theirs` are names in which {layer} and {expert} stand for indices in the whole model. Where only ours
    has {expert}, theirs is a stack of all experts of a layer, and `op` is of one of them. `float32`: the tensor has
    that format on the hub, whatever the others have. `size`: of our whole tensor. `present`: whether a model has it, in
    the layer of this number."""

    ours: str
    theirs: tuple[str, ...]
    op: Op = COPY
    float32: bool = False
    size: Callable[[ModelShape], tuple[int, ...]] = field(kw_only=True)
    present: Callable[[ModelShape, int], bool] = field(default=lambda shape, layer: True, kw_only=True)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.ours)))

    @property
    def stacks_experts(self) -> bool:
        """Whether the tensors on the hub are of all experts of a layer."""
        return "{expert}" in self.ours and "{expert}" not in self.theirs[0]

    def expert(self, ours: str) -> int:
        """The index of the expert whose tensor `ours` is; the rule matches it."""
        match = self._pattern.fullmatch(ours)
        assert match is not None
        return int(match["expert"])

    def their_names(self, ours: str) -> tuple[str, ...] | None:
        """The names on the hub for our tensor `ours`; None where the rule does not match."""
        match = self._pattern.fullmatch(ours)
        return match and tuple(name.format(**match.groupdict()) for name in self.theirs)


def _part(x: Sliceable, dim: int, index: int, count: int) -> Tensor:
    return x[_cut(x.get_shape(), dim, index, count)]


def _cut(sizes: Sequence[int], dim: int, index: int, count: int) -> tuple[slice, ...]:
    step = sizes[dim] // count
    return tuple(
        slice(index * step, (index + 1) * step) if i == dim else slice(0, size) for i, size in enumerate(sizes)
    )


def stacked_in(
    op: Op,
    theirs: Sequence[Sliceable],
    ours: Tensor,
    shape: ModelShape,
    *,
    dim: int = 0,
    index: int = 0,
    count: int = 1,
) -> bool:
    """Sets `ours` to what `op.to_our_slice` would return, where each of theirs is a part of it, without putting them
    together elsewhere first. Otherwise, or where a size differs, returns False and leaves `ours` alone."""
    views = op.to_theirs(ours, shape) if op.gives_views else ()
    cuts = [_cut(x.get_shape(), dim, index, count) for x in theirs]
    if [list(view.shape) for view in views] != [[part.stop - part.start for part in cut] for cut in cuts]:
        return False
    for x, cut, view in zip(theirs, cuts, views, strict=True):
        copy_rows(x, cut, view)
    return True


def copy_rows(x: Sliceable, part: tuple[slice, ...], into: Tensor) -> None:
    """Sets `into` to x[part], whose slices have both bounds, in blocks of rows that stay in a processor's cache between
    what is done to them, where `x` does not read whole rows itself."""
    rows, *rest = part
    whole_rows = rest == [slice(0, size) for size in x.get_shape()[1:]]
    if whole_rows and isinstance(x, RowReader) and x.read_rows(rows.start, rows.stop, into):
        return
    step = max(1, BLOCK_BYTES // max(1, into[:1].nbytes))
    for start in range(rows.start, rows.stop, step):
        end = min(start + step, rows.stop)
        block = (slice(start, end), *rest)
        into[start - rows.start : end - rows.start].copy_(x[block])


def find_rule(rules: Sequence[NameRule], ours: str) -> tuple[NameRule, tuple[str, ...]]:
    """The rule that matches our tensor `ours`, and its names on the hub.

    Raises:
        ValueError: not exactly one rule matches.
    """
    found = [(rule, names) for rule in rules if (names := rule.their_names(ours)) is not None]
    if len(found) != 1:
        raise ValueError(f"{len(found)} name rules match {ours!r}, not one; fix the family's rules in models/")
    return found[0]


def reading_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def to_theirs(
    rules: Sequence[NameRule], ours: Iterable[tuple[str, Tensor]], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """Our whole tensors, by name, as those on the hub. Experts that are stacked there are copied into the stack as they
    come.

    Raises:
        ValueError: not exactly one rule matches a tensor.
    """
    stacks: dict[str, tuple[Tensor, set[int]]] = {}
    for our_name, whole in ours:
        rule, names = find_rule(rules, our_name)
        for name, part in zip(names, rule.op.to_theirs(whole, shape), strict=True):
            if not rule.stacks_experts:
                yield name, part
                continue
            if name not in stacks:
                stacks[name] = part.new_empty(shape.num_experts, *part.shape), set()
            stack, there = stacks[name]
            stack[rule.expert(our_name)] = part
            there.add(rule.expert(our_name))
            if len(there) == shape.num_experts:
                yield name, stacks.pop(name)[0]


class HubSize(NamedTuple):
    """Of a whole tensor on the hub. `float32`: it has that format there, whatever the others have."""

    shape: tuple[int, ...]
    float32: bool


def sizes_on_hub(
    rules: Sequence[NameRule], ours: Iterable[tuple[str, Sequence[int]]], shape: ModelShape
) -> dict[str, HubSize]:
    """What `to_theirs` makes of our whole tensors of these sizes, by name and in that order.

    Raises:
        ValueError: not exactly one rule matches a tensor.
    """
    marks = {True: torch.float32, False: torch.bfloat16}  # ops keep the format, which tells the two kinds apart
    empty = (
        (name, torch.empty(tuple(size), dtype=marks[find_rule(rules, name)[0].float32], device="meta"))
        for name, size in ours
    )
    theirs = to_theirs(rules, empty, shape)
    return {name: HubSize(tuple(part.shape), part.dtype == marks[True]) for name, part in theirs}


def read_ours(
    rules: Sequence[NameRule], ours: str, read: Callable[[str], Sliceable]
) -> tuple[NameRule, list[Sliceable]]:
    """The rule of our tensor `ours`, and the tensors on the hub, which `read` finds by name, that its op takes.

    Raises:
        ValueError: not exactly one rule matches.
    """
    rule, names = find_rule(rules, ours)
    theirs = [read(name) for name in names]
    return rule, [RowOf(x, rule.expert(ours)) for x in theirs] if rule.stacks_experts else theirs
