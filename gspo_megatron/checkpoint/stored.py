"""A tensor in a safetensors file, of which parts are read and checked.

Formats: https://huggingface.co/docs/safetensors. The library checks each header against its file when it opens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The formats that a weight may have, by safetensors' names."""
BLOCK_BYTES = 1 << 18
"""Read and checked together."""
INTEGERS = {
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}
"""Signed and unsigned integers of the size of a number format, and infinity read as one."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as a Sliceable.

    Attributes:
        dtype: safetensors' name of its number format.
        size: of the whole tensor.
        opened: the library's handle of the file.
        raw: the file itself, and where in it the tensor begins.
        allow_nan: whether NaN and infinity are read like other numbers.
    """

    name: str
    file: Path
    dtype: str
    size: tuple[int, ...]
    opened: Any
    raw: tuple[BinaryIO, int]
    allow_nan: bool = False

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors in files that it is made of."""
        return (self,)

    def get_shape(self) -> list[int]:
        return list(self.size)

    @cached_property
    def mapped(self) -> Tensor:
        """The whole tensor. It is mapped, not read: the system reads the pages that are used."""
        return self.opened.get_tensor(self.name)

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        """
        Raises:
            CheckpointError: a number that is not finite.
        """
        numbers = self.mapped[part]
        self.check(numbers)
        return numbers

    def read_rows(self, start: int, end: int, into: Tensor) -> bool:
        """Sets `into` to whole rows, straight from the file, where it has their format and is host memory without gaps;
        otherwise returns False. A mapped page would cost a fault first, which takes longer than copying it.

        Raises:
            CheckpointError: a number that is not finite, or the file has become shorter.
        """
        if into.device.type != "cpu" or into.dtype != FLOATS.get(self.dtype) or not into.is_contiguous():
            return False
        file, first = self.raw
        numbers = into.detach().view(-1)
        space, finite = numbers.view(torch.uint8).numpy().data, Finite(numbers)
        place = first + start * (into.nbytes // max(1, end - start))
        for at in range(0, len(space), BLOCK_BYTES):
            block = space[at : at + BLOCK_BYTES]
            if os.preadv(file.fileno(), [block], place + at) != len(block):
                raise CheckpointError(f"{self.file}: {self.name} ends early; another process changed the file")
            # At once: the block is still in the processor's cache.
            if not self.allow_nan and not finite(slice(at // into.itemsize, (at + len(block)) // into.itemsize)):
                self.check(numbers)
        return True

    def check(self, numbers: Tensor) -> None:
        """`numbers`: a part of this tensor.

        Raises:
            CheckpointError: one is not finite.
        """
        if not self.allow_nan and not all_finite(numbers):
            bad = numbers[~torch.isfinite(numbers)][0].item()
            raise CheckpointError(
                f"{self.file}: {self.name} holds {bad}; download the file again, or set model.hf_allow_nan=true to use "
                "it as it is"
            )


class Finite:
    """Whether none of a tensor's numbers, or of a part of them, is NaN or infinite.

    Every bit of such a number's exponent is set, so read as an integer it exceeds all finite ones of its sign: positive
    ones as signed integers, negative ones as unsigned. This needs no memory. torch.isfinite needs more than the tensor,
    and in bf16 several times as long as reading it."""

    def __init__(self, numbers: Tensor) -> None:
        signed, unsigned, infinity = INTEGERS[numbers.dtype]
        integers = numbers.view(signed).numpy()
        self._bounds = ((integers, infinity), (integers.view(unsigned), infinity + (1 << 8 * numbers.itemsize - 1)))

    def __call__(self, rows: slice | EllipsisType = ...) -> bool:
        """Of these rows; by default, of all."""
        return all(int(np.maximum.reduce(each[rows], None, initial=0)) < bound for each, bound in self._bounds)


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return Finite(numbers)()


def tensors_of(file: Path, allow_nan: bool) -> Iterable[StoredTensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: it is not a safetensors file, or its header does not fit it.
    """
    try:
        opened = safe_open(file, framework="pt")
        raw = file.open("rb", buffering=0)
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
        for name in opened.keys():  # noqa: SIM118 -- it is not a mapping
            part = opened.get_slice(name)
            place = raw, 8 + length + header[name]["data_offsets"][0]
            yield StoredTensor(name, file, part.get_dtype(), tuple(part.get_shape()), opened, place, allow_nan)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: it is truncated, or not a safetensors file ({error}); download it again"
        ) from error
