"""Opens a scorer on this process: a model without an optimizer, and what packs responses for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import CheckpointError, ConfigError
from gspo_megatron.build.inputs import ModelInputs
from gspo_megatron.build.parts import packer_of
from gspo_megatron.build.trainer import agreed_scoring, open_groups
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.scoring import Scorer


def check_weights(config: Config, results: str = "log-probs") -> None:
    """Refuses settings that name no weights.

    Raises:
        ConfigError: they do not.
    """
    if config.checkpoint.load == "none" and not config.model.hf:
        raise ConfigError(
            f"checkpoint.load=none: the {results} would be those of random weights; name a checkpoint, "
            "checkpoint.load=latest for the newest one of run.dir, or a Hugging Face folder by model.hf"
        )


def longest_response(config: Config) -> int:
    """Most tokens of a prompt with its response that fit in the model and, padded, in a micro-batch."""
    multiple, most = packing_rules(config).sequence_multiple, config.train.tokens_per_micro_batch
    return min(config.model.max_sequence_length, most // multiple * multiple)


@contextmanager
def open_scorer(inputs: ModelInputs, device: Device, console: Console) -> Iterator[Scorer]:
    """Opens the scorer of this process with the weights that the settings name. Collective: every process calls it.

    Raises:
        CheckpointError: they cannot be loaded.
    """
    with open_groups(inputs.config, inputs.layout, device, console) as (groups, use_te, _):
        model, _ = load_model(inputs, device, console, groups, use_te)
        yield Scorer(model, groups, packer_of(inputs, groups), console)


def load_model(
    inputs: ModelInputs, device: Device, console: Console, groups: Any, use_te: bool, *, num_ids: int | None = None
) -> tuple[Any, Path]:
    """A `MegatronModel` with the weights that the settings name, and where they are. Only the first `num_ids` ids have
    a probability; by default all that the model has. Collective.

    Raises:
        CheckpointError: they cannot be loaded.
    """
    from gspo_megatron.mcore.hugging_face import load_folder
    from gspo_megatron.mcore.loading import CheckpointReader
    from gspo_megatron.mcore.policy import MegatronModel

    config = inputs.config
    scoring = agreed_scoring(inputs.algorithm.scoring, device, console)
    model = MegatronModel(config, groups, device, use_te, scoring, num_ids=num_ids)
    for chunk in model.model:
        chunk.requires_grad_(False).eval()
    directory = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep=config.checkpoint.keep)
    path: Path | str | None = CheckpointReader(model, directory, console.warn).load_weights(config.checkpoint.load)
    if path is None and config.checkpoint.load == "none" and (path := config.model.hf):
        for note in load_folder(model, path, allow_nan=config.model.hf_allow_nan):
            console.say(f"model.hf: {note}")
    if path is None:
        raise CheckpointError(f"checkpoint.load={config.checkpoint.load}: nothing was saved in {directory.directory}")
    console.say(f"weights of {path}")
    return model, Path(path)
