"""Plain tensors in a safetensors file (https://huggingface.co/docs/safetensors). Reading one runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.manifest import sync


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name and waits until they are on the disk."""
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    # Not save_file: it makes files that only their owner can read, whatever the umask.
    path.write_bytes(content)
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
