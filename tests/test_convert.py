"""`python -m gspo_megatron.convert`: a run's checkpoint as a Hugging Face folder, without a model; folders inspected,
and verified by transformers where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron import build
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.build.convert import to_folder
from gspo_megatron.checkpoint.conversion import CheckpointWeights
from gspo_megatron.convert import main
from gspo_megatron.monitor.console import Console
from gspo_megatron.testing.commands import forked
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.train import main as train
from tests.support.hugging_face import tokenizer_folder
from tests.test_score import COMMON, FAMILIES

LAYOUTS = {"qwen3_moe": ("parallel.tp=2", "parallel.ep=2"), "deepseek_v3": ("parallel.pp=2",)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on two processes, which wrote its model as a folder, too."""
    base = tmp_path_factory.mktemp(request.param)
    settings = [
        s for s in (*FAMILIES[request.param], *COMMON) if not s.startswith(("model.vocab_size", "data.tokenizer"))
    ]
    tokenizer = f"data.tokenizer={tokenizer_folder(base / 'tokenizer')}"
    more = [tokenizer, "model.vocab_size=387", "train.hf_at_end=on", f"run.dir={base / 'run'}"]
    for status, errors in forked(2, [*settings, *LAYOUTS[request.param], *more], command=train):
        assert status == 0, errors
    return base / "run"


def convert(run: Path, out: Path, *more: str) -> None:
    assert main(["to-hf", str(run), str(out), *more]) == 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_becomes_the_folder_that_the_run_wrote(run: Path, tmp_path: Path) -> None:
    """Byte for byte, though one comes from shards in files and the other from the model on its layout."""
    convert(run, tmp_path / "out")
    ours, theirs = content(tmp_path / "out"), content(run / "hf" / "step_000001")
    assert ours.keys() == theirs.keys() and "tokenizer.json" in ours and "chat_template.jinja" in ours
    assert [name for name in ours if ours[name] != theirs[name]] == []
    convert(run / "checkpoints" / "step_000001", tmp_path / "again", "--dtype", "fp32")
    wide, narrow = load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(wide[name].to(narrow[name].dtype), narrow[name]) for name in wide)
    assert {x.dtype for x in wide.values()} == {torch.float32}


class Cut(Exception):
    pass


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_an_interrupted_conversion_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ("--max-file-gb", "2e-6")
    convert(run, tmp_path / "whole", *many)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 10
    out, written = tmp_path / "out", 0
    write = CheckpointWeights.write

    def cut_off(self: CheckpointWeights, export: Any, tell: Callable[[int], None]) -> None:
        def counted(count: int) -> None:
            nonlocal written
            written += 1
            if written == 40:
                raise Cut
            tell(count)

        write(self, export, counted)

    monkeypatch.setattr(CheckpointWeights, "write", cut_off)
    with pytest.raises(Cut):
        convert(run, out, *many)
    assert not out.exists() and out.with_name("out.tmp").is_dir()
    kept = {path.name: path.stat().st_ino for path in out.with_name("out.tmp").glob("*.safetensors")}
    monkeypatch.undo()
    shutil.copytree(out.with_name("out.tmp"), tmp_path / "other.tmp")
    capsys.readouterr()
    convert(run, out, *many)
    assert re.search(r"^\d+ of \d+ tensors were written before", capsys.readouterr().out, re.MULTILINE)
    assert content(out) == content(tmp_path / "whole")
    again = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert sum(again[name] == number for name, number in kept.items()) >= len(kept) - 1 > 2
    # What is left of another conversion is not used.
    convert(run, tmp_path / "other", "--dtype", "fp32", *many)
    assert "written before" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "whole"]


# --- inspect ---


def changed(run: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(run / "hf" / "step_000001", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_whole_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run / "hf" / "step_000001")]) == 0
    said = capsys.readouterr().out
    family = json.loads((run / "hf/step_000001/config.json").read_text())["model_type"]
    assert said.startswith(f"family {family}: num_layers 2, hidden_size 16")
    stored = load_file(run / "hf" / "step_000001" / "model.safetensors")
    total = sum(x.numel() for name, x in stored.items() if "correction_bias" not in name)
    assert f"\nparameters: {total:,}, of which a token passes through" in said
    assert "left out" not in said and said.endswith(
        "\nthis is a whole model, by its headers; its numbers were not read\n"
    )
    # On a terminal of 80 columns no name is broken.
    assert max(map(len, said.splitlines())) <= 80
    assert "\n -> decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight\n" in said


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda t: t.pop(EXPERT), rf"there is no {EXPERT}, which config\.json asks for"),
        (lambda t: t.update({EXPERT: torch.zeros(3, 7)}), rf"{EXPERT} has size \[3, 7\], not \[\d+, 16\]"),
    ],
)
def test_what_is_wrong_with_a_folder(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    alter: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:
    assert main(["inspect", str(changed(run, tmp_path / "folder", alter))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.search(message, re.sub(r"\n +", " ", "\n".join(lines)))
    assert re.fullmatch(r"not a whole model: \d+ problems; [\d,]+ of [\d,]+ parameters can be used", lines[-1])


# --- verify ---


def verified(folder: Path, text: Path) -> int:
    return main(["verify", str(folder), "--text", str(text), "--tolerance", "5e-5"])


def test_transformers_verifies_a_folder(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text").write_text("What is 12 plus 30? 42, because 1 < 2.")
    convert(run, tmp_path / "out", "--dtype", "fp32")
    assert run_distributed(verified, 1, tmp_path / "out", tmp_path / "text", like_torchrun=True) == [0]


def verified_by_others(folder: Path) -> tuple[int, str]:
    """Against other log-probs than transformers has."""
    with (
        patch.object(build.convert, "transformers_log_probs", lambda _, tokens: [-1.0] * (len(tokens) - 1)),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        return main(["verify", str(folder)]), said.getvalue()


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_a_difference_is_shown_where_it_is_largest(run: Path) -> None:
    folder = run / "hf" / "step_000001"
    [(status, said)] = run_distributed(verified_by_others, 1, folder, like_torchrun=True)
    assert status == 1
    assert re.search(r"31 tokens: the worst difference .* at token \d+ \(.* here, -1\.00000 by transformers\)", said)


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_verify_needs_transformers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(run / "hf" / "step_000001")]) == 2
    assert "ConfigError: transformers is not installed" in capsys.readouterr().err


# --- what is refused ---


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_what_cannot_be_converted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    (tmp_path / "there").mkdir()
    assert "there exists already" in refused("to-hf", str(run), str(tmp_path / "there"))
    assert "is not a checkpoint: the directory does not exist" in refused("to-hf", str(tmp_path / "no"), "x")
    assert "there is no" in refused("inspect", str(tmp_path / "there"))
    assert "config.json is missing" in refused(
        "to-hf", str(run), str(tmp_path / "out"), "--like", str(tmp_path / "there")
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints" / "step_000001", damaged)
    file = damaged / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "rank_00001.safetensors has" in refused("to-hf", str(damaged), str(tmp_path / "out"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    damaged.rename(tmp_path / "run" / "checkpoints" / "step_000001")
    assert "has no intact checkpoint: " in refused("to-hf", str(tmp_path / "run"), str(tmp_path / "out"))
    older = tmp_path / "run" / "checkpoints" / "step_000001"
    newer = older.rename(older.with_name("step_000002"))
    shutil.copytree(run / "checkpoints" / "step_000001", older)
    (newer / "manifest.json").unlink()
    message = refused("to-hf", str(tmp_path / "run"), str(tmp_path / "out"))
    assert f"newer checkpoints are damaged: {newer}" in message and f"to-hf {older} OUT" in message
    assert not (tmp_path / "out").exists()
    # Asked for by its name, the older one is taken, and the last line says which it was.
    assert main(["to-hf", str(older), str(tmp_path / "older")]) == 0
    assert f"{tmp_path / 'older'}: step_000001, " in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_the_tokenizer_has_moved(run: Path, tmp_path: Path) -> None:
    tokenizer = run.parent / "tokenizer"
    tokenizer.rename(run.parent / "moved")
    try:
        with pytest.raises(
            CheckpointError, match=r"what the run used is not here any more: .*name a folder.*by --like"
        ):
            to_folder(run, tmp_path / "out", Console(on=False))
        to_folder(run, tmp_path / "out", Console(on=False), like=run / "hf" / "step_000001")
    finally:
        (run.parent / "moved").rename(tokenizer)
    assert content(tmp_path / "out") == content(run / "hf" / "step_000001")
