"""The planner's command: a table, a file that a dry run accepts, and refusals in words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from plan_layout import main

from gspo_megatron.config.loading import load_config
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.train import main as train

ARGUMENTS = ["--gpus", "32", "--prompt", "1000", "--response", "4000", "--rows", "3"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_it_writes_is_a_run(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run's memory is the planner's."""
    path = tmp_path / "run.yaml"
    command = ["--model", "qwen3_30b_a3b", *ARGUMENTS, "--precision", precision, "--price", "2", "--write", str(path)]
    assert main([*command, "optimizer.lr=3e-6"]) == 0
    printed = capsys.readouterr().out
    assert "predictions" in printed.splitlines()[0]
    assert re.search(
        r"cost: \d+\.\d+ GPU-hours a step, .*; \d+\.\d\d at 2\.0 per GPU-hour a step|cost: .* at 2\.0", printed
    )
    peak = max(float(x) for x in re.findall(r"total (\d+\.\d\d) GiB", printed))
    assert train(["--config", str(path), "--dry-run", "--world-size", "32", "--gpu-memory", "79.6"]) == 0
    plan = capsys.readouterr().out
    assert "memory: fits" in plan
    assert max(float(x) for x in re.findall(r"total (\d+\.\d\d)$", plan, re.MULTILINE)) == peak
    config = load_config(str(path), [])
    assert (config.precision.fp8 == "blockwise") == (precision == "fp8")
    assert config.optimizer.lr == 3e-6 and config.model.max_sequence_length == 5008


def test_what_a_newcomer_would_miss_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that is the demo's, sequences that the model was not trained for, and the recipe of another GPU."""
    path = tmp_path / "run.yaml"
    command = ["--model", "qwen3_30b_a3b", "--gpus", "16", "--gpu", "b200", "--precision", "fp8", "--rows", "1"]
    assert main([*command, "--response", "40000", "--write", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "until you set data.train in it, a run trains the demo's task:sort_digits" in printed
    assert "warning: model.max_sequence_length=41024 exceeds the 32,768 tokens" in printed and "RoPE" in printed
    assert "train: task:sort_digits  # the demo's; set your own" in path.read_text()
    assert load_config(str(path), []).precision.fp8 == "mxfp8"
    assert main([*command, "--write", str(path), "data.train=mine.jsonl", "data.eval=held_out.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "demo" not in printed and "RoPE" not in printed and "demo" not in path.read_text()


def test_another_row_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    assert (
        main(["--model", "qwen3_235b_a22b", "--gpus", "128", "--choose", "2", "--rows", "2", "--write", str(path)]) == 0
    )
    table = capsys.readouterr().out.splitlines()
    second = next(line for line in table if line.startswith("  2  "))
    config = load_config(str(path), [])
    for axis in ("tp", "pp", "cp", "ep"):
        size = getattr(config.parallel, axis)
        assert size == 1 or re.search(rf"\b{axis}{size}\b", second)


def test_a_folder_is_as_good_as_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = load_config(None, ["model.preset=qwen3_30b_a3b"]).model.shape
    (tmp_path / "config.json").write_text(json.dumps(family_of(shape).hf_config(shape)))
    tables = []
    for model in (str(tmp_path), "qwen3_30b_a3b"):
        assert main(["--model", model, *ARGUMENTS]) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")])
    assert tables[0] == tables[1] and len(tables[0]) == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "qwen4", "--gpus", "8"], "--model qwen4 is neither a preset (tiny_moe, "),
        (
            ["--model", "qwen3_235b_a22b", "--gpus", "8"],
            "no layout of 8 h100 holds 235,093,634,560 parameters and sequences of 9,216 tokens in 73.6 GiB",
        ),
        (["--model", "qwen3_30b_a3b", "--gpus", "32", "--gpu", "a100", "--precision", "fp8"], "--gpu a100 has no FP8"),
        (["--model", "tiny_moe", "--gpus", "8"], "--model tiny_moe has no vocabulary size"),
        (["--model", "qwen3_30b_a3b", "--gpus", "8", "rollout.topk=1"], "rollout.topk"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: ") and complaint in error


def test_a_family_that_is_not_implemented_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["--model", str(tmp_path), "--gpus", "8"]) == 2
    assert f"model_type='llama'; implemented: {', '.join(FAMILIES)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--gpus", "0", "--gpus 0 must be at least 1"),
        ("--gpus", "-8", "--gpus -8 must be at least 1"),
        ("--prompt", "-5", "--prompt -5 must be at least 1"),
        ("--rows", "0", "--rows 0 must be at least 1"),
        ("--gpu-memory", "0", "--gpu-memory 0 must be above 0"),
        ("--mean-response", "9000", "--mean-response 9000 exceeds the longest, --response 4000"),
    ],
)
def test_an_amount_that_no_run_has(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "qwen3_30b_a3b", *ARGUMENTS, option, value]) == 2
    assert capsys.readouterr().err == f"ConfigError: {message}\n"


@pytest.mark.parametrize(("text", "found"), [("{oops", "is not JSON in UTF-8"), ("[]", "holds list")])
def test_a_broken_folder_is_named(text: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["--model", str(tmp_path), *ARGUMENTS]) == 2
    assert re.match(rf"ConfigError: .*config\.json {found}", capsys.readouterr().err)
