"""A run on Transformer Engine's layers equals one on local layers: sampling, rewards, updates, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.build import trainer as build_trainer
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.monitor.console import Console
from gspo_megatron.testing.local_ranks import run_distributed
from tests.te.bench import te_attends_in_float32

pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(not te_attends_in_float32(), reason="no packed attention in float32"),
]
DEMO = Path(__file__).parents[2] / "examples" / "cpu_tiny_moe.yaml"
SMALL = (
    "model.num_layers=2",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "train.warm_start_steps=6",
    "train.eval_every=0",
    "data.eval_size=8",
    "algorithm.updates_per_rollout=2",
    "logging.tensorboard=false",
    "reward.functions.tests.te.test_run:share_of_even=1.0",
)


def share_of_even(*, prompt: str, response: str, answer: str) -> float:
    """Differs within almost every group, also before anything is learned."""
    return sum(character in "02468" for character in response) / max(len(response), 1)


def run(layers: str, directory: str, steps: int, load: str) -> None:
    """The demo with these layers, up to step `steps`."""
    build_trainer.wants_transformer_engine = lambda config, device: layers == "te"
    overrides = [*SMALL, f"run.dir={directory}", f"train.steps={steps}", f"checkpoint.load={load}"]
    config = load_config(str(DEMO), overrides)
    device = open_device("cpu", "fp32")
    with build_trainer.open_trainer(settle(config, device.world_size), device, Console(on=False)) as trainer:
        trainer.run()


def steps_of(directory: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


def rollouts_of(directory: Path, step: int) -> list[Any]:
    lines = (directory / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return sorted((row["id"], row["tokens"], row["reward"]) for row in map(json.loads, lines))


def test_one_step_and_checkpoints_of_either_kind(tmp_path: Path) -> None:
    """Step 1 on each kind, then step 2 on each kind from the checkpoint of the other."""
    folders = {}
    for layers, other in (("local", "te"), ("te", "local")):
        own, crossed = tmp_path / layers, tmp_path / f"{layers}_then_{other}"
        run_distributed(run, 2, layers, str(own), 1, "none", timeout_s=120, like_torchrun=True)
        checkpoint = str(own / "checkpoints" / "step_000001")
        run_distributed(run, 2, other, str(crossed), 2, checkpoint, timeout_s=120, like_torchrun=True)
        folders[layers], folders[other, "crossed"] = own, crossed
    for step, (local, te) in {
        1: (folders["local"], folders["te"]),
        2: (folders["local", "crossed"], folders["te", "crossed"]),
    }.items():
        assert rollouts_of(local, step) == rollouts_of(te, step), "the same tokens are sampled"
        ours, theirs = steps_of(local)[step], steps_of(te)[step]
        assert ours["grad_norm"] > 0
        for name in ("loss", "grad_norm", "reward/mean", "ratio/mean", "clip_fraction"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), f"{name} of step {step}"
