"""Folders that are written: complete under their name or not there, with the files that others expect."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint import export as module
from gspo_megatron.checkpoint.export import Export, FolderFiles, Stored
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder

TENSORS = {"a": torch.randn(4, 3), "b": torch.randn(5), "c": torch.randn(2, 2, dtype=torch.bfloat16)}
STORED = {
    "a": Stored((4, 3), torch.bfloat16),
    "b": Stored((5,), torch.float32),
    "c": Stored((2, 2), torch.bfloat16),
}


def write(path: Path, file_bytes: int) -> Export:
    export = Export(path, file_bytes=file_bytes)
    export.begin(STORED)
    for name, tensor in TENSORS.items():
        export.write(name, tensor)
    return export


@pytest.mark.parametrize(("file_bytes", "num_files"), [(1000, 1), (44, 2), (1, 3)])
def test_what_is_written_is_read(file_bytes: int, num_files: int, tmp_path: Path) -> None:
    path = tmp_path / "hf" / "step_000010"
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    write(path, file_bytes).commit({"config.json": {"model_type": "x"}}, [tokenizer])
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == num_files and (path / "model.safetensors.index.json").is_file() == (num_files > 1)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, TENSORS[name].to(STORED[name].dtype))
    assert HuggingFaceFolder(path).weights.keys() == TENSORS.keys()
    assert (path / "tokenizer.json").read_text() == "{}"
    if num_files > 1:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(stored.num_bytes for stored in STORED.values())
    assert not path.with_name("step_000010.tmp").exists()


def test_an_unfinished_folder_has_another_name_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "step_000010"
    write(path, 1000)
    assert os.listdir(tmp_path) == ["step_000010.tmp"]
    write(path, 1000).commit({"config.json": {}})
    write(path, 1).commit({"config.json": {}})
    assert os.listdir(tmp_path) == ["step_000010"] and len(list(path.glob("*.safetensors"))) == 3


def test_a_folder_that_is_being_replaced_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step_000010"
    write(path, 1).commit({"config.json": {}})
    export = write(path, 1000)
    deleted = []
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **how: deleted.append(Path(path).name))
    export.commit({"config.json": {}})
    assert path.name not in deleted and load_file(path / "model.safetensors").keys() == TENSORS.keys()


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = module.shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"has 0\.0 MiB free, step_000010 needs"):
        Export(tmp_path / "step_000010").begin(STORED)
    assert os.listdir(tmp_path) == []


def test_what_else_a_folder_holds(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "quantization_config": {}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    files = FolderFiles.like(tmp_path)
    assert files.content(torch.bfloat16) == {
        "config.json": {
            "model_type": "deepseek_v3",
            "num_nextn_predict_layers": 0,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {"eos_token_id": [1, 2]},
    }
    assert files.copied == (tmp_path / "tokenizer.json",)
    made = FolderFiles.of({"model_type": "x"}, stop_ids=(3,), pad_id=0)
    assert made.config == {"model_type": "x", "eos_token_id": 3, "pad_token_id": 0} and made.copied == ()
