"""The benchmark of a step: the plain pre-training step computes what it should, and every comparison runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step as bench_step
from benchmarks.step_vs_pretraining import Pretraining
from gspo_megatron.base.batches import MicroBatch, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.objective import LikelihoodObjective, Segments
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor
from tests.support.small import SMALL

TINY = """
model: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, num_query_groups: 1, head_dim: 8, num_experts: 2,
        expert_ffn_size: 12, max_sequence_length: 24, init_std: 0.3}
precision: {device: cpu, dtype: fp32}
data: {tokenizer: "characters:0123456789>", eval_size: 4}
rollout: {prompts_per_step: 4, group_size: 2, max_new_tokens: 6}
algorithm: {updates_per_rollout: 2, clip_low: 0.03, clip_high: 0.04}
train: {warm_start_steps: 2, warm_start_batch: 4, tokens_per_micro_batch: 32}
"""


def likelihood(max_tokens: int) -> list[tuple[float, float, dict[str, Tensor]]]:
    """(loss, gradient norm, gradients) of -mean log p: of MegatronPolicy.update, and of a plain pre-training step."""
    config = load_config(
        None,
        [
            *SMALL,
            "precision.dtype=fp32",
            "model.init_std=0.3",
            "optimizer.clip_grad=1e9",
            "optimizer.distributed=false",
        ],
    )
    device = open_device("cpu", "fp32")
    groups = Groups(check_config(config, 1), device.torch_device)
    compat.apply_patches(on_cpu=True)
    ours, theirs = (MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 12, (15,), generator=generator).tolist()
    # One token of prompt: all others count in both.
    sequences = [Sequence.after_prompt(torch.randint(13, (n,), generator=generator).tolist(), 1) for n in lengths]
    micro_batches = pack(sequences, pad_id=0, max_tokens=max_tokens)
    batch = UpdateBatch(micro_batches, len(lengths), sum(lengths) - len(lengths))

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        segments = Segments.from_lengths(m.trained_lengths)
        return LikelihoodObjective()(log_probs_R, segments, num_tokens=batch.num_tokens)

    metrics = ours.update(batch, loss, lr=0.0)
    found = [(float(metrics["loss"].total), float(metrics["grad_norm"].total)), Pretraining(theirs).step(batch)]
    gradients = [{place.name: g.clone() for place, g in policy.gradients()} for policy in (ours, theirs)]
    return [(*numbers, of) for numbers, of in zip(found, gradients, strict=True)]


@pytest.mark.parametrize("max_tokens", [1000, 24])
def test_likelihood_update_is_a_pretraining_step(max_tokens: int) -> None:
    [(ours, theirs)] = run_distributed(likelihood, 1, max_tokens)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    assert ours[0] > 1 and ours[1] > 0.1
    assert ours[2].keys() == theirs[2].keys() and len(ours[2]) > 20
    for name, gradient in ours[2].items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(theirs[2][name], gradient, rtol=0, atol=1e-5 * largest)


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of bench_step on the tiny config, in a process of its own."""
    (folder / "tiny.yaml").write_text(TINY)
    given = [
        "--config",
        str(folder / "tiny.yaml"),
        "--steps",
        "2",
        "--warmup",
        "1",
        "--output",
        str(folder / "out.json"),
    ]
    assert run_distributed(bench_step.main, 1, [*given, *arguments], like_torchrun=True) == [0]
    return json.loads((folder / "out.json").read_text())


def test_parts_of_a_step(tmp_path: Path) -> None:
    found = bench(tmp_path)
    assert len(found["seconds_all"]["step"]) == 2
    assert found["seconds"]["step"] > found["seconds"]["update"] > 0
    assert found["tokens_per_step"] > 8


def test_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    """Those of both kinds, ratio first; what is not measured anew stays as it is."""
    files = []
    for kind in ("parts", "pretraining"):
        (folder := tmp_path / kind).mkdir()
        bench(folder, *(["--against", kind] if kind == "pretraining" else []))
        files.append((folder / "out.json").rename(tmp_path / f"{kind}.json"))
    page = tmp_path / "page.md"
    kinds = ("step", "step-trl", "step-pretraining")
    marks = [f"<!-- {kind} -->\nnot measured\n<!-- end of {kind} -->" for kind in kinds]
    page.write_text("\n".join(["before", *marks, "after\n"]))
    assert bench_step.main(["--from", *map(str, files), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.count("not measured") == 1 and text.startswith("before\n") and text.endswith("\nafter\n")
    found = json.loads(files[1].read_text())
    assert f"| [pretraining](pretraining.json) | {found['ratio']:.3f} | {found['ratio_every_token']:.3f} |" in text
    assert f"- [pretraining](pretraining.json): `{found['command']}`; CPU, gloo, float32; " in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="<!-- step -->"):
        bench_step.main(["--from", str(files[0]), "--markdown", str(page)])


def test_against_pretraining(tmp_path: Path) -> None:
    found = bench(tmp_path, "--against", "pretraining")
    seconds, tokens, scored = (found[name] for name in ("seconds", "tokens", "scored"))
    of_turns = [a / b for a, b in zip(*(found["seconds_all"][x] for x in ("update", "pretraining")), strict=True)]
    assert found["ratio"] == pytest.approx(sum(of_turns) / 2) and seconds["update"] > 0
    assert set(seconds) == {"update", "update_every_token", "pretraining"}
    # Four sequences of both; all but the first token of each are predicted.
    assert len(set(tokens.values())) == 1 and found["micro_batches"] > 1
    assert scored["pretraining"] == scored["update_every_token"] == tokens["pretraining"] - 4 > scored["update"]


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2 model.num_layers=2", "parallel.cp=2"])
def test_against_pretraining_on_two_processes(tmp_path: Path, layout: str) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("num_query_groups: 1", "num_query_groups: 2"))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--against", "pretraining", "--steps", "1", "--warmup", "0"]
    arguments += ["--output", str(tmp_path / "out.json"), *layout.split()]
    assert run_distributed(bench_step.main, 2, arguments, like_torchrun=True) == [0, 0]
    assert json.loads((tmp_path / "out.json").read_text())["processes"] == 2


def test_against_trl(tmp_path: Path) -> None:
    """Two steps of both on equal weights, which the command makes sure of: it fails where the logits differ."""
    pytest.importorskip("trl")
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, bench_step.__file__, "--config", str(tmp_path / "tiny.yaml"), "--against", "trl"]
    command += ["--steps", "2", "--warmup", "1", "--experts", "eager", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 * time_factor())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["largest_difference_of_logits"] < 1e-5
    of_turns = [a / b for a, b in zip(*found["seconds_all"].values(), strict=True)]
    assert found["ratio"] == pytest.approx(sum(of_turns) / 2)
    assert all(len(values) == 2 and min(values) > 8 for values in found["tokens_all"].values())
