"""The tensors of a model on the hub, from its shape and its family's rules alone: their names and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from gspo_megatron.models.names import NameRule
from gspo_megatron.models.shape import ModelShape


def hub_tensors(rules: Sequence[NameRule], shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor on the hub, by name. `shape.vocab_size` must be known."""
    found: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        if every := list(names_on_hub(rule, shape)):
            sizes = sizes_of(rule, shape)
            for names in every:
                found |= zip(names, sizes, strict=True)
    return found


def names_on_hub(rule: NameRule, shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """The rule's names, for every layer and expert that has them."""
    if "{layer}" not in rule.theirs[0]:
        if rule.present(shape, 0):
            yield rule.theirs
        return
    experts = range(shape.num_experts if "{expert}" in rule.theirs[0] else 1)
    for layer in range(shape.num_layers):
        if rule.present(shape, layer):
            for expert in experts:
                yield tuple(name.format(layer=layer, expert=expert) for name in rule.theirs)


@cache
def sizes_of(rule: NameRule, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """The sizes of the tensors on the hub that the rule names, in its order, in a model that has them."""
    theirs = rule.op.to_theirs(torch.empty(rule.size(shape), device="meta"), shape)
    stack = (shape.num_experts,) if rule.stacks_experts else ()
    return tuple((*stack, *part.shape) for part in theirs)
