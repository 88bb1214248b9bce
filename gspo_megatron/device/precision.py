"""Number formats of matrix products, as a table: what each requires of sizes, layers and the GPU, and Megatron's
settings. docs/precision.md explains the rows.

Embedding, router, output head, log-probs and the parameters themselves stay in precision.dtype or float32 under every
recipe: only the matrix products of attention and experts are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol


@dataclass(frozen=True)
class Recipe:
    """What one value of precision.fp8 means.

    Attributes:
        help: how numbers are scaled, in one sentence.
        row_multiple: tokens of one rank's forward come in multiples of this.
        gathered_row_multiple: with sequence parallel, so do the tokens of every tensor-parallel rank, whose shares are
            gathered before a product; a smaller multiple would be gathered in bf16.
        column_multiple: so do the columns of every rank's shard of a matrix.
        dtypes: values of precision.dtype that it can be combined with.
        layers: rows of mcore.layers.LAYERS that can compute in it.
        capability, capability_below: compute capabilities of the GPUs that have it, from the first up to, not
            including, the second.
        why_below: why not from the second on, where that is not the hardware.
        cuda: the oldest CUDA whose libraries have it, as torch was built.
        transformer_engine: the oldest version of it that Megatron-Core asks for the recipe.
        environment: variables that Transformer Engine reads when it is imported.
        trained_copy_bytes: bytes that Transformer Engine keeps for every weight of the policy beside the weight: FP8
            copies by rows, for the forward, and by columns, for the backward.
        frozen_copy_bytes: the same of a model without backward, such as the reference.
        megatron: fields of Megatron-Core's TransformerConfig.
    """

    help: str
    row_multiple: int = 1
    gathered_row_multiple: int = 1
    column_multiple: int = 1
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp64")
    layers: tuple[str, ...] = ("local", "te")
    capability: tuple[int, int] = (0, 0)
    capability_below: tuple[int, int] | None = None
    why_below: str = ""
    cuda: tuple[int, int] = (0, 0)
    transformer_engine: tuple[int, int] = (0, 0)
    environment: Mapping[str, str] = field(default_factory=dict)
    trained_copy_bytes: float = 0.0
    frozen_copy_bytes: float = 0.0
    megatron: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantizes(self) -> bool:
        return bool(self.megatron)


_FP8 = Recipe(
    "Of Transformer Engine: matrix products of 16 rows and columns at a time, on Hopper and newer.",
    row_multiple=16,
    gathered_row_multiple=16,
    column_multiple=16,
    dtypes=("bf16",),
    layers=("te",),
    capability=(9, 0),
    trained_copy_bytes=2,
    frozen_copy_bytes=1,
)

RECIPES: dict[str, Recipe] = {
    "none": Recipe("Matrix products in precision.dtype."),
    "blockwise": replace(
        _FP8,
        help="E4M3 in both passes; a float32 scale for every 128 numbers of a row, for every 128 x 128 weights.",
        gathered_row_multiple=128,
        # cuBLAS has these products for Hopper alone. From Blackwell on Transformer Engine (2.20) hands the numbers to
        # MXFP8 products with the exponents of the scales (swizzle_block_scaling.cu), which is right only for scales
        # that are powers of two, and these are not.
        capability_below=(10, 0),
        why_below="Transformer Engine emulates it there by MXFP8, which would drop the mantissas of its scales",
        cuda=(12, 9),
        transformer_engine=(2, 3),
        environment={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"},
        megatron={"fp8": "e4m3", "fp8_recipe": "blockwise"},
    ),
    "mxfp8": replace(
        _FP8,
        help="E4M3 in both passes; a power-of-two scale for every 32 numbers, in Blackwell's hardware.",
        row_multiple=32,
        gathered_row_multiple=32,
        column_multiple=32,
        capability=(10, 0),
        capability_below=(12, 0),
        cuda=(12, 8),
        transformer_engine=(2, 1),
        # A byte of scale for every 32 numbers, in each copy.
        trained_copy_bytes=2 + 2 / 32,
        frozen_copy_bytes=1 + 1 / 32,
        megatron={"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    ),
    "tensorwise": replace(
        _FP8,
        help="E4M3 forward, E5M2 gradients; one scale for a whole tensor, from its present maximum.",
        transformer_engine=(2, 2),
        megatron={"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    ),
}
"""By precision.fp8, the recommended one first."""


class PrecisionSettings(Protocol):
    """The settings of section `precision` that decide about layers."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def fp8(self) -> str: ...
    @property
    def transformer_engine(self) -> str: ...


def expects_te_layers(settings: PrecisionSettings) -> bool:
    """Whether a run with these settings is planned with Transformer Engine's layers: unless they say otherwise, every
    bf16 run on GPUs is."""
    auto = settings.transformer_engine == "auto" and settings.device != "cpu" and settings.dtype == "bf16"
    return settings.transformer_engine == "on" or auto or "local" not in RECIPES[settings.fp8].layers
