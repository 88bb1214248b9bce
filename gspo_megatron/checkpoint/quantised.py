"""Weights that are stored as few bits and scales, multiplied out as they are read, each part from its own bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.stored import StoredTensor

FP8 = "F8_E4M3"
SCALE = "_scale_inv"
"""Added to the name of an FP8 weight: its scales, one for each block of rows and columns."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Added to the name of an MXFP4 weight: its numbers, and a scale for 32 of them."""
METHODS = ("fp8", "mxfp4")
"""Values of quant_method in config.json that are read."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of an FP4 number (E2M1) mean; the fourth is its sign."""


@dataclass(frozen=True)
class BlockScaled:
    """An FP8 matrix times its scales, as a Sliceable of float32 numbers.

    w[i, j] = fp8[i, j] * scale[i // block[0], j // block[1]]

    (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2; the files call the factor weight_scale_inv.)
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        """
        Raises:
            CheckpointError: the two sizes do not fit together.
        """
        size = self.weight.get_shape()
        blocks = [-(-rows // edge) for rows, edge in zip(size, self.block, strict=False)]
        if self.scale.get_shape() != blocks or len(size) != 2:
            raise CheckpointError(
                f"{self.scale.file}: {self.scale.name} has size {self.scale.get_shape()}, but {self.weight.name} "
                f"{size} in blocks of {list(self.block)} has {blocks} of them; download both files again"
            )

    @property
    def dtype(self) -> str:
        return FP8

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.weight, self.scale)

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        """
        Raises:
            CheckpointError: a number that is not finite.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(part, self.get_shape(), strict=True)]
        first = [start // edge for (start, _), edge in zip(bounds, self.block, strict=True)]
        last = [-(-end // edge) for (_, end), edge in zip(bounds, self.block, strict=True)]
        scale = self.scale[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
        rows, columns = (
            torch.arange(start, end) // edge - a
            for (start, end), edge, a in zip(bounds, self.block, first, strict=True)
        )
        numbers = self.weight.mapped[part].float()  # torch computes nothing in FP8
        self.weight.check(numbers)
        return numbers * scale.float()[rows][:, columns]


@dataclass(frozen=True)
class Mxfp4:
    """A layer's experts in MXFP4, as a Sliceable [experts, columns, rows] of bf16 numbers, which hold them exactly.

        w[e, 32 g + 2 b + n, r] = FP4(nibble n of blocks[e, r, g, b]) * 2^(scales[e, r, g] - 127)

    n = 0 is a byte's lower half. Thirty-two neighbours of a row share a scale, 255 is NaN. (OCP Microscaling Formats
    (MX) specification 1.0, sections 5.2 and 5.3; gpt-oss, https://arxiv.org/abs/2508.10925, section 2.1.)
    """

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    def __post_init__(self) -> None:
        """
        Raises:
            CheckpointError: the two are not of these sizes and of bytes.
        """
        size = self.blocks.get_shape()
        if len(size) != 4 or size[3] != 16 or self.blocks.dtype != "U8":
            raise CheckpointError(
                f"{self.blocks.file}: {self.blocks.name} has size {size} and format {self.blocks.dtype}, but MXFP4 has "
                "[experts, rows, groups of 32, 16 bytes] in U8; download the file again"
            )
        if self.scales.get_shape() != size[:3] or self.scales.dtype != "U8":
            raise CheckpointError(
                f"{self.scales.file}: {self.scales.name} has size {self.scales.get_shape()} and format "
                f"{self.scales.dtype}, but {self.blocks.name} {size} has {size[:3]} scales in U8; download both files "
                "again"
            )

    @property
    def dtype(self) -> str:
        return "MXFP4"

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (self.blocks, self.scales)

    def get_shape(self) -> list[int]:
        experts, rows, groups, _ = self.blocks.get_shape()
        return [experts, 32 * groups, rows]

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        """
        Raises:
            CheckpointError: a number that is not finite.
        """
        experts, columns, rows = part
        start, end, _ = columns.indices(self.get_shape()[1])
        groups = slice(start // 32, -(-end // 32))
        packed = self.blocks.mapped[experts, rows, groups].numpy()
        pairs = torch.from_numpy(PAIRS[packed].view(np.int16)).view(torch.bfloat16)
        numbers = pairs * POWERS[self.scales.mapped[experts, rows, groups].int()][..., None]
        self.scales.check(numbers)
        first = 32 * groups.start
        return numbers.flatten(-2)[..., start - first : end - first].transpose(1, 2)


def _pairs() -> np.ndarray[Any, np.dtype[np.uint32]]:
    """For every byte its two numbers in bf16, as one integer."""
    numbers = torch.tensor([sign * number for sign in (1, -1) for number in FP4], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1).view(torch.int16).numpy().view(np.uint32)[:, 0]


PAIRS = _pairs()
POWERS = torch.tensor([2.0 ** (scale - 127) for scale in range(255)] + [math.nan], dtype=torch.bfloat16)
"""What a scale (E8M0) means."""

Weight = StoredTensor | BlockScaled | Mxfp4
"""A tensor of a model, however it is stored: a Sliceable with its number format and the tensors in files."""


class Quantisation:
    """How the weights of a folder are stored, by its config.json.

    Attributes:
        block: rows and columns of an FP8 weight that share a scale.
    """

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        """`config`: the content of `file`.

        Raises:
            CheckpointError: in a way that is not read.
        """
        found = config.get("quantization_config") or {}
        method = found.get("quant_method", METHODS[0]) if isinstance(found, dict) else found
        if method not in METHODS:
            raise CheckpointError(
                f"{file} says that the weights are stored by quant_method={method!r}; readable are "
                f"{' and '.join(METHODS)}, and weights that are not quantised: use such a folder of the model"
            )
        block = found.get("weight_block_size") or [128, 128]
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise CheckpointError(
                f"{file} has weight_block_size={block!r}, expected two numbers such as [128, 128]; use the model's "
                "original file"
            )
        self.block = block[0], block[1]

    def weights(self, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Weight]]:
        """The weights that the tensors of a folder are, by name. One without its scales stays as it is stored.

        Raises:
            CheckpointError: numbers and scales do not fit together.
        """
        for name, stored in tensors.items():
            if stored.dtype == FP8 and (scale := tensors.get(name + SCALE)):
                yield name, BlockScaled(stored, scale, self.block)
            elif name.endswith(BLOCKS) and (scales := tensors.get((base := name.removesuffix(BLOCKS)) + SCALES)):
                yield base, Mxfp4(base, stored, scales)
            elif not _is_scale(name, tensors):
                yield name, stored


def _is_scale(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensor belongs to a quantised one."""
    of_fp8 = name.removesuffix(SCALE)
    if name.endswith(SCALE) and of_fp8 in tensors and tensors[of_fp8].dtype == FP8:
        return True
    return name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors
