"""Hugging Face folders: what is read of them, and what is refused, by file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.stored import all_finite

WHOLE = (slice(None), slice(None))
TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b.weight": torch.ones(2, 2, dtype=torch.bfloat16)}


def write(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 2, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_two_files(folder: Path) -> Path:
    write(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        weight_map[name] = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("writer", [write, write_two_files])
def test_slices_are_those_of_the_tensor(writer: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = HuggingFaceFolder(writer(tmp_path / "model"))
    assert torch.equal(folder.read("a.weight")[1:3, :], TENSORS["a.weight"][1:3])
    assert torch.equal(folder.read("a.weight")[:, 2:], TENSORS["a.weight"][:, 2:])
    assert folder.read("b.weight")[WHOLE].dtype == torch.bfloat16
    assert folder.weights.keys() == TENSORS.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_numbers_are_told_from_others_for_every_pattern_of_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[torch.isfinite(every)]
    assert all_finite(finite) and all_finite(finite[finite < 0]) and all_finite(finite.view(-1, 2)[:, 1:])
    assert not any(all_finite(number) for number in every[~torch.isfinite(every)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_one_number_that_is_not_finite_is_found(number: float, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([[limits.max, -0.0, limits.tiny], [limits.min, 1.0, -1.0]], dtype=dtype)
    assert all_finite(numbers) and all_finite(numbers[:0])
    numbers[1, 1] = torch.tensor(number, dtype=dtype)
    assert not all_finite(numbers) and all_finite(numbers[:, ::2])
    numbers.neg_()
    assert not all_finite(numbers)


def test_layers_that_predict_several_tokens_are_left_out_of_qwen3_next(tmp_path: Path) -> None:
    folder = HuggingFaceFolder(write(tmp_path))
    assert folder.left_out("mtp.layers.0.x") is None
    folder.config["model_type"] = "qwen3_next"
    assert "several tokens" in (folder.left_out("mtp.layers.0.x") or "")
    assert folder.left_out("model.layers.0.x") is None


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def lie(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[4,3]", b"[4,9]"))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_an_index(weight_map: object) -> Callable[[Path], None]:
    def write_index(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write_index


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors cannot be read: it is truncated"),
        (lie, "model.safetensors cannot be read"),
        (without_weights, "has neither model.safetensors nor model.safetensors.index.json"),
        (with_a_pickle, "pytorch_model.bin.*save_pretrained"),
        (with_an_index({"a.weight": "gone.safetensors"}), "index.json names gone.safetensors, which is not in"),
        (with_an_index({"c.weight": "model.safetensors"}), "says that c.weight is in model.safetensors, and it is not"),
        (with_an_index({"a.weight": "../model.safetensors"}), "no weight_map from tensors to files of this folder"),
        (with_an_index([1]), "no weight_map"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceFolder(tmp_path)


def test_a_tensor_that_cannot_be_used(tmp_path: Path) -> None:
    tensors = TENSORS | {"nan": torch.tensor([1.0, float("nan")]), "int": torch.tensor([1])}
    folder = HuggingFaceFolder(write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"has no tensor 'c\.weight'; did you mean 'b\.weight'\?"):
        folder.read("c.weight")
    with pytest.raises(CheckpointError, match="int has the number format I64"):
        folder.read("int")
    with pytest.raises(CheckpointError, match=r"nan holds nan.*model\.hf_allow_nan=true"):
        folder.read("nan")[(slice(None),)]
    assert HuggingFaceFolder(tmp_path, allow_nan=True).read("nan")[(slice(0, 2),)].isnan().any()
    assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()


def test_rows_are_read_to_where_they_belong(tmp_path: Path) -> None:
    weight = HuggingFaceFolder(write(tmp_path, TENSORS | {"nan": torch.tensor([1.0, float("nan")])})).weights
    stored = weight["a.weight"].stored[0]
    into = torch.full((4, 3), 7.0)
    assert stored.read_rows(1, 3, into[1:3])
    assert torch.equal(into[1:3], TENSORS["a.weight"][1:3]) and (into[[0, 3]] == 7).all()
    # Where a copy has to convert or to leave gaps, the caller makes one.
    assert not stored.read_rows(0, 4, torch.empty(4, 3, dtype=torch.bfloat16))
    assert not stored.read_rows(0, 4, torch.empty(4, 6)[:, :3])
    with pytest.raises(CheckpointError, match="nan holds nan"):
        weight["nan"].stored[0].read_rows(0, 2, torch.empty(2))
    cut(tmp_path)
    with pytest.raises(CheckpointError, match="ends early; another process changed the file"):
        for each in weight.values():
            each.stored[0].read_rows(0, each.get_shape()[0], torch.empty(each.get_shape(), dtype=torch.float32))
            each.stored[0].read_rows(0, each.get_shape()[0], torch.empty(each.get_shape(), dtype=torch.bfloat16))
