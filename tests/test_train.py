"""`python -m gspo_megatron.train` as a user sees it: what a dry run prints, one clear line for what cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build import trainer as build_trainer
from gspo_megatron.build.inputs import settle
from gspo_megatron.build.trainer import wants_transformer_engine
from gspo_megatron.checkpoint.lock import RunLock
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.device import Device, open_device
from gspo_megatron.device.facts import Gpu, Machine, Package
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.run.stop import STOPPED_BY_GUARD
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import leave_status, main
from tests.support.hugging_face import model_folder

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "examples" / "cpu_tiny_moe.yaml")
SMALL = (
    "precision.device=cpu",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.max_sequence_length=24",
    "model.num_experts=2",
    "rollout.max_new_tokens=8",
    "rollout.prompts_per_step=4",
    "rollout.group_size=2",
    "data.eval_size=4",
    "data.task.max_length=6",
    "data.tokenizer=characters:0123456789>",
)
FROM_FILES = tuple(setting for setting in SMALL if "data.task" not in setting)
CLUSTER = (
    "model.preset=qwen3_30b_a3b",
    "precision.device=cuda",
    "precision.dtype=bf16",
    "train.tokens_per_micro_batch=32768",
    "parallel.tp=4",
    "parallel.pp=2",
    "parallel.ep=8",
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gspo_megatron.train", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120 * time_factor(),
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command gives up, with exit status 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert "Traceback" not in printed.out
    return line


# --- as a process ---


def test_a_folder_that_is_not_a_whole_model_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = load_config(None, ["model.preset=tiny_moe", "model.vocab_size=128"]).model.shape
    folder = model_folder(tmp_path / "model", shape)
    command = [f"model.hf={folder}", "data.tokenizer=characters", f"run.dir={tmp_path / 'run'}", "precision.device=cpu"]
    assert main([*command, "--dry-run"]) == 0
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 7)}, folder / "model.safetensors")
    capsys.readouterr()
    for more in (["--dry-run"], []):
        assert main([*command, *more]) == 2
        assert f"model.safetensors: {name} has size [3, 7], not [" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = command("--config", DEMO, "--dry-run", "--world-size", "2", f"run.dir={run_dir}")
    assert done.returncode == 0, done.stderr
    settings, _, plan = done.stdout.partition("\nother settings have their defaults: --verbose prints all")
    path = tmp_path / "printed.yaml"
    path.write_text(settings)
    resolved = settle(load_config(DEMO, [f"run.dir={run_dir}"]), 2).config
    assert load_config(path) == resolved
    assert len(settings.splitlines()) < 50 and "recompute" not in settings
    clips = "clip ppo (low 0.03, high 0.04)"
    assert f"algorithm: gspo: level sequence_mean, {clips}, aggregate sequence_mean, baseline mean_std, no KL" in plan
    plan = plan.partition("layout: ")[2]
    assert plan.startswith("2 processes = tp 1 x pp 1 x cp 1 x dp 2; experts: ep 2 x etp 1 x edp 1\n")
    m = resolved.model
    assert f"parameters: {count_parameters(m.shape).total:,} in total" in plan
    assert "memory estimate, MiB" in plan and "0.00" not in plan and "a checkpoint has 9.6 MiB; on disk" in plan
    assert not run_dir.exists()


def test_a_layout_that_does_not_fit_ends_with_status_2_and_one_line() -> None:
    done = command("--config", DEMO)
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: etp(1) * ep(2) * pp(1) = 2 does not divide the 1 process; start a")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_one_process_trains_without_torchrun(tmp_path: Path) -> None:
    """With a vocabulary rounded up from 13 to 16, which is said once and is no error."""
    sizes = ("train.steps=2", "train.warm_start_steps=1", "model.vocab_size=16", "logging.tensorboard=false")
    done = command(*SMALL, *sizes, f"run.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    (note,) = [line for line in done.stdout.splitlines() if "vocab" in line]
    assert note.startswith("model.vocab_size=16 exceeds the tokenizer's 13 ids")
    assert [json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert load_config(tmp_path / "config.yaml").model.vocab_size == 16


# --- in this process ---


def test_a_run_that_a_guard_stops_says_what_there_is_to_continue_from(tmp_path: Path) -> None:
    run = (*SMALL, f"run.dir={tmp_path}", "checkpoint.load=latest")
    stops = ("train.steps=2", "guards.stop_on=[equal_rewards]")  # which an untrained model gets
    saved = tmp_path / "checkpoints"
    stopped = command(*run, *stops)
    assert stopped.returncode == STOPPED_BY_GUARD and "GuardError: step 1, equal_rewards: " in stopped.stderr
    assert f"this run had saved no checkpoint in {saved}, so checkpoint.load=latest would start" in stopped.stderr
    assert command(*run, "train.steps=1").returncode == 0
    stopped = command(*run, *stops)
    assert stopped.returncode == STOPPED_BY_GUARD and "GuardError: step 2, equal_rewards: " in stopped.stderr
    assert stopped.stderr.rstrip().endswith(f"the newest checkpoint of this run is {saved / 'step_000001'}")


def test_the_plan_of_a_cluster_is_printed_on_any_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--world-size", "64", *CLUSTER]) == 0
    printed = capsys.readouterr()
    assert "64 processes = tp 4 x pp 2 x cp 1 x dp 8; experts: ep 8 x etp 1 x edp 4" in printed.out
    assert "parameters: 30,532,122,624 in total, 3,353,032,704 active per token" in printed.out
    assert "model.vocab_size=151936 exceeds the tokenizer's 98 ids" in printed.out
    assert "reference" not in printed.out.partition("memory estimate")[2]
    assert printed.err == ""


def test_the_plan_counts_the_reference_that_the_variant_brings(capsys: pytest.CaptureFixture[str]) -> None:
    """gspo_sum has a KL term of its own."""
    assert main(["--dry-run", "--world-size", "64", *CLUSTER, "algorithm.variant=gspo_sum"]) == 0
    printed = capsys.readouterr().out
    assert "clip ppo (low 0.2, high 0.2)" in printed and "KL k3 to the reference with weight 0.01" in printed
    assert "reference" in printed.partition("memory estimate")[2]


def test_a_dry_run_prints_all_settings_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", DEMO, "--dry-run", "--verbose"]) == 0
    settings, _, plan = capsys.readouterr().out.partition("algorithm: gspo:")
    path = tmp_path / "printed.yaml"
    path.write_text(settings)
    assert load_config(path) == settle(load_config(DEMO), 2).config
    assert len(settings.splitlines()) > 100
    # Without --world-size: for as many processes as the demo's layout takes.
    assert "layout: 2 processes" in plan and "processes: 2, the fewest that the layout can have" in plan
    assert main(["--config", DEMO, "--verbose"]) == 2
    assert "--verbose needs --dry-run" in capsys.readouterr().err


def test_a_dry_run_counts_whole_engines_in_the_processes(capsys: pytest.CaptureFixture[str]) -> None:
    engines = ("--config", DEMO, "rollout.engine=vllm_colocated", "engine.tensor_parallel=4", "--dry-run")
    assert main(list(engines)) == 0
    assert "processes: 4, the fewest that the layout can have" in capsys.readouterr().out
    assert "engine.tensor_parallel=4 with rollout.engine=vllm_colocated on 2 processes: each engine takes" in refused(
        capsys, *engines, "--world-size", "2"
    )


def test_a_dry_run_says_whether_a_gpu_has_enough_memory(capsys: pytest.CaptureFixture[str]) -> None:
    large = ("--dry-run", "--world-size", "64", *CLUSTER, "train.tokens_per_micro_batch=131072", "--gpu-memory", "79.6")
    assert main([*large, "parallel.recompute=full", "rollout.max_batch=16"]) == 0
    assert "memory: fits: " in capsys.readouterr().out
    line = refused(capsys, *large)
    assert line.startswith("ConfigError: not enough memory: update needs ") and "parallel.recompute=full (" in line


def test_a_run_that_does_not_fit_ends_before_anything_is_allocated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU with a thousandth of a GiB free."""
    monkeypatch.setattr(Device, "free_memory_gib", lambda self: 0.001)
    run = ("train.steps=0", f"run.dir={tmp_path / 'run'}")
    assert "not enough memory: " in refused(capsys, *SMALL, *run)
    assert not (tmp_path / "run").exists()
    reached: list[str] = []

    def stop_here(*_: object) -> None:
        reached.append("opened")
        raise ConfigError("far enough")

    monkeypatch.setattr("gspo_megatron.train.opened", stop_here)
    assert main([*SMALL, *run, "guards.on_memory=warn"]) == 2
    printed = capsys.readouterr()
    assert reached == ["opened"] and "not enough memory: " in printed.out + printed.err


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("parallel.tp=2",), ("ConfigError: tp(2) * pp(1) * cp(1) = 2 does not divide the 1 process;",)),
        (("optimizer.lrr=1",), ("ConfigError: unknown config key 'optimizer.lrr'; did you mean 'lr'?",)),
        (("precision.dtype=fp33",), ("ConfigError: precision.dtype='fp33' is not one of fp32, bf16, fp64",)),
        (("precision.device=gpu",), ("ConfigError: precision.device='gpu' is not one of auto, cpu, cuda",)),
        (("data.train=task:sort_digit",), ("DataError: unknown task 'sort_digit'; did you mean 'sort_digits'?",)),
        (("data.task={max_lenth: 3}",), ("has no parameter 'max_lenth'; did you mean 'max_length'?",)),
        (
            ("data.train=nowhere/train.jsonl", "data.eval=nowhere/eval.jsonl", "data.task={}"),
            ("DataError: the file nowhere/train.jsonl does not exist",),
        ),
        (("data.tokenizer=nowhere.model",), ("DataError: tokenizer 'nowhere.model' is no file or folder",)),
        (("data.tokenizer=characters:0123",), ("DataError: character '4' at position 4 of '0123456789>'",)),
        (
            ("model.vocab_size=12",),
            ("ConfigError: the tokenizer", "has 13 ids, more than model.vocab_size=12", "set model.vocab_size to 13"),
        ),
        (("reward.functions.exact=1",), ("ConfigError: unknown reward 'exact'",)),
        (("reward.functions.my.rewards:f=1",), ("ConfigError: reward 'my.rewards:f' cannot be used (ModuleNotFound",)),
        (("reward.accuracy=format",), ("ConfigError: reward.accuracy='format' is not one of the rewards exact_match",)),
        (("algorithm.variant=gpso",), ("ConfigError: variant 'gpso' is unknown; did you mean 'gspo'?",)),
        (("algorithm.clip_low=2",), ("ConfigError: clip_low=2.0",)),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_settings_that_cannot_work_end_before_any_process_group(
    capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], parts: tuple[str, ...], dry: bool
) -> None:
    line = refused(capsys, *SMALL, *overrides, *(["--dry-run", "--world-size", "1"] if dry else []))
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "12>", "answer": "12"', "prompts.jsonl:3: not JSON in UTF-8"),
        ('{"promt": "12>", "answer": "12"}', "prompts.jsonl:3: no field 'prompt'; did you mean 'promt'?"),
        ('{"prompt": "12>"}', "prompts.jsonl:3: no field 'answer'"),
        ('{"prompt": "", "answer": "12"}', "prompts.jsonl:3: field 'prompt' is empty"),
        (
            json.dumps({"prompt": "1" * 17, "answer": "1"}),
            "prompts.jsonl:3: the prompt has 17 tokens, the limit is 16 (data.max_prompt_tokens, or what",
        ),
        ('{"prompt": "12?", "answer": "12"}', "prompts.jsonl:3: character '?' at position 2 of '12?'"),
    ],
)
def test_a_bad_line_of_a_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, message: str
) -> None:
    """A context of 24 with 8 new tokens leaves 16 for the prompt."""
    path = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": "1" * 16, "answer": "1"})
    path.write_text(f"{good}\n\n{line}\n")
    assert message in refused(capsys, *FROM_FILES, f"data.train={path}", f"data.eval={path}")
    path.write_text(f"{good}\n")
    assert main([*FROM_FILES, f"data.train={path}", f"data.eval={path}", "--dry-run"]) == 0


def test_files_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    near = DEMO.replace("moe.yaml", "mo.yaml")
    assert f"config file {near!r} does not exist; did you mean {DEMO!r}?" in refused(capsys, "--config", near)
    assert "config file '\\x1b[31m.yaml' does not exist" in refused(capsys, "--config", "\x1b[31m.yaml")
    assert refused(capsys, "\x1b\0=1").startswith("ConfigError: override '\\x1b\\x00=1'")
    path = tmp_path / "config.yaml"
    path.write_text("run: {seed: 1\nmodel: {}\n")
    assert f"config file {str(path)!r} is not YAML" in refused(capsys, "--config", str(path))
    for arguments in (["--world-size", "2"], ["--dry-run", "--world-size", "0"], ["--gpu-memory", "80"], ["--dri-run"]):
        assert main(arguments) == 2
        assert "usage: gspo_megatron.train" in capsys.readouterr().err


def test_transformer_engine_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that has it: a run on the CPU there must not be built from its layers."""
    here, there = open_device("cpu", "fp32"), Device(torch.device("cuda", 0), "nccl", torch.bfloat16, 1, 0)
    bf16 = load_config(None, ["precision.dtype=bf16"])
    for version in (None, "2.20.2"):
        gpus, te = (Gpu("H100", (9, 0), 79.6),), Package(version)
        h100 = Machine(torch=Package("2.14.1"), torch_cuda=(13, 0), gpus=gpus, transformer_engine=te)
        monkeypatch.setattr(build_trainer, "this_process", lambda machine=h100: machine)
        assert not wants_transformer_engine(bf16, here)
        assert wants_transformer_engine(bf16, there) == bool(version)
        assert not wants_transformer_engine(replaced(bf16, {"precision.transformer_engine": "off"}), there)
    monkeypatch.setattr(build_trainer, "this_process", lambda: Machine(torch=Package("2.14.1")))
    for settings in ({"precision.transformer_engine": "on"}, {"precision.fp8": "blockwise"}):
        with pytest.raises(ConfigError, match=r"needs a GPU .* built without CUDA.*; set precision.transformer_engine"):
            wants_transformer_engine(replaced(bf16, settings), here)
        with pytest.raises(ConfigError, match="sees no GPU"):
            wants_transformer_engine(replaced(bf16, settings), there)


def test_the_plan_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    readme = Path(__file__).parents[1].joinpath("README.md").read_text().replace("\\\n", " ")
    (command,) = (line for line in readme.splitlines() if "--dry-run --world-size" in line)
    assert main(command.split("gspo_megatron.train")[1].split()) == 0
    assert "64 processes = tp 4 x pp 1 x cp 1 x dp 16; experts: ep 8" in capsys.readouterr().out


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path):
        message = refused(capsys, f"run.dir={tmp_path}")
    assert f"run.dir={tmp_path} is in use by process {os.getpid()}" in message


def test_the_first_process_to_leave_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_status(2)
    file = tmp_path / "status"
    monkeypatch.setenv("GSPO_STATUS_FILE", str(file))
    leave_status(75)
    leave_status(1)
    assert file.read_text() == "75\n"


def test_a_status_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GSPO_STATUS_FILE", f"{tmp_path}/missing/status")
    leave_status(0)
    assert f"GSPO_STATUS_FILE={tmp_path}/missing/status cannot be written" in capsys.readouterr().err
