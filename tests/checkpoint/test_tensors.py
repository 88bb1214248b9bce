"""Plain tensors in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.tensors import read_tensors, write_tensors


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tensors = {
        "tokens": torch.arange(5, dtype=torch.int32),
        "trained": torch.tensor([True, False]),
        "every other": torch.arange(6.0).double()[::2],
        "empty": torch.empty(0),
    }
    write_tensors(tmp_path / "step.safetensors", tensors)
    found = read_tensors(tmp_path / "step.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_whoever_may_read_other_files_may_read_these(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_tensors(tmp_path / "step.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "step.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\0" * 7 + b"{broken}"])
def test_a_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step.safetensors cannot be read"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match=r"missing.safetensors cannot be read"):
        read_tensors(tmp_path / "missing.safetensors")
