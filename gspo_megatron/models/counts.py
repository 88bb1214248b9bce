"""Parameter counts and FLOPs of a model, from its shape alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gspo_megatron.models.families import family_of
from gspo_megatron.models.family import ParameterCount
from gspo_megatron.models.shape import ModelShape


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Parameters by how they are sharded. `shape.vocab_size` must be known."""
    return family_of(shape).counts(shape)


def sequence_cost(shape: ModelShape) -> Callable[[int], float]:
    """cost(L) = 2 L W + sum over layers of 2 P(L) A: forward FLOPs of a sequence of L tokens.

    Matrix products only, two FLOPs per multiply-add. W counts the weights that a token is multiplied with: those of
    every layer, and the vocabulary once, since an embedding lookup is free. In attention, a token makes A multiply-adds
    for each of the tokens that it attends to: P(L) = L (L + 1) / 2 pairs, fewer with a window. Every token is counted
    as a response token, although prompt tokens skip the vocabulary. The backward pass costs twice as much throughout,
    so ratios hold for both.
    """
    tokens = family_of(shape).per_token(shape)
    weights = count_parameters(shape).vocabulary + sum(token.multiplied for token in tokens)
    kinds = Counter(tokens)
    return lambda length: float(
        2 * length * weights + sum(2 * number * token.pairs(length) * token.attended for token, number in kinds.items())
    )
