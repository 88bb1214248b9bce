"""Reading a checkpoint: the weights of a model, for whoever needs no more than those.

mcore/saving.py says what the files hold.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.manifest import FORMAT
from gspo_megatron.checkpoint.shards import Shard, ShardFiles
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.parameters import is_vocabulary, named_tensors
from gspo_megatron.mcore.policy import MegatronModel
from gspo_megatron.models.shape import OPTIONAL, ModelShape

POLL_S = 0.02
"""Seconds between checks whether any process is still working on files."""

Result = TypeVar("Result")


class CheckpointReader:
    """Weights from the checkpoints of a directory. All ranks call every method together."""

    def __init__(self, model: MegatronModel, directory: CheckpointDirectory, warn: Callable[[str], None]) -> None:
        """`warn` receives what is wrong with checkpoints that a load skips."""
        self._to_load, self.groups, self.directory, self.warn = model, model.groups, directory, warn
        self.shape = model.config.model.shape
        self._writer = ThreadPoolExecutor(1, "checkpoint")

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
        path, problems = self._on_main(lambda: self.directory.open(which))
        for problem in problems:
            self.warn(problem)
        if path is None:
            return None
        about = self._on_main(lambda: _read_json(path / "run.json"))
        if about.get("format", 1) < FORMAT:
            self.warn(
                f"{path} has format {about.get('format', 1)}, written by gspo_megatron "
                f"{about['versions']['gspo_megatron']}; it is loaded, and the next save has format {FORMAT}"
            )
        if wrong := other_settings(about["model"], self.shape):
            raise CheckpointError(f"{path} holds another model, with {', '.join(wrong)}")
        return path, about

    def _read_together(self, path: Path, read: Callable[[], None]) -> None:
        """Calls `read`; if it fails on one process, fails on all."""
        failure = None
        try:
            read()
        except CheckpointError as error:
            failure = error
        self._fail_together(f"{path} could not be loaded", failure)

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

    def _on_main(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the main process; returns its result, or raises its CheckpointError, on all processes."""
        running = self._writer.submit(work) if self.groups.is_main else None
        while self.groups.any_rank(running is not None and not running.done()):
            time.sleep(POLL_S)
        outcome: list[Any] = [None]
        if running is not None:
            error = running.exception()
            if error is not None and not isinstance(error, CheckpointError):
                raise error
            outcome = [error or running.result()]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], CheckpointError):
            raise outcome[0]
        return outcome[0]

    def _fail_together(self, what: str, error: BaseException | None) -> None:
        """Fails on all processes if one has an error.

        Raises:
            CheckpointError: `what`, with the reason and the process.
        """
        for rank, reason in enumerate(self._from_all(error and _reason(error))):
            if reason is not None:
                raise CheckpointError(f"{what}: {reason} (process {rank})")

    def _from_all(self, mine: Result) -> list[Result]:
        """The values of all processes, in rank order."""
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        return said


def other_settings(saved: dict[str, Any], shape: ModelShape) -> list[str]:
    """Settings of a checkpoint's tensors that differ from those of `shape`."""
    # The only family when checkpoints did not name one; fields that it does not use were added later.
    saved = {"family": "qwen3_moe"} | OPTIONAL | saved
    return [f"model.{key}={saved[key]}, not {own}" for key, own in shape.tensor_settings().items() if saved[key] != own]


def files_of(path: Path, about: dict[str, Any]) -> ShardFiles:
    return ShardFiles([path / file_name(rank) for rank in range(about["num_files"])])


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
