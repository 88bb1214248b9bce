"""Checkpoints through megatron.core.dist_checkpointing: `step_000010/` directories and a `latest` pointer beside them.

A checkpoint is written into `step_000010.tmp`, renamed when every rank is done, and only then named by `latest`, so a
run that dies while saving leaves the checkpoint before as the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from gspo_megatron import __version__
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.optimizer import allocate_adam_state, restore_step_counts
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.types import CheckpointError

# Megatron's other sharding types need an optimizer that keeps its step count per parameter group (Transformer
# Engine's or Apex's Adam); this one works with torch's AdamW too.
METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


class MegatronCheckpoints:
    """The checkpoints of one run directory (`Checkpoints` of trainer.py). Collective: all ranks call it together."""

    def __init__(self, policy: MegatronPolicy, directory: Path, keep: int) -> None:
        self.policy, self.directory, self.keep = policy, directory, keep
        self.is_main = policy.groups.is_main

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes weights, optimizer, reference and `state` (plain numbers and strings); drops all but the last
        `keep`."""
        final = self.directory / f"step_{step:06d}"
        partial = final.with_suffix(".tmp")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._sharded(loading=False), str(partial), validate_access_integrity=False)
        if self.is_main:
            about = {**state, "has_reference": self.policy.reference is not None}
            versions = {"gspo_megatron": __version__, "megatron_core": compat.VERSION, "torch": torch.__version__}
            (partial / "run.json").write_text(json.dumps({**about, "versions": versions}))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            self._point_to(final)
            # A run continued from an early checkpoint leaves those of its former future alone, until it gets there.
            saved_before = [p for p in self._all() if p.name <= final.name]
            for old in saved_before[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, which: str) -> dict[str, Any] | None:
        """Restores the policy from `latest`, a path, or nothing (`none`); returns the state that was saved with it.

        Raises CheckpointError when a path holds no checkpoint, or one that does not fit this model.
        """
        if which == "none":
            return None
        path = self._latest() if which == "latest" else Path(which)
        if path is None:
            return None
        if not (path / "run.json").is_file():
            known = ", ".join(str(p) for p in self._all()) or "none"
            raise CheckpointError(
                f"checkpoint.load={which!r}: {path} holds no checkpoint; checkpoints of this run: {known}"
            )
        state = json.loads((path / "run.json").read_text())
        if state["has_reference"]:
            self.policy.freeze_reference()
        allocate_adam_state(self.policy.optimizer)
        try:
            loaded = dist_checkpointing.load(self._sharded(loading=True), str(path))
        except (Exception, CheckpointException) as error:  # of many types; the user needs to know where, and why
            raise CheckpointError(
                f"{path} could not be loaded ({_reason(error)}); it needs the model and the layout it was saved from, "
                "up to the number of data-parallel ranks"
            ) from error
        for name, chunks in self._models().items():
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"{name}{i}"])
        with self.policy.lane.optimizer_scope(), torch.no_grad():
            self.policy.optimizer.load_state_dict(loaded["optimizer"])
        restore_step_counts(self.policy.optimizer)
        self.policy.version = state["policy_version"]
        return state

    def _sharded(self, *, loading: bool) -> ShardedStateDict:
        state: ShardedStateDict = {}
        for name, chunks in self._models().items():
            for i, chunk in enumerate(chunks):
                state[f"{name}{i}"] = chunk.sharded_state_dict(metadata=METADATA)
                if name == "reference":
                    add_prefix_for_sharding(state[f"{name}{i}"], "reference.")
        own = {key: part for key, part in state.items() if key.startswith("model")}
        with self.policy.lane.optimizer_scope():
            state["optimizer"] = self.policy.optimizer.sharded_state_dict(own, is_loading=loading, metadata=METADATA)
        return state

    def _models(self) -> dict[str, list[PolicyModel]]:
        """The policy's chunks on this rank and, where there is one, the reference's."""
        reference = {} if self.policy.reference is None else {"reference": self.policy.reference}
        return {"model": self.policy.model, **reference}

    def _all(self) -> list[Path]:
        """Oldest first."""
        return sorted(p for p in self.directory.glob("step_*") if p.suffix != ".tmp")

    def _latest(self) -> Path | None:
        pointer = self.directory / "latest"
        return self.directory / pointer.read_text().strip() if pointer.is_file() else None

    def _point_to(self, checkpoint: Path) -> None:
        fresh = self.directory / "latest.tmp"
        fresh.write_text(checkpoint.name + "\n")
        os.replace(fresh, self.directory / "latest")


def _reason(error: BaseException) -> str:
    """Type and message, cut short; of what the first rank that failed met, where torch wrapped all ranks' errors."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {str(error)[:300]}"
