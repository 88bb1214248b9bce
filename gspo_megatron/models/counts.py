"""Parameters and work of a model, from its shape alone."""

from __future__ import annotations

from collections.abc import Callable

from gspo_megatron.models.families import family_of
from gspo_megatron.models.family import ModelShape, ParameterCount


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Parameters by how they are spread over ranks. The vocabulary's size has to be known."""
    return family_of(shape).counts(shape)


def sequence_cost(shape: ModelShape) -> Callable[[int], float]:
    """cost(L) = 2 L W + 2 L (L + 1) / 2 * num_layers * A: forward FLOPs of a sequence of L tokens.

    Matrix products only, two FLOPs a multiply-add. W are the weights that a token is multiplied with: those of every
    layer, and the vocabulary once, since looking an embedding up is free. In attention token t makes A multiply-adds
    for each of t tokens. Every token is taken for one of the response: a prompt token in fact skips the vocabulary. The
    backward pass is twice as much of everything, so ratios hold for both.
    """
    vocabulary, token = count_parameters(shape).vocabulary, family_of(shape).per_token(shape)
    weights = vocabulary + shape.num_layers * token.multiplied
    return lambda length: float(2 * length * weights + length * (length + 1) * shape.num_layers * token.attended)
