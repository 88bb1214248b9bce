"""The policy's weights from a Hugging Face folder, and into one. All ranks call these together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.export import EXPORTED, Export, FolderFiles, Stored
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.inspection import check_folder
from gspo_megatron.checkpoint.quantised import FP8
from gspo_megatron.mcore.groups import MAIN
from gspo_megatron.mcore.policy import MegatronModel, MegatronPolicy
from gspo_megatron.models.families import family_of


def load_folder(policy: MegatronModel, path: str | Path, *, allow_nan: bool = False) -> list[str]:
    """Sets the policy's weights; every rank reads the slices that it holds. Returns what of the folder is left
    out or rounded.

    Raises:
        CheckpointError: on all ranks, when one finds a file or a tensor that cannot be used, or when the folder is not
            a model of its config.json.
    """
    shape, error = policy.config.model.shape, None
    notes: list[str] = []
    # Whatever goes wrong on one rank, no rank may wait for it in vain.
    try:
        folder = HuggingFaceFolder(path, allow_nan=allow_nan)
        notes = [*check_folder(folder, shape).notes, *rounding(folder, policy.device.dtype)]
        policy.load_weights(folder.read, family_of(shape).rules)
    except Exception as caught:
        error = caught
    policy.groups.fail_together(f"model.hf={path} cannot be loaded", error)
    return notes


def rounding(folder: HuggingFaceFolder, dtype: torch.dtype) -> Iterator[str]:
    """Says that weights of more digits than bf16 lose them in a model of this format."""
    longer = sorted({weight.dtype for weight in folder.weights.values()} & {"F64", "F32", "F16", FP8})
    matrices = [
        name for name, weight in folder.weights.items() if weight.dtype in longer and len(weight.get_shape()) > 1
    ]
    if dtype == torch.bfloat16 and matrices:
        yield f"{', '.join(longer)} of {len(matrices):,} matrices is rounded to bf16, also the values that are trained"


def save_folder(
    policy: MegatronModel,
    path: Path,
    dtype: torch.dtype,
    content: Mapping[str, Mapping[str, Any]],
    copied: Iterable[Path] = (),
) -> None:
    """Writes the weights as `path`, in `dtype`, with JSON files by name and copies of files. The main rank writes,
    tensor by tensor as they arrive.

    Raises:
        CheckpointError: on all ranks, when the folder cannot be written. Nothing is then left under its name.
    """
    groups, rules = policy.groups, family_of(policy.config.model.shape).rules
    sizes = policy.weight_sizes(rules)
    export, error = Export(path), None
    tensors = {name: Stored(shape, torch.float32 if float32 else dtype) for name, (shape, float32) in sizes.items()}
    groups.on_main(lambda: export.begin(tensors))
    for name, tensor in policy.weights(rules, only_to=MAIN):
        # Every rank stays in the exchange to its end, also after a failure on the one that writes.
        if error is None:
            try:
                export.write(name, tensor)
            except CheckpointError as caught:
                error = caught
    if error is not None:
        export.abandon()
    groups.fail_together("the weights cannot be written", error)
    groups.on_main(lambda: export.commit(content, copied))


class MegatronExports:
    """`Exports` of base/protocols.py: RUN/hf/step_000010."""

    def __init__(
        self,
        policy: MegatronPolicy,
        files: FolderFiles,
        say: Callable[[str], None],
    ) -> None:
        """`files`: what a folder holds besides weights. `say` prints where each folder was written."""
        self.policy, self.groups, self.files, self.say = policy, policy.groups, files, say
        self.settings, self.directory = policy.config.train, Path(policy.config.run.dir) / "hf"
        self._trained: int | None = None
        self._written: int | None = None

    def after(self, step: int) -> None:
        """See `Exports.after`."""
        self._trained = step
        if self.settings.hf_every and step % self.settings.hf_every == 0:
            self._write(step)

    def at_end(self, step: int) -> None:
        """See `Exports.at_end`. A run that had nothing left to train keeps the folder that it wrote before."""
        if self.settings.hf_at_end == "off" or (self.settings.hf_at_end == "auto" and not self.policy.config.model.hf):
            return
        stale = step == self._trained and step != self._written
        if stale or not self.groups.on_main(self._path(step).is_dir):
            self._write(step)

    def _write(self, step: int) -> None:
        dtype = EXPORTED[self.settings.hf_dtype]
        save_folder(self.policy, self._path(step), dtype, self.files.content(dtype), self.files.copied)
        self._written = step
        self.say(f"the model after step {step} is in {self._path(step)}")

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"
