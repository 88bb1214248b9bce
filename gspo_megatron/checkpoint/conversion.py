"""From a checkpoint's shards to a Hugging Face folder, tensor by tensor, without a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.export import FILE_BYTES, Export, Stored, header_of
from gspo_megatron.checkpoint.manifest import MANIFEST, write_synced
from gspo_megatron.checkpoint.shards import ShardFiles
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.names import NameRule, find_rule, reading_order, sizes_on_hub, to_theirs
from gspo_megatron.models.shape import ModelShape

MARK = "conversion.json"
"""In a folder that is being written: what it is made of."""
KEPT = ".kept"
"""Ends the name of an unfinished folder whose files are being taken over."""
KIND = "policy."
"""Begins the keys of the policy's weights in a checkpoint."""


class ResumableExport(Export):
    """An `Export` that goes on after an interruption: files that an earlier attempt of the same conversion completed
    are kept.

    Attributes:
        kept: the names of the tensors in those files.
    """

    def __init__(self, path: Path, source: str, *, file_bytes: int = FILE_BYTES) -> None:
        """`source` identifies what is converted."""
        super().__init__(path, file_bytes=file_bytes)
        self._source, self.kept = source, frozenset[str]()

    def begin(self, tensors: Mapping[str, Stored], *, already: int = 0) -> None:
        """See `Export.begin`."""
        plan = [(name, stored.shape, str(stored.dtype)) for name, stored in tensors.items()]
        made_of = hashlib.sha256(json.dumps([self._source, self._file_bytes, plan]).encode()).hexdigest()
        aside = self.partial.with_name(self.partial.name + KEPT)
        if _mark_of(self.partial) == made_of:
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.partial, aside)
        earlier = aside if _mark_of(aside) == made_of else None
        already += sum(file.stat().st_size for file in earlier.iterdir()) if earlier else 0
        super().begin(tensors, already=already)
        kept: list[str] = []
        for name, share in self._files.items():
            # Files are written one after the other, so one of full size is complete.
            stored = {each: self._tensors[each] for each in share}
            size = len(header_of(stored)) + sum(each.num_bytes for each in stored.values())
            if not earlier or not (earlier / name).is_file() or (earlier / name).stat().st_size != size:
                break
            os.rename(earlier / name, self.partial / name)
            kept += share
        self.kept = frozenset(kept)
        write_synced(self.partial / MARK, json.dumps(made_of).encode())
        shutil.rmtree(aside, ignore_errors=True)

    def skip(self, name: str) -> None:
        """Instead of `write`, for a tensor in `kept`."""
        expected, _ = next(self._expected)
        assert name == expected and name in self.kept

    def commit(self, content: Mapping[str, Mapping[str, object]], copied: Sequence[Path] = ()) -> Path:  # type: ignore[override]
        """See `Export.commit`."""
        (self.partial / MARK).unlink(missing_ok=True)
        return super().commit(content, copied)


def _mark_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return None


class CheckpointWeights:
    """The policy's whole tensors in a checkpoint, by their Hugging Face names.

    Attributes:
        stored: size and number format of each, in the order in which `write` writes them.
    """

    def __init__(self, files: ShardFiles, shape: ModelShape, rules: Sequence[NameRule], dtype: torch.dtype) -> None:
        """`dtype`: of the tensors, apart from those that are float32 on the hub.

        Raises:
            CheckpointError: the checkpoint lacks tensors of such a model.
        """
        self._files, self._shape, self._rules = files, shape, rules
        sizes = {key.removeprefix(KIND): size for key, size in files.sizes().items() if key.startswith(KIND)}
        self._sizes = {name: sizes[name] for name in sorted(sizes, key=reading_order)}
        parameters = sum(torch.Size(size).numel() for name, size in sizes.items() if not name.endswith(".expert_bias"))
        if parameters != (expected := count_parameters(shape).total):
            raise CheckpointError(
                f"the files hold {parameters:,} parameters, a model of these settings has {expected:,}; the "
                "checkpoint is incomplete, or of another version"
            )
        self.stored = {
            name: Stored(theirs, torch.float32 if float32 else dtype)
            for name, (theirs, float32) in sizes_on_hub(rules, self._sizes.items(), shape).items()
        }

    def write(self, export: ResumableExport, written: Callable[[int], None]) -> None:
        """Writes all tensors; `written` is called with the bytes of each. One of ours is in memory at a time.

        Raises:
            CheckpointError: one is incomplete in the files, or the folder cannot be written.
        """
        for name in self.stored:
            if name in export.kept:
                export.skip(name)
                written(self.stored[name].num_bytes)
        for name, tensor in to_theirs(self._rules, self._without(export.kept), self._shape):
            if name not in export.kept:
                export.write(name, tensor)
                written(self.stored[name].num_bytes)

    def _without(self, kept: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Our whole tensors, but for those whose tensors on the hub are all kept."""
        for ours, size in self._sizes.items():
            if not kept.issuperset(find_rule(self._rules, ours)[1]):
                yield ours, self._files.whole(KIND + ours, size)


def source_of(checkpoint: Path) -> str:
    """Identifies a checkpoint: its manifest has the hash of every file."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
