"""What a checkpoint holds: the policy and Adam's moments, the frozen reference, and the trainer's own state.

    rank_00000.safetensors ...   a file for each process, with its shards (see checkpoint/shards.py), by global names:
                                 policy.NAME (float32 under bf16), exp_avg.NAME, exp_avg_sq.NAME, reference.NAME; a
                                 router's bias, which has no moments, as policy.NAME alone
    step_00000.safetensors ...   inside a step, a file for each process: its share of the tokens, old log-probs, ...
    run.json                     numbers and text: Adam's step count, the random states of all processes, the settings
                                 that decide the model's tensors, versions, the trainer's state

Names and shards are those of the whole model, so a checkpoint does not depend on the layout, the optimizer (distributed
or not) or the layer spec it came from. checkpoint/directory.py manages the directory.

Megatron-Core's own dist_checkpointing is not used: it unpickles what it loads (torch/distributed/checkpoint/
filesystem.py read_metadata, default_planner.py load_bytes), splits the distributed optimizer's state by its buffers
or gathers all of it on one rank, and 0.16.1 cannot read what 0.19.2 writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron import __version__
from gspo_megatron.base.batches import Position
from gspo_megatron.base.protocols import SavedState
from gspo_megatron.checkpoint.contents import file_name, files_of
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.manifest import FORMAT
from gspo_megatron.checkpoint.shards import Shard, ShardFiles, write_shards
from gspo_megatron.checkpoint.tensors import read_tensors, write_tensors
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import POLL_S
from gspo_megatron.mcore.loading import CheckpointReader
from gspo_megatron.mcore.optimizer import get_step_count, is_distributed, set_step_count, shards_of_adam
from gspo_megatron.mcore.policy import MegatronPolicy

State = TypeVar("State")
Keyed = tuple[str, Shard, Tensor]
"""A key of a checkpoint file, the shard, its elements."""


class HostCopies:
    """Copies of tensors in host memory, which is reused from save to save: the first use of memory is slow."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._kept: dict[str, Tensor] = {}

    def of(self, tensors: Sequence[Keyed]) -> list[Keyed]:
        """The same with copies, which are valid until the next call."""
        return [(key, shard, self._copy(key, elements)) for key, shard, elements in tensors]

    def _copy(self, key: str, elements: Tensor) -> Tensor:
        if key not in self._kept:
            self._kept[key] = torch.empty_like(elements, device="cpu", pin_memory=self._pinned)
        return self._kept[key].copy_(elements)


@dataclass
class Saving:
    """A save in progress: first every process writes its file, then the main one completes the checkpoint."""

    directory: Path
    work: Future[Any]
    completing: bool = False
    best: Position | None = None


class MegatronCheckpoints(CheckpointReader):
    """The checkpoints of one run (`Checkpoints` of base/protocols.py). All ranks call every method together."""

    def __init__(self, policy: MegatronPolicy, directory: CheckpointDirectory, warn: Callable[[str], None]) -> None:
        """`warn` receives what is wrong with checkpoints that a load skips."""
        super().__init__(policy, directory, warn)
        self.policy = policy
        self._host = HostCopies(pinned=not policy.device.on_cpu)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Saving | None = None

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self, position: Position, state: SavedState, *, wait: bool, best: Position | None = None) -> None:
        """Saves the policy, the optimizer, the reference and `state`; of all checkpoints, that of `best` is kept.

        With `wait`, the checkpoint is complete on return. Otherwise a thread writes a copy in host memory: the
        checkpoint is complete after `finish`, which raises any failure.

        Raises:
            CheckpointError: on all ranks, when the save failed on one of them.
        """
        self.finish()
        tensors = list(self.to_write())
        of_state = state.tensors()
        own_bytes = sum(elements.nbytes for _, _, elements in tensors) + sum(x.nbytes for x in of_state.values())
        num_bytes = sum(self.groups.from_all(own_bytes))
        directory = self.groups.on_main(lambda: self.directory.begin(position, num_bytes))
        about = {
            "format": FORMAT,
            "state": state.to_json() if self.groups.is_main else None,
            "policy_version": self.policy.version,
            "adam_step": get_step_count(self.policy.optimizer),
            "has_reference": self.policy.reference is not None,
            "random": self.groups.from_all(self.policy.device.random_state()),
            "num_files": dist.get_world_size(),
            "model": self.shape.tensor_settings(),
            "versions": {"gspo_megatron": __version__, "megatron_core": compat.VERSION, "torch": torch.__version__},
        }
        if not wait:
            tensors = self._host.of(tensors)
        work = self._writer.submit(self._write, directory, about, tensors, of_state)
        self._saving = Saving(directory, work, best=best)
        if wait:
            self.finish()

    def finish(self, *, wait: bool = True) -> None:
        """Completes a save in progress. Without `wait`, only as far as possible without blocking; call it now and then.

        Raises:
            CheckpointError: on all ranks, when the save failed on one of them.
        """
        while saving := self._saving:
            while self.groups.any_rank(not saving.work.done()):
                if not wait:
                    return
                # Writing and hashing may take longer than the timeout of a collective.
                time.sleep(POLL_S)
            self._saving = None
            self.groups.fail_together(f"{saving.directory} could not be written", saving.work.exception())
            if not saving.completing:
                commit = (
                    partial(self.directory.commit, saving.directory, saving.best) if self.groups.is_main else _nothing
                )
                self._saving = Saving(saving.directory, self._writer.submit(commit), completing=True)

    def _write(
        self, directory: Path, about: dict[str, Any], tensors: Sequence[Keyed], of_state: Mapping[str, Tensor]
    ) -> None:
        write_shards(directory / file_name(dist.get_rank()), tensors)
        if of_state:
            write_tensors(directory / f"step_{dist.get_rank():05d}.safetensors", of_state)
        if self.groups.is_main:
            (directory / "run.json").write_text(json.dumps(about))

    def to_write(self) -> Iterator[Keyed]:
        """Every element of every tensor, on one rank each."""
        adam_shards = shards_of_adam(self.policy.optimizer, self.policy.model)
        replicated = not is_distributed(self.policy.device, self.policy.config.optimizer)
        for name, whole, parameter in self._shards(self.policy.model):
            adam = adam_shards.get(parameter)
            if not isinstance(parameter, torch.nn.Parameter):
                yield from self._written_by_replicas(f"policy.{name}", whole, parameter)
            if adam is None or self._is_copy(whole, parameter):
                continue
            shard = self._share(whole) if replicated else replace(whole, start=adam.start, end=adam.end)
            inside = slice(shard.start - adam.start, shard.end - adam.start)
            if shard.start < shard.end:
                yield f"policy.{name}", shard, adam.main[inside]
                yield f"exp_avg.{name}", shard, adam.exp_avg[inside]
                yield f"exp_avg_sq.{name}", shard, adam.exp_avg_sq[inside]
        for name, whole, tensor in self._shards(self.policy.reference or []):
            yield from self._written_by_replicas(f"reference.{name}", whole, tensor)

    def _written_by_replicas(self, key: str, whole: Shard, tensor: Tensor) -> Iterator[Keyed]:
        """This replica's part of a tensor without optimizer state."""
        shard = self._share(whole)
        if shard.start < shard.end and not self._is_copy(whole, tensor):
            yield key, shard, tensor.detach().view(-1)[shard.start : shard.end]

    def _share(self, whole: Shard) -> Shard:
        """The part of a slice that this data-parallel replica writes."""
        groups = self.groups.collection
        group = groups.expt_dp if ".experts." in whole.place.name else groups.dp_cp
        start, end = (whole.end * i // group.size() for i in (group.rank(), group.rank() + 1))
        return replace(whole, start=start, end=end)

    def _is_copy(self, whole: Shard, tensor: Tensor) -> bool:
        """Whether another rank writes it: for a dense parameter that is not sliced, the first tensor-parallel one; for
        the last stage's copy of tied embeddings, which Megatron marks, the first stage."""
        unsliced = whole.place.count == 1 and ".experts." not in whole.place.name
        return (unsliced and self.groups.tp_rank > 0) or getattr(tensor, "shared", False)

    # ------------------------------------------------------------------------------------------------------ loading

    def load(self, which: str, read_state: Callable[[dict[str, Any], list[dict[str, Tensor]]], State]) -> State | None:
        """Restores the policy from `latest`, a path, or nothing (`none`); returns the state that was saved with it,
        which `read_state` makes from its JSON and the tensors of all processes.

        The layout, the optimizer's sharding and the number format may differ from those it was saved with.

        Raises:
            CheckpointError: the checkpoint is damaged, or holds another model.
        """
        opened = self._open(which)
        if opened is None:
            return None
        path, about = opened
        if about["has_reference"]:
            self.policy.freeze_reference()
        of_state: list[dict[str, Tensor]] = []

        def read() -> None:
            of_state.extend(read_tensors(file) for file in sorted(path.glob("step_*.safetensors")))
            self._read(files_of(path, about))
            set_step_count(self.policy.optimizer, about["adam_step"])
            if len(about["random"]) == dist.get_world_size():
                self.policy.device.set_random_state(about["random"][dist.get_rank()])

        self._read_together(path, read)
        self.policy.version = about["policy_version"]
        return read_state(about["state"], of_state)

    @torch.no_grad()
    def _read(self, files: ShardFiles) -> None:
        self._read_weights(files, "policy", self.policy.model)
        adam_shards = shards_of_adam(self.policy.optimizer, self.policy.model)
        for name, whole, parameter in self._shards(self.policy.model):
            if adam := adam_shards.get(parameter):
                shard = replace(whole, start=adam.start, end=adam.end)
                files.read(f"policy.{name}", shard, adam.main)
                files.read(f"exp_avg.{name}", shard, adam.exp_avg)
                files.read(f"exp_avg_sq.{name}", shard, adam.exp_avg_sq)
        self._read_weights(files, "reference", self.policy.reference or [])


def _nothing() -> None:
    """What a rank does that completes no checkpoint."""
