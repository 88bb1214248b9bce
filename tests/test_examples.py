"""The recipes of examples/ for clusters: each fits its GPUs on paper, and its layout, shrunk, changes no gradient.
Those that start from a folder get one with the published sizes, a tokenizer made here, and files of weights that are
holes after their headers, so that they take no space."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from check_layout import main as check_layout

from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.layout.hardware import GPUS
from gspo_megatron.models.families import family_of
from gspo_megatron.train import main
from tests.support.families import HUB_SIZES
from tests.support.hugging_face import tokenizer_folder

ROOT = Path(__file__).parents[1]
RECIPES = {"qwen3_0p6b": 8, "qwen3_30b_a3b_gspo": 32, "qwen3_235b_a22b_gspo": 128, "deepseek_v3_gspo": 512}
"""GPUs of each recipe."""
FROM_FOLDERS = {"qwen3_0p6b": "qwen3_0p6b", "qwen3_30b_a3b_gspo": "qwen3_30b_a3b"}
"""The presets with the sizes of the folders that recipes start from."""


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts are named from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By recipe, the settings that name its folder."""
    made = {}
    for name, preset in FROM_FOLDERS.items():
        folder = tokenizer_folder(tmp_path_factory.mktemp(name))
        shape = load_config(None, [f"model.preset={preset}"]).model.shape
        (folder / "config.json").write_text(json.dumps(family_of(shape).hf_config(shape)))
        write_holes(folder, HUB_SIZES[shape.family](shape))
        made[name] = [f"model.hf={folder}"]
    return made


def write_holes(folder: Path, sizes: dict[str, tuple[int, ...]]) -> None:
    """The safetensors files of a model in bf16 without data: the length of a header, names and places, nothing."""
    files: dict[str, list[str]] = {}
    for name in sizes:
        files.setdefault("-".join(name.split(".")[:3]) + ".safetensors", []).append(name)
    for file, names in files.items():
        end, header = 0, {}
        for name in names:
            begin, end = end, end + 2 * math.prod(sizes[name])
            header[name] = {"dtype": "BF16", "shape": sizes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_every_recipe_is_listed() -> None:
    on_gpus = {
        path.stem
        for path in (ROOT / "examples").glob("*.yaml")
        if load_config(path, ["model.hf=null"]).precision.device != "cpu"
    }
    assert on_gpus == RECIPES.keys()


@pytest.mark.parametrize("fp8", ["none", "blockwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(
    name: str, fp8: str, folders: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, gpus = f"examples/{name}.yaml", RECIPES[name]
    arguments = ["--config", path, "--dry-run", "--world-size", str(gpus), f"precision.fp8={fp8}"]
    arguments += folders.get(name, [])
    assert main([*arguments, "--gpu-memory", str(GPUS["h100"].memory_gib)]) == 0
    printed = capsys.readouterr().out
    assert "memory: fits: " in printed and f"layout: {gpus} processes" in printed
    assert main([*arguments, "--gpu-memory", "24"]) == 2
    # The commands at its head are these.
    head = (ROOT / path).read_text().split("run:")[0]
    assert f"--config {path} --dry-run --world-size {gpus} --gpu-memory 79.6" in head
    assert f"tools/check_layout.py --config {path} --max-processes 8" in head


@pytest.mark.parametrize("name", FROM_FOLDERS)
def test_a_recipe_without_its_folder(
    name: str, folders: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Says in a line what to do; and that can be done."""
    path = f"examples/{name}.yaml"
    assert main(["--config", path, "--dry-run", "--world-size", str(RECIPES[name])]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "give the folder of a Hugging Face model" in line and "model.hf=null model.preset=NAME" in line
    overrides = (ROOT / path).read_text().partition("without it: ")[2].partition("\n")[0].split()
    assert main(["--config", path, "--dry-run", "--world-size", str(RECIPES[name]), *overrides]) == 0
    assert load_config(path, overrides).model.shape == load_config(path, folders[name]).model.shape


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_gspo_as_published(name: str, folders: dict[str, list[str]]) -> None:
    config = load_config(f"examples/{name}.yaml", folders.get(name, []))
    assert (config.algorithm.variant, config.algorithm.clip_low, config.algorithm.clip_high) == ("gspo", 3e-4, 4e-4)
    # What its prompts ask for is what its reward looks for.
    prompt = settle(config, RECIPES[name]).train_prompts[0]
    assert "final answer within \\boxed{}." in prompt.text and [*config.reward.functions] == ["boxed"]
    assert prompt.text.startswith("<|im_start|>user") == (name in FROM_FOLDERS)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "qwen3_0p6b"])
def test_the_layout_of_a_recipe_changes_no_gradient(
    name: str, folders: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """That of qwen3_0p6b is data-parallel."""
    arguments = ["--config", f"examples/{name}.yaml", "--max-processes", "8", *folders.get(name, [])]
    assert check_layout(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nEQUAL\n")
    assert ("stages of unequal depth" in printed) == (name != "qwen3_30b_a3b_gspo")
