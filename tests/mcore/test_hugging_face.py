"""Weights from a Hugging Face folder into any layout and back, to the last bit."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.config.loading import load_config
from gspo_megatron.convert import main as convert
from gspo_megatron.device import open_device
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.hugging_face import MegatronExports, load_folder, save_folder
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.hugging_face import model_folder
from tests.support.transformers_models import MODELS

SIZES = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "head_dim": 8,
    "num_experts": 12,
    "experts_per_token": 3,
    "expert_ffn_size": 20,
    "vocab_size": 509,
    "max_sequence_length": 64,
}


def open_policy(world_size: int, *overrides: str) -> MegatronPolicy:
    config = load_config(None, ["precision.device=cpu", "precision.dtype=fp32", *overrides])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)


def through(
    world_size: int, folder: Path, out: Path, overrides: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> list[str]:
    policy = open_policy(world_size, f"model.hf={folder}", *overrides)
    notes = load_folder(policy, folder)
    save_folder(policy, out, dtype, FolderFiles.like(folder).content(dtype))
    return notes


def refusal(world_size: int, folder: Path) -> str:
    """What loading into a policy says, on this rank."""
    try:
        load_folder(open_policy(world_size, f"model.hf={folder}", "parallel.ep=2"), folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [f"model.{key}={value}" for key, value in SIZES.items()]
    shape = load_config(None, [*overrides, f"model.tie_embeddings={request.param}"]).model.shape
    return model_folder(tmp_path_factory.mktemp("model"), shape)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ("parallel.tp=2",)),
        (2, ("parallel.pp=2",)),
        (2, ("parallel.ep=2",)),
        (4, ("parallel.tp=2", "parallel.ep=2", "parallel.pp=2")),
    ],
    ids=lambda value: " ".join(value) or "one" if isinstance(value, tuple) else None,
)
def test_a_folder_survives_any_layout(
    folder: Path, world_size: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    if tied and "parallel.pp=2" in overrides:
        pytest.skip("tied embeddings on several stages")
    run_distributed(through, world_size, world_size, folder, tmp_path / "out", overrides)
    read, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


def test_every_rank_is_told_what_one_cannot_read(folder: Path, tmp_path: Path) -> None:
    """The expert is held by the second rank only."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.11.up_proj.weight"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}

    def said(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        first, second = run_distributed(refusal, 2, 2, tmp_path)
        assert first == second
        return first

    assert f"there is no {name}, which config.json asks for" in said(kept)
    infinite = said(tensors | {name: torch.full_like(tensors[name], torch.inf)})
    assert f"model.safetensors: {name} holds inf" in infinite and "(process 1)" in infinite


MXFP4 = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 61,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def mxfp4_folder(folder: Path) -> Path:
    """gpt-oss as it is published, by transformers: bf16, and the matrices of experts in MXFP4."""
    import transformers

    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**MXFP4)).bfloat16()
        model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, columns, rows = tensors.pop(name).shape
        size = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, size, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    return folder


def test_published_gpt_oss_is_what_transformers_reads(tmp_path: Path) -> None:
    """MXFP4, on two processes that share the experts; written in bf16, bit for bit what transformers multiplies out,
    and a folder that transformers reads in turn."""
    transformers = pytest.importorskip("transformers")
    folder, out = mxfp4_folder(tmp_path / "model"), tmp_path / "out"
    assert convert(["inspect", str(folder)]) == 0
    notes = run_distributed(through, 2, 2, folder, out, ("parallel.ep=2", "precision.dtype=bf16"), torch.bfloat16)
    assert notes == [[], []]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (
            transformers.GptOssForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **how)
            for path, how in (
                (folder, {"quantization_config": transformers.Mxfp4Config(dequantize=True)}),
                (out, {}),
            )
        )
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    read = load_file(out / "model.safetensors")
    assert read.keys() == theirs.state_dict().keys() and "model.layers.0.mlp.experts.gate_up_proj" in read
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(read[name], tensor) and torch.equal(ours.state_dict()[name], tensor), name


def predicting_folder(folder: Path, family: str) -> Path:
    """A model that transformers writes, and a layer after its last one, as the files of GLM-4.5 and DeepSeek-V3 have
    it: the layer's own tensors, two norms, a projection of both inputs, and copies of embedding and head."""
    import transformers

    about = MODELS[family]
    torch.manual_seed(4)
    config = getattr(transformers, f"{about.architecture}Config")(**about.sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{about.architecture}ForCausalLM")(config)
        model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last, depth, h = f"model.layers.{config.num_hidden_layers - 1}.", config.num_hidden_layers, config.hidden_size
    beyond = f"model.layers.{depth}."
    copied = {name.replace(last, beyond): x.clone() for name, x in tensors.items() if name.startswith(last)}
    vectors = {f"{beyond}{name}.weight": torch.ones(h) for name in ("enorm", "hnorm", "shared_head.norm")}
    vocabulary = tensors["lm_head.weight"]
    matrices = {
        f"{beyond}eh_proj.weight": torch.zeros(h, 2 * h),
        **{f"{beyond}{name}.weight": vocabulary.clone() for name in ("embed_tokens", "shared_head.head")},
    }
    save_file(tensors | copied | vectors | matrices, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_nextn_predict_layers": 1}))
    return folder


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_layers_that_predict_further_tokens_are_left_out(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And named. What is written is what transformers reads, to the last bit and without a warning."""
    transformers = pytest.importorskip("transformers")
    folder, out = predicting_folder(tmp_path / "model", family), tmp_path / "out"
    assert convert(["inspect", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"left out: model\.layers\.4\.eh_proj.* more: layer 4 predicts several tokens at once", said)
    [notes] = run_distributed(through, 1, 1, folder, out, ())
    assert [note.partition(" and ")[0] for note in notes] == [
        "left out: model.layers.4.eh_proj.weight, model.layers.4.embed_tokens.weight, model.layers.4.enorm.weight"
    ]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    warned: list[str] = []
    heard = logging.Handler()
    heard.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.get_logger("transformers").addHandler(heard)
    try:
        with warnings.catch_warnings(record=True) as python_warned:
            warnings.simplefilter("always")
            _, about = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    finally:
        transformers.utils.logging.get_logger("transformers").removeHandler(heard)
    assert not warned and not [w for w in python_warned if "transformers" in w.filename]
    assert not any(about.values())
    theirs, read = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert read.keys() == {name for name in theirs if ".layers.4." not in name}
    assert all(torch.equal(read[name], theirs[name]) for name in read)
    assert convert(["inspect", str(out)]) == 0 and "left out" not in capsys.readouterr().out


def exported(_: int, run: Path, calls: list[tuple[str, int]], settings: tuple[str, ...]) -> list[str]:
    policy = open_policy(1, *(f"model.{key}={value}" for key, value in SIZES.items()), f"run.dir={run}", *settings)
    files = FolderFiles.of({"model_type": "qwen3_moe"}, (1,), 0)
    written: list[str] = []
    exports = MegatronExports(policy, files, written.append)
    for name, step in calls:
        getattr(exports, name)(step)
    return [line.rpartition("/")[2] for line in written]


def test_what_is_rounded_is_said(folder: Path, tmp_path: Path) -> None:
    """A folder in float32, into a policy in bf16."""
    [[note]] = run_distributed(through, 1, 1, folder, tmp_path / "out", ("precision.dtype=bf16",))
    matrices = sum(x.dim() > 1 for x in load_file(folder / "model.safetensors").values())
    assert note == f"F32 of {matrices} matrices is rounded to bf16, also the values that are trained"


def test_when_folders_are_written(tmp_path: Path) -> None:
    def folders(*calls: tuple[str, int], settings: tuple[str, ...]) -> list[str]:
        return run_distributed(exported, 1, 1, tmp_path, list(calls), settings)[0]

    steps = (("after", 1), ("after", 2), ("after", 3), ("at_end", 3))
    assert folders(*steps, settings=("train.hf_every=2", "train.hf_at_end=on")) == ["step_000002", "step_000003"]
    assert folders(*steps, settings=("train.hf_every=3", "train.hf_at_end=on")) == ["step_000003"]
    assert folders(*steps, settings=()) == []
    # Started again with nothing left to do: the folder stays as it is.
    assert folders(("at_end", 3), settings=("train.hf_at_end=on",)) == []
    assert folders(("at_end", 4), settings=("train.hf_at_end=on",)) == ["step_000004"]
    stored = load_file(tmp_path / "hf" / "step_000004" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
