"""How long a checkpoint pauses training: a blocking save, a background save, and a load.

    python -m benchmarks.checkpoint --output benchmarks/results/bench_checkpoint.json          (part of `make bench`)

One process, float32, a model whose weights and Adam moments are about --gib. For comparison, the same run writes and
syncs a plain file of as many bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspo_megatron.base.batches import Position
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.fakes import PlainState

if TYPE_CHECKING:
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.saving import MegatronCheckpoints

BYTES_PER_PARAMETER = 12
"""The weight and Adam's two moments, float32."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where checkpoints go (default: the system's temporary one)")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.core")

    device = open_device("cpu", "fp32")
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.saving import MegatronCheckpoints

    settings = ["precision.device=cpu", "model.hidden_size=512", "model.num_layers=4", "model.expert_ffn_size=512"]
    one = load_config(None, [*settings, "model.vocab_size=1024", "model.num_experts=2"])
    # The vocabulary makes up the rest of the requested size.
    wanted = options.gib * 2**30 / BYTES_PER_PARAMETER
    rest = count_parameters(one.model.shape).total - 2 * 1024 * 512
    config = load_config(None, [*settings, f"model.vocab_size={int((wanted - rest) / 1024)}", "model.num_experts=2"])
    device.start_processes(60)
    groups = Groups(check_config(config, 1), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        checkpoints = MegatronCheckpoints(policy, CheckpointDirectory(Path(folder), keep=1), print)
        found = measure(checkpoints, policy, Path(folder), options.repeats)
    found["cpu"], found["torch"] = os.cpu_count(), torch.__version__
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    groups.close()
    return 0


def measure(checkpoints: MegatronCheckpoints, policy: MegatronPolicy, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each, medians over `repeats`; the first background save, which allocates memory, separately."""
    steps = itertools.count(1)

    def save(*, wait: bool) -> float:
        position = Position(0, next(steps), 0)
        return seconds(lambda: checkpoints.save(position, PlainState({}), wait=wait))

    waited = [save(wait=True) for _ in range(repeats)]
    [newest] = [path for path in folder.iterdir() if path.is_dir()]
    num_bytes = sum(path.stat().st_size for path in newest.iterdir())
    disk = [seconds(lambda: write(folder / "plain", num_bytes)) for _ in range(repeats)]
    first = save(wait=False)
    checkpoints.finish()
    background, finished = [], []
    for _ in range(repeats):
        background.append(save(wait=False))
        finished.append(background[-1] + seconds(checkpoints.finish))
    load = [seconds(lambda: checkpoints.load("latest", lambda about, shares: about)) for _ in range(repeats)]
    median = {
        "save_waited_for_s": statistics.median(waited),
        "save_in_background_pause_s": statistics.median(background),
        "save_in_background_first_pause_s": first,
        "save_in_background_until_whole_s": statistics.median(finished),
        "load_s": statistics.median(load),
        "plain_write_s": statistics.median(disk),
    }
    return {
        "gib": num_bytes / 2**30,
        "parameters": sum(p.numel() for chunk in policy.model for p in chunk.parameters()),
        **median,
        "pause_of_background_to_waited": median["save_in_background_pause_s"] / median["save_waited_for_s"],
        "disk_gib_per_s": num_bytes / 2**30 / median["plain_write_s"],
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(path: Path, num_bytes: int) -> None:
    """A file of random bytes, one block repeated, synced."""
    block = os.urandom(16 << 20)
    with path.open("wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
