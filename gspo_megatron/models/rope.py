"""Rotary position embedding: the angle by which each pair of dimensions turns from one position to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_megatron.models.shape import OPTIONAL, ModelShape


class Rope(NamedTuple):
    """Pair i of D / 2 turns by p * inverse_D2[i] at position p, and is then multiplied by `factor`. Attention scores
    are multiplied by `score_factor` on top of 1 / sqrt(head dimension). `inverse_D2` is float64."""

    inverse_D2: Tensor
    factor: float = 1.0
    score_factor: float = 1.0


def plain(shape: ModelShape) -> Rope:
    """inverse_i = base^(-2i / D). arXiv 2104.09864, Eq. 15."""
    exponents = torch.arange(0, shape.rope_dim, 2, dtype=torch.float64) / shape.rope_dim
    return Rope(shape.rope_base**-exponents)


def yarn(shape: ModelShape) -> Rope:
    """YaRN, arXiv 2309.00071, Eq. 23 to 25: pairs that turn often within the original length keep their frequency,
    those that turn seldom have it divided by s = rope_scaling_factor, and between them it is interpolated.

    The pair that turns n times has index i(n) = D log(length / (2 pi n)) / (2 log base). With low = floor(i(beta_fast))
    and high = ceil(i(beta_slow)), the share of the divided frequency rises from 0 at low to 1 at high; without
    rope_truncate, low and high are not rounded. Cosines and sines are multiplied by g(mscale) / g(mscale_all_dim),
    scores by g(mscale_all_dim)^2, where g(m) = 0.1 m log(s) + 1 (DeepSeek-V3's form; with both at 0, by g(1) and 1).
    """
    s, dim, plain_D2 = shape.rope_scaling_factor, shape.rope_dim, plain(shape).inverse_D2

    def index(turns: float) -> float:
        return dim * math.log(shape.rope_original_length / (2 * math.pi * turns)) / (2 * math.log(shape.rope_base))

    def g(m: float) -> float:
        return 0.1 * m * math.log(s) + 1 if s > 1 else 1.0

    low, high = index(shape.rope_beta_fast), index(shape.rope_beta_slow)
    if shape.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    share_D2 = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    m, m_all = shape.rope_mscale, shape.rope_mscale_all_dim
    return Rope(
        plain_D2 / s * share_D2 + plain_D2 * (1 - share_D2),
        factor=g(m) / g(m_all) if m and m_all else g(1.0),
        score_factor=g(m_all) ** 2 if m_all else 1.0,
    )


SCALINGS: dict[str, Callable[[ModelShape], Rope]] = {"none": plain, "yarn": yarn}


def rope_of(shape: ModelShape) -> Rope:
    """The row that `shape.rope_scaling` names."""
    return SCALINGS[shape.rope_scaling](shape)


def beyond_trained_length(shape: ModelShape, published: int) -> str | None:
    """What is wrong with sequences longer than a model was trained for; None: they are not. `published` is the length
    of its config.json; with YaRN the model reaches rope_original_length times the factor."""
    length, reach = shape.max_sequence_length, published
    if shape.rope_scaling == "yarn":
        reach = int(shape.rope_original_length * shape.rope_scaling_factor)
    if length <= reach:
        return None
    # Of the slowest pair of dimensions, by how far it turns within the trained length.
    slowest = float(plain(shape).inverse_D2[-1])
    return (
        f"model.max_sequence_length={length} exceeds the {reach:,} tokens that the published weights were trained for: "
        f"past them RoPE turns pairs of dimensions to angles that the model has not seen (the slowest by "
        f"{length * slowest:.2g} rad, {reach * slowest:.2g} in training); shorten prompts and responses, or use "
        "weights that were trained longer"
    )


def rope_complaints(shape: ModelShape) -> Iterator[str]:
    """Settings of the rotation that do not fit together, and what to do."""
    if shape.rope_dim % 2:
        name = "qk_rope_head_dim" if shape.qk_rope_head_dim else "head_dim"
        part = f" * model.partial_rotary_factor={shape.partial_rotary_factor}" * (shape.partial_rotary_factor != 1)
        yield f"model.{name}={getattr(shape, name)}{part} must be even: RoPE rotates pairs"
    if shape.rope_scaling == "none":
        for name in OPTIONAL:
            value = getattr(shape, name)
            if name.startswith("rope_") and value != OPTIONAL[name]:
                yield f"model.{name}={value} has no effect with model.rope_scaling=none; set model.rope_scaling=yarn"
    elif shape.rope_scaling_factor < 1 or shape.rope_original_length < 1:
        yield (
            f"model.rope_scaling={shape.rope_scaling} needs model.rope_scaling_factor of at least 1 and the trained "
            f"length, model.rope_original_length; they are {shape.rope_scaling_factor} and {shape.rope_original_length}"
        )
