"""The weights of a Hugging Face folder, read slice by slice.

    folder = HuggingFaceFolder("/models/Qwen3-30B-A3B")
    rows = folder.read("lm_head.weight")[0:1000, :]     # only these bytes are read

Files are safetensors (https://huggingface.co/docs/safetensors): one model.safetensors, or several that
model.safetensors.index.json lists. The library checks each header against its file when it opens it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError, did_you_mean
from gspo_megatron.models.names import Sliceable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the formats that a weight may have."""
FP8 = "F8_E4M3"
SCALE = "_scale_inv"
"""Added to the name of an FP8 weight: its scales, one for each block of rows and columns."""
INTEGERS = {
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.float32: (torch.int32, np.uint32, 0x7F800000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0000000000000),
}
"""Signed and unsigned integers of the size of a number format, and infinity read as one."""
LAYER = re.compile(r"model\.layers\.(\d+)\.")
COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of older files that are computed, not read."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as a Sliceable.

    Attributes:
        dtype: safetensors' name of its number format.
        size: of the whole tensor.
        opened: the library's handle of the file.
        allow_nan: whether NaN and infinity are read like other numbers.
    """

    name: str
    file: Path
    dtype: str
    size: tuple[int, ...]
    opened: Any
    allow_nan: bool = False

    def get_shape(self) -> list[int]:
        return list(self.size)

    @cached_property
    def _mapped(self) -> Tensor:
        """The whole tensor. It is mapped, not read: the system reads the pages that are used."""
        return self.opened.get_tensor(self.name)

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        """
        Raises:
            CheckpointError: a number that is not finite.
        """
        numbers = self._mapped[part]
        if self.dtype == FP8:
            numbers = numbers.float()  # torch computes nothing in FP8
        if not self.allow_nan and not all_finite(numbers):
            bad = numbers[~torch.isfinite(numbers)][0].item()
            raise CheckpointError(
                f"{self.file}: {self.name} holds {bad}; download the file again, or set model.hf_allow_nan=true to use "
                "it as it is"
            )
        return numbers


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    Every bit of such a number's exponent is set, so read as an integer it exceeds all finite ones of its sign: positive
    ones as signed integers, negative ones as unsigned. This needs no memory. torch.isfinite needs more than the tensor,
    and in bf16 several times as long as reading it."""
    signed, unsigned, infinity = INTEGERS[numbers.dtype]
    integers = numbers.view(signed).numpy()
    bounds = ((integers, infinity), (integers.view(unsigned), infinity + (1 << 8 * numbers.itemsize - 1)))
    return all(int(each.max(initial=0)) < bound for each, bound in bounds)


@dataclass(frozen=True)
class Dequantised:
    """An FP8 matrix times its scales, as a Sliceable of float32 numbers.

    w[i, j] = fp8[i, j] * scale[i // block[0], j // block[1]]

    (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2; the files call the factor weight_scale_inv.)
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        bounds = [cut.indices(size)[:2] for cut, size in zip(part, self.get_shape(), strict=True)]
        first = [start // edge for (start, _), edge in zip(bounds, self.block, strict=True)]
        last = [-(-end // edge) for (_, end), edge in zip(bounds, self.block, strict=True)]
        scale = self.scale[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
        rows, columns = (
            torch.arange(start, end) // edge - a
            for (start, end), edge, a in zip(bounds, self.block, first, strict=True)
        )
        return self.weight[part] * scale.float()[rows][:, columns]


class HuggingFaceFolder:
    """config.json and the tensors of a folder.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: every stored tensor by its name, scales of FP8 weights included.

    Raises:
        CheckpointError: a file that is missing, damaged or not what it says; weights in another format.
    """

    def __init__(self, path: str | Path, *, allow_nan: bool = False) -> None:
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.tensors = {tensor.name: tensor for file in self._files() for tensor in _tensors_of(file, allow_nan)}
        self._check_index()
        self._read: set[str] = set()
        self._block = self._block_size()

    def read(self, name: str) -> Sliceable:
        """A tensor that is a weight; one in FP8 is multiplied by its scales.

        Raises:
            CheckpointError: it is missing, or has a format that is not a weight's.
        """
        if name not in self.tensors:
            near = did_you_mean(name, self.tensors) or "."
            raise CheckpointError(f"{self.path} has no tensor {name!r}{near} Its config.json asks for it")
        self._read.add(name)
        stored = self.tensors[name]
        if stored.dtype in FLOATS:
            return stored
        if stored.dtype == FP8 and (scale := self.tensors.get(name + SCALE)):
            self._read.add(scale.name)
            blocks = [-(-size // edge) for size, edge in zip(stored.get_shape(), self._block, strict=False)]
            if scale.get_shape() != blocks or len(stored.get_shape()) != 2:
                raise CheckpointError(
                    f"{scale.file}: {scale.name} has size {scale.get_shape()}, but {name} {stored.get_shape()} in "
                    f"blocks of {list(self._block)} has {blocks} of them; download both files again"
                )
            return Dequantised(stored, scale, self._block)
        raise CheckpointError(
            f"{stored.file}: {name} has the number format {stored.dtype}; readable are {', '.join(FLOATS)}, and {FP8} "
            f"with {name}{SCALE}"
        )

    def _block_size(self) -> tuple[int, int]:
        """Rows and columns of an FP8 weight that share a scale."""
        block = (self.config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise CheckpointError(
                f"{self.path / 'config.json'} has weight_block_size={block!r}, expected two numbers such as "
                "[128, 128]; use the model's original file"
            )
        return block[0], block[1]

    @property
    def names_read(self) -> frozenset[str]:
        """What `read` was asked for so far."""
        return frozenset(self._read)

    def check_all_read(self, read: Iterable[str]) -> None:
        """`read`: the names that any process asked for.

        Raises:
            CheckpointError: the folder holds a tensor that no part of the model has.
        """
        if extra := sorted(name for name in self.tensors.keys() - set(read) if not self.is_skipped(name)):
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            raise CheckpointError(
                f"{self.path} holds tensors that a {self.config.get('model_type')} model of its config.json does not "
                f"have: {', '.join(extra[:3])}{more}; config.json does not describe these files"
            )

    def is_skipped(self, name: str) -> bool:
        """Tensors that are not part of the language model: layers after the last one, which predict several tokens at
        once (config.json counts them, or they have a name of their own), and what is computed."""
        layer, depth = LAYER.match(name), self.config.get("num_hidden_layers", 0)
        beyond = layer is not None and 0 <= int(layer[1]) - depth < (self.config.get("num_nextn_predict_layers") or 0)
        beyond = beyond or (self.config.get("model_type") == "qwen3_next" and name.startswith("mtp."))
        tied = self.config.get("tie_word_embeddings", False) and name == "lm_head.weight"
        return beyond or tied or COMPUTED.fullmatch(name) is not None

    def _files(self) -> list[Path]:
        """
        Raises:
            CheckpointError: there are none, or one that the index names is missing.
        """
        if (self.path / INDEX).is_file():
            files = sorted({self.path / name for name in self._index().values()})
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{self.path / INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                    "in the folder; download the missing files"
                )
            return files
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        pickles = sorted(file.name for file in self.path.glob("*.bin"))
        if pickles:
            raise CheckpointError(
                f"{self.path} has its weights as a pickle ({pickles[0]}), which can run code when it is read; convert "
                f"it once: python -c 'from transformers import AutoModelForCausalLM as M; "
                f'M.from_pretrained("{self.path}", dtype="auto").save_pretrained("{self.path}-safetensors")\''
            )
        raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}; download the weights of the model")

    def _index(self) -> Mapping[str, str]:
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in index.values()
        ):
            raise CheckpointError(f"{self.path / INDEX} has no weight_map from tensors to files of this folder")
        return index

    def _check_index(self) -> None:
        """
        Raises:
            CheckpointError: the index names a tensor that its file does not hold.
        """
        if not (self.path / INDEX).is_file():
            return
        for name, file in self._index().items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(
                    f"{self.path / INDEX} says that {name} is in {file}, and it is not; download both again"
                )


def _tensors_of(file: Path, allow_nan: bool) -> Iterable[StoredTensor]:
    try:
        opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118 -- it is not a mapping
            part = opened.get_slice(name)
            yield StoredTensor(name, file, part.get_dtype(), tuple(part.get_shape()), opened, allow_nan)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: it is truncated, or not a safetensors file ({error}); download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {path.parent} is not the folder of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
