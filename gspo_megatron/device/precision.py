"""Number formats of matrix products, as a table: what each requires of sizes and layers, and Megatron's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What one value of precision.fp8 means.

    Attributes:
        row_multiple: tokens of one rank's forward come in multiples of this.
        column_multiple: so do the columns of every rank's shard of a matrix.
        dtypes: values of precision.dtype that it can be combined with.
        layers: rows of mcore.layers.LAYERS that can compute in it.
        megatron: fields of Megatron-Core's TransformerConfig.
    """

    row_multiple: int = 1
    column_multiple: int = 1
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp64")
    layers: tuple[str, ...] = ("local", "te")
    megatron: Mapping[str, Any] = field(default_factory=dict)


def _fp8(name: str) -> Recipe:
    """A recipe of Transformer Engine, whose fp8 matrix products take 16 rows and 16 columns at a time."""
    return Recipe(16, 16, ("bf16",), ("te",), {"fp8": "hybrid", "fp8_recipe": name})


RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    **{name: _fp8(name) for name in ("tensorwise", "blockwise", "delayed")},
}
"""By precision.fp8."""
