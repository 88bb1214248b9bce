"""Reading a checkpoint: the weights of a model, for whoever needs no more than those.

mcore/saving.py says what the files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.checkpoint.contents import check_same_model, files_of, read_about
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.manifest import FORMAT
from gspo_megatron.checkpoint.shards import Shard, ShardFiles
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.parameters import is_vocabulary, named_tensors
from gspo_megatron.mcore.policy import MegatronModel


class CheckpointReader:
    """Weights from the checkpoints of a directory. All ranks call every method together."""

    def __init__(self, model: MegatronModel, directory: CheckpointDirectory, warn: Callable[[str], None]) -> None:
        """`warn` receives what is wrong with checkpoints that a load skips."""
        self._to_load, self.groups, self.directory, self.warn = model, model.groups, directory, warn
        self.shape = model.config.model.shape

    def load_weights(self, which: str) -> Path | None:
        """Sets the model's weights from `latest`, a path, or nothing (`none`); returns the checkpoint that it was.

        Raises:
            CheckpointError: the checkpoint is damaged, or holds another model.
        """
        opened = self._open(which)
        if opened is None:
            return None
        path, about = opened
        self._read_together(path, lambda: self._read_weights(files_of(path, about), "policy", self._to_load.model))
        return path

    def _open(self, which: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that checkpoint.load=`which` stands for, and its run.json; None for a fresh start."""
        path, problems = self.groups.on_main(lambda: self.directory.open(which))
        for problem in problems:
            self.warn(problem)
        if path is None:
            return None
        about = self.groups.on_main(lambda: read_about(path))
        if about.get("format", 1) < FORMAT:
            self.warn(
                f"{path} has format {about.get('format', 1)}, written by gspo_megatron "
                f"{about['versions']['gspo_megatron']}; it is loaded, and the next save has format {FORMAT}"
            )
        check_same_model(path, about, self.shape)
        return path, about

    def _read_together(self, path: Path, read: Callable[[], None]) -> None:
        """Calls `read`; if it fails on one process, fails on all."""
        failure = None
        try:
            read()
        except Exception as error:
            failure = error
        self.groups.fail_together(f"{path} could not be loaded", failure)

    @torch.no_grad()
    def _read_weights(self, files: ShardFiles, kind: str, chunks: Sequence[PolicyModel]) -> None:
        """`kind`: policy or reference."""
        for name, whole, tensor in self._shards(chunks):
            files.read(f"{kind}.{name}", whole, tensor.view(-1))
        for chunk in chunks:
            chunk.weights_changed = True

    def _shards(self, chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Shard, Tensor]]:
        """(name in the checkpoint, all of this rank's slice as a shard, parameter or buffer)."""
        for chunk in chunks:
            for place, tensor in named_tensors(chunk, self.shape, self.groups):
                num_rows = self.shape.vocab_size if is_vocabulary(place.name) else None
                yield place.name, Shard.of(place, tensor, num_rows), tensor
