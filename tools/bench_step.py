"""Times the parts of an RL step of a config: rollout, log-probs, update. Prints tokens/s and peak memory, writes JSON.

    torchrun --nproc_per_node 2 tools/bench_step.py --config examples/cpu_tiny_moe.yaml [--steps 10] [--output FILE]
    [section.key=value ...]

The config's own warm start comes first (shorten it with train.warm_start_steps=N), then --warmup steps that are not
counted. Nothing is saved. Medians over steps, from the main process's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from gspo_megatron.config import load_config
from gspo_megatron.console import Console
from gspo_megatron.device import open_lane
from gspo_megatron.train import load_inputs, open_trainer

PARTS = ("rollout", "log_probs", "update", "step")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(options.config, [*options.overrides, f"run.dir={scratch}", "logging.tensorboard=false"])
        lane = open_lane(config.precision.device, config.precision.dtype)
        console = Console(on=lane.rank == 0)
        with open_trainer(config, lane, load_inputs(config), console) as trainer:
            trainer.warm_start()
            trainer.policy.begin(with_reference=trainer.variant.kl_coef > 0)
            rows = [trainer.step(step) for step in range(1, options.warmup + options.steps + 1)][options.warmup :]
            memory_gib = trainer.ranks.gather([lane.peak_memory_gib()])
    if lane.rank == 0:
        report(rows, memory_gib, lane.describe(), lane.world_size, options)
    return 0


def report(rows: list[dict], memory_gib: list[float], lane: str, processes: int, options: argparse.Namespace) -> None:
    """Prints the table and writes the JSON."""
    seconds = {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}
    tokens = statistics.median(row["tokens"] for row in rows)
    result = {
        "config": options.config,
        "overrides": options.overrides,
        "steps": len(rows),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {lane}",
        "torch": torch.__version__,
        "processes": processes,
        "seconds": seconds,
        "seconds_all": {part: [row[f"time/{part}_s"] for row in rows] for part in PARTS},
        "tokens_per_step": tokens,
        "tokens_per_second": {part: tokens / seconds[part] for part in PARTS},
        "peak_memory_gib": max(memory_gib),
    }
    table = Table(title=f"{options.config}: {processes} processes on {lane}", title_justify="left")
    for column in ("part", "s (median)", "tokens/s"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in PARTS:
        table.add_row(part, f"{seconds[part]:.3f}", f"{tokens / seconds[part]:,.0f}")
    console = Console()
    console.print(table)
    console.say(f"{len(rows)} steps of {tokens:,.0f} tokens; peak memory of a process {max(memory_gib):.2f} GiB")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
