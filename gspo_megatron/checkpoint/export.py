"""A model written as a Hugging Face folder: safetensors files, index, config.json, and the tokenizer's files.

    export = Export(Path("RUN/hf/step_000010"), torch.bfloat16)
    export.begin({"lm_head.weight": Stored((509, 48)), ...})     # space is checked, headers are written
    export.write("lm_head.weight", tensor)                       # in the same order
    export.commit({"config.json": {...}, ...}, copied=[Path("tokenizer.json"), ...])

It is written next to its place, as step_000010.tmp, and renamed when it is complete and on the disk. A tensor is
written as it arrives, so no more than one is in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError, memory_size
from gspo_megatron.checkpoint.hugging_face import INDEX, SINGLE, read_json
from gspo_megatron.checkpoint.manifest import sync, write_synced
from gspo_megatron.checkpoint.names import PARTIAL
from gspo_megatron.checkpoint.stored import FLOATS

FILE_BYTES = 5_000_000_000
"""Of weights in a file, as on the hub. A larger tensor has one of its own."""
EXPORTED = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Number formats of the weights in a folder: values of train.hf_dtype, and of `convert to-hf --dtype`."""
FORMATS = {dtype: name for name, dtype in FLOATS.items()}
NOT_COPIED = ("quantization_config", "auto_map")
"""Keys of config.json that do not hold for what is written: other number formats, and code in files of its own."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class FolderFiles:
    """What a folder holds besides weights.

    Attributes:
        config: config.json, without the number format.
        generation: generation_config.json.
        copied: files that are copied as they are: the tokenizer's.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    copied: tuple[Path, ...] = ()

    @classmethod
    def like(cls, folder: Path, tokenizer: Path | None = None) -> FolderFiles:
        """As in the folder that the weights came from, with the tokenizer of another one where it is given.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        config = {k: v for k, v in read_json(folder / "config.json").items() if k not in NOT_COPIED}
        if "num_nextn_predict_layers" in config:
            config["num_nextn_predict_layers"] = 0  # those layers were not read
        generation = folder / "generation_config.json"
        return cls(config, read_json(generation) if generation.is_file() else {}, tokenizer_files(tokenizer or folder))

    @classmethod
    def of(
        cls, config: Mapping[str, Any], stop_ids: Sequence[int], pad_id: int, tokenizer: Path | None = None
    ) -> FolderFiles:
        """For a model that came from nowhere: `config` is that of its family."""
        ids = {"eos_token_id": stop_ids[0] if len(stop_ids) == 1 else list(stop_ids), "pad_token_id": pad_id}
        return cls({**config, **ids}, ids, tokenizer_files(tokenizer) if tokenizer else ())

    def content(self, dtype: torch.dtype) -> dict[str, Mapping[str, Any]]:
        """JSON files by name, for weights in this number format."""
        name = str(dtype).removeprefix("torch.")
        # transformers 4 and vLLM read torch_dtype, transformers 5 dtype.
        config = {**self.config, "torch_dtype": name, "dtype": name}
        return {"config.json": config} | ({"generation_config.json": self.generation} if self.generation else {})


class Stored(NamedTuple):
    """Size and number format of a tensor in the folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Export:
    """One folder. Called on the one process that writes: `begin`, `write` for each tensor, `commit`."""

    def __init__(self, path: Path, *, file_bytes: int = FILE_BYTES) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self._file_bytes = file_bytes
        self._tensors: dict[str, Stored] = {}
        self._expected: Iterator[tuple[str, Path | None]] = iter(())
        self._files: dict[str, list[str]] = {}
        self._open: BinaryIO | None = None

    def begin(self, tensors: Mapping[str, Stored], *, already: int = 0) -> None:
        """Makes the directory, and plans which tensor is in which file. `already`: bytes of it that are on the disk.

        Raises:
            CheckpointError: too little space is free, or nothing can be written.
        """
        self._tensors = dict(tensors)
        shares = list(_shares(self._tensors, self._file_bytes))
        names = (
            [SINGLE]
            if len(shares) == 1
            else [f"model-{i:05d}-of-{len(shares):05d}.safetensors" for i in range(1, len(shares) + 1)]
        )
        self._files = dict(zip(names, shares, strict=True))
        self._expected = (
            (name, self.partial / file if name == share[0] else None)
            for file, share in self._files.items()
            for name in share
        )
        needed = sum(stored.num_bytes for stored in self._tensors.values())
        needed += needed // 50 + (64 << 20) - already
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < needed:
                raise CheckpointError(
                    f"{self.path.parent} has {memory_size(free / (1 << 30))} free, {self.path.name} needs "
                    f"{memory_size(needed / (1 << 30))}; free some space, or move run.dir to a larger disk"
                )
            self.partial.mkdir()
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, in the order of `begin`; converted to its number format.

        Raises:
            CheckpointError: it cannot be written.
        """
        expected, new_file = next(self._expected)
        stored = self._tensors[name]
        assert (name, tuple(tensor.shape)) == (expected, stored.shape), f"{name} came instead of {expected}"
        try:
            numbers = tensor.detach().to("cpu", stored.dtype).contiguous()
            if new_file:
                self._close()
                self._open = new_file.open("xb")
                names = self._files[new_file.name]
                self._open.write(header_of({name: self._tensors[name] for name in names}))
            assert self._open is not None
            self._open.write(numbers.view(-1).view(torch.uint8).numpy().data)
        except (OSError, MemoryError) as error:
            raise self._unwritable(error) from error
        except RuntimeError as error:  # torch's, on any device
            reason = f"{name} with {memory_size(stored.num_bytes / (1 << 30))}: {str(error).splitlines()[0]}"
            raise self._unwritable(MemoryError(reason)) from error

    def commit(self, content: Mapping[str, Mapping[str, Any]], copied: Iterable[Path] = ()) -> Path:
        """Writes JSON files by name, copies files, and gives the folder its name. One of that name is replaced.

        Raises:
            CheckpointError: it cannot be completed.
        """
        try:
            self._close()
            if SINGLE not in self._files:
                total = sum(stored.num_bytes for stored in self._tensors.values())
                weight_map = {name: file for file, share in self._files.items() for name in share}
                content = {**content, INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}}
            for file in copied:
                write_synced(self.partial / file.name, file.read_bytes())
            for name, value in content.items():
                write_synced(self.partial / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
            sync(self.partial)
            old = self.path.with_name(self.path.name + f".old{PARTIAL}")
            if self.path.exists():
                # Half of a deleted folder must not keep its name.
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.path, old)
            os.rename(self.partial, self.path)
            sync(self.path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise self._unwritable(error) from error
        return self.path

    def abandon(self) -> None:
        """Deletes what was written, for a folder that cannot be completed."""
        with suppress(OSError):
            self._close()
        self._open = None
        shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()
            self._open = None

    def _unwritable(self, error: OSError | MemoryError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written ({error}); nothing of that name was left half-written; make "
            f"{self.path.parent} writable, free some space, or move run.dir elsewhere"
        )


def header_of(tensors: Mapping[str, Stored]) -> bytes:
    """What a safetensors file begins with: the tensors' bytes follow, in this order and without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + stored.num_bytes
        entries[name] = {"dtype": FORMATS[stored.dtype], "shape": stored.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """What belongs to the tokenizer of a folder."""
    return tuple(file for name in TOKENIZER_FILES if (file := folder / name).is_file())


def _shares(tensors: Mapping[str, Stored], file_bytes: int) -> Iterator[list[str]]:
    """Consecutive names whose tensors fit in a file."""
    share: list[str] = []
    size = 0
    for name, stored in tensors.items():
        if share and size + stored.num_bytes > file_bytes:
            yield share
            share, size = [], 0
        share.append(name)
        size += stored.num_bytes
    if share:
        yield share
