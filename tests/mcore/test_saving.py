"""A run that stops and continues equals one that never stopped: through the command, on two processes that share
experts.

Every start of the command is a new pair of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gspo_megatron.testing.commands import forked, metrics, rollouts

CONFIG = """
run: {seed: 3}
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 16, init_std: 0.2}
parallel: {ep: 2}
precision: {device: cpu, dtype: fp32}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 2}, eval_size: 8,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 4}
algorithm: {clip_low: 1.0e-2, clip_high: 1.0e-2, kl_coef: 0.05, updates_per_rollout: 2}
optimizer: {lr: 3.0e-3, weight_decay: 0.1, lr_warmup_updates: 6}
train: {steps: 4, warm_start_steps: 30, warm_start_lr: 1.0e-2, eval_every: 2, tokens_per_micro_batch: 64}
checkpoint: {save_every: 2}
logging: {tensorboard: false, rollouts_per_step: -1}
"""


def start(run: Path, *overrides: str, num_processes: int = 2) -> list[tuple[int, str]]:
    run.mkdir(exist_ok=True)
    config = run.parent / "config.yaml"
    config.write_text(CONFIG)
    return forked(num_processes, ["--config", str(config), f"run.dir={run}", *overrides])


def train(run: Path, *overrides: str, num_processes: int = 2) -> None:
    for status, errors in start(run, *overrides, num_processes=num_processes):
        assert status == 0, errors


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, "checkpoint.load=latest")
    return run


def test_without_a_checkpoint_latest_is_a_fresh_start(whole: Path) -> None:
    assert [row["step"] for row in metrics(whole)] == [0, 1, 2, 3, 4]
    assert checkpoints(whole) == ["latest", "step_000002", "step_000004"]
    assert (whole / "checkpoints" / "latest").read_text() == "step_000004\n"
    about = json.loads((whole / "checkpoints" / "step_000002" / "run.json").read_text())
    assert about["state"]["position"] == [30, 2, 0] and about["has_reference"]
    assert (about["policy_version"], about["adam_step"], about["num_files"]) == (4, 34, 2)


def test_two_steps_and_two_more_are_four(whole: Path, tmp_path: Path) -> None:
    """Bit for bit: the optimizer's moments, the learning rate's place, the reference and the order of prompts come
    back."""
    run = tmp_path / "run"
    train(run, "train.steps=2")
    assert metrics(run) == metrics(whole)[:3]
    train(run, "checkpoint.load=latest")
    assert metrics(run) == metrics(whole) and rollouts(run) == rollouts(whole)
    assert metrics(whole)[4]["kl/ref"] > 0 and metrics(whole)[4]["reward/std"] > 0
    assert not (run / "metrics.replaced.jsonl").exists()


def test_an_earlier_checkpoint_by_its_path(whole: Path, tmp_path: Path) -> None:
    """Rows past it are moved aside and written anew. What is saved from there on is kept, though the checkpoints of the
    run's former future bear higher numbers."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(run, f"checkpoint.load={run}/checkpoints/step_000002", "train.steps=3", "checkpoint.keep=1")
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics(run, "metrics.replaced.jsonl")] == [3, 4]
    same = metrics(whole)[3]
    assert {k: v for k, v in metrics(run)[3].items() if k in same} == same
    assert (run / "checkpoints" / "latest").read_text() == "step_000003\n"
    assert (run / "checkpoints" / "step_000003" / "run.json").is_file()
    assert "step_000002" not in checkpoints(run)


@pytest.mark.parametrize(
    ("num_processes", "settings"),
    [
        (2, ("precision.dtype=bf16", "parallel.tp=2", "parallel.ep=1")),
        (2, ("precision.dtype=fp64", "parallel.pp=2", "parallel.ep=1")),
        (1, ("precision.dtype=bf16", "optimizer.distributed=false", "parallel.ep=1")),
    ],
)
def test_other_formats_layouts_and_optimizers(num_processes: int, settings: tuple[str, ...], tmp_path: Path) -> None:
    """The second step, done again from the checkpoint of the first, is the same step."""
    run = tmp_path / "run"
    train(run, "train.steps=2", "checkpoint.save_every=1", *settings, num_processes=num_processes)
    once = metrics(run)
    train(
        run, "train.steps=2", f"checkpoint.load={run}/checkpoints/step_000001", *settings, num_processes=num_processes
    )
    assert metrics(run) == once and once[2]["grad_norm"] > 0
    assert metrics(run, "metrics.replaced.jsonl") == once[2:]


@pytest.mark.parametrize(
    ("num_processes", "layout"),
    [(1, ("parallel.ep=1",)), (2, ("parallel.ep=1", "parallel.tp=2")), (2, ("parallel.ep=1", "parallel.pp=2"))],
)
def test_another_layout(num_processes: int, layout: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    """tests/test_checkpoint_layouts.py has more of them. What differs is the rounding of sums over ranks."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    saved = f"checkpoint.load={run}/checkpoints/step_000002"
    train(run, saved, "train.steps=3", *layout, num_processes=num_processes)
    same = metrics(whole)[3]
    assert {k: v for k, v in metrics(run)[3].items() if k in same} == pytest.approx(same, rel=1e-4, abs=1e-4)


def test_waiting_for_the_files_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, "checkpoint.asynchronous=false")
    assert metrics(run) == metrics(whole)
    for file in sorted((whole / "checkpoints").glob("step_*/*.safetensors")):
        assert (run / file.relative_to(whole)).read_bytes() == file.read_bytes(), file.name


def test_what_cannot_be_loaded(whole: Path, tmp_path: Path) -> None:
    """Exit status 2, the place and the reason, before anything is written."""
    run = tmp_path / "run"
    saved = f"{whole}/checkpoints/step_000004"
    for status, errors in start(run, f"checkpoint.load={tmp_path}/nothing"):
        assert status == 2 and f"CheckpointError: checkpoint.load='{tmp_path}/nothing'" in errors
    for status, errors in start(run, f"checkpoint.load={saved}", "model.hidden_size=24"):
        assert status == 2 and f"{saved} holds another model, with model.hidden_size=16, not 24" in errors
    assert [path.name for path in run.iterdir()] == ["run.lock"]


def test_a_reference_that_was_never_frozen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, "train.steps=1", "algorithm.kl_coef=0")
    for status, errors in start(run, f"checkpoint.load={run}/checkpoints/step_000001", "train.steps=2"):
        assert status == 2 and "that run had no reference policy" in errors and "set algorithm.kl_coef=0" in errors
