"""Stopping and resuming inside a step: seconds and bytes, for a step of 512 prompts x 16 rollouts of 4,000 tokens.

    python -m benchmarks.step_state --output benchmarks/results/step_state.json          (part of `make bench`)

Every process holds the step's rollouts, packs its share of them and has old log-probs for it, as between two updates.
`stop` is what a stop then takes: the snapshot, the files, their hashes, until the disk has them. `resume` reads and
verifies them, restores the rollouts and packs the updates that are left. The model is tiny: its bytes hardly count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reports import machine, versions
from gspo_megatron.base.batches import Position, Prompt, Rollout, RolloutGroup, Sequence
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.models.counts import sequence_cost
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.stages import Packer
from gspo_megatron.run.state import GuardState, RunState, SavedStep
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.local_ranks import run_distributed

with warnings.catch_warnings():
    # Megatron-Core warns about every optional package it does without.
    warnings.simplefilter("ignore")
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.saving import MegatronCheckpoints

SETTINGS = (
    "precision.device=cpu",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_experts=2",
    "model.expert_ffn_size=16",
    "model.vocab_size=151936",
    "model.max_sequence_length=8192",
    "train.tokens_per_micro_batch=65536",
    "algorithm.updates_per_rollout=4",
)


def make_step(num_prompts: int, group_size: int, length: int, vocab_size: int) -> StepState:
    """Rollouts of up to `length` tokens, the same on every process."""
    draw = np.random.default_rng(1)
    groups, sequences = [], []
    for i in range(num_prompts):
        prompt = Prompt(i, f"prompt {i}", tuple(draw.integers(0, vocab_size, 100).tolist()), "answer", "")
        groups.append(RolloutGroup(prompt, []))
        for j in range(group_size):
            tokens = draw.integers(0, vocab_size, length).tolist()
            log_probs = (-draw.random(length)).tolist()
            rollout = Rollout(i * group_size + j, prompt, tokens, log_probs, True, 1, "x" * 4 * length, float(j % 2))
            groups[-1].rollouts.append(rollout)
            sequences.append(Sequence.after_prompt([*prompt.tokens, *tokens], 100, (-1.0) ** j))
    return StepState(2, groups, sequences)


def measure(num_prompts: int, group_size: int, length: int, folder: str) -> dict[str, Any]:
    """Seconds on this process, and bytes of the checkpoint."""
    overrides = [
        f"rollout.prompts_per_step={num_prompts}",
        f"rollout.group_size={group_size}",
        "rollout.max_new_tokens=1",
    ]
    config = load_config(None, [*SETTINGS, *overrides])
    device, world_size = open_device("cpu", "fp32"), int(os.environ["WORLD_SIZE"])
    device.start_processes(600.0)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    checkpoints = MegatronCheckpoints(policy, CheckpointDirectory(Path(folder), keep=1), print)
    assert config.model.vocab_size is not None
    step = make_step(num_prompts, group_size, length, config.model.vocab_size)
    packer = packer_of(config, groups)
    packer.pack(step, drop_zero_advantage=False)
    for batch in step.batches:
        for m in batch.micro_batches:
            m.columns["old_log_probs"] = torch.rand(len(m.rows_R))
    step.updates = [{} for _ in range(2)]

    torch.distributed.barrier()
    start = time.perf_counter()
    snapshot = step.snapshot(groups)
    state = RunState.of(config, Position(0, 1, 2), began=True, guards=GuardState(), step=snapshot)
    checkpoints.save(Position(0, 1, 2), state, wait=True)
    stop_s = time.perf_counter() - start
    num_tokens = sum(len(s) for s in step.sequences)
    del step, snapshot, state

    torch.distributed.barrier()
    start = time.perf_counter()
    loaded = checkpoints.load("latest", RunState.from_saved)
    assert loaded is not None and isinstance(loaded.step, SavedStep)
    again = StepState.restore(loaded.step.about, loaded.step.shares, groups, torch.float32)
    packer.pack(again, drop_zero_advantage=False)
    resume_s = time.perf_counter() - start
    assert all("old_log_probs" in m.columns for batch in again.batches for m in batch.micro_batches)
    torch.distributed.barrier()
    files = {path.name: path.stat().st_size for path in Path(folder).glob("step_*/*")}
    return {
        "tokens": num_tokens,
        "stop_s": stop_s,
        "resume_s": resume_s,
        "bytes": sum(files.values()),
        "bytes_of_tensors": sum(size for name, size in files.items() if name.startswith("step_")),
        "bytes_of_text": files["run.json"],
        "machine": machine(device, torch.get_num_threads()),
    }


def packer_of(config: Config, groups: Groups) -> Packer:
    return Packer(
        ranks=groups,
        pad_id=0,
        max_tokens=config.train.tokens_per_micro_batch,
        rules=packing_rules(config),
        cost=sequence_cost(config.model.shape),
        group_size=config.rollout.group_size,
        updates_per_rollout=config.algorithm.updates_per_rollout,
        seed=config.run.seed,
    )


def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=4000, help="tokens of a response")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="where the checkpoint is written (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shape = (options.prompts, options.group_size, options.length, folder)
        results = run_distributed(measure, options.processes, *shape, timeout_s=1800.0, like_torchrun=True)
    found = results[0] | {
        "processes": options.processes,
        "stop_s": max(result["stop_s"] for result in results),
        "resume_s": max(result["resume_s"] for result in results),
        "versions": versions(("torch", "megatron-core")),
    }
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    # For the process that ranks are forked from, and so for them.
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.exit(main())
