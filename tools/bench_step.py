"""Times an RL step of a config by its parts: rollout, log-probs, update. Prints tokens/s and peak memory, writes JSON.

    torchrun --nproc_per_node 2 tools/bench_step.py --config examples/cpu_tiny_moe.yaml [--steps 10] [--output FILE]
    [--against pretraining | --against trl] [section.key=value ...]

The config's own warm start comes first (shorten it with train.warm_start_steps=N), then --warmup steps that are not
counted. Nothing is saved. Medians over steps, from the main process's clock. Beside something else, in the same run:

    --against pretraining   an update beside a plain Megatron-Core pre-training step (tools/against_pretraining.py)
    --against trl           a step beside one of TRL's GRPOTrainer (tools/against_trl.py), one process each; needs trl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import against_trl
import torch
from rich.table import Table

from gspo_megatron.config import Config, load_config
from gspo_megatron.console import Console
from gspo_megatron.device import Lane, open_lane
from gspo_megatron.train import load_inputs, open_trainer

PARTS = ("rollout", "log_probs", "update", "step")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--against", choices=("pretraining", "trl"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--experts", default="grouped_mm", help="with --against trl: transformers' experts (grouped_mm)"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    for quiet in (r"megatron\.core", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=quiet)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(options.config, [*options.overrides, f"run.dir={scratch}", "logging.tensorboard=false"])
        lane = open_lane(config.precision.device, config.precision.dtype)
        if options.against == "trl":
            if lane.world_size > 1:
                parser.error("--against trl runs one process of each; start it without torchrun")
            result, table = beside_trl(config, options)
        else:
            result, table = measured(config, lane, options)
    if lane.rank == 0:
        report(result, table, lane, options)
    return 0


def measured(config: Config, lane: Lane, options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """What this process, or those of torchrun, measured together."""
    with open_trainer(config, lane, load_inputs(config), Console(on=lane.rank == 0)) as trainer:
        if options.against == "pretraining":
            from against_pretraining import measure  # Megatron-Core comes when the lane is open

            return beside_pretraining(measure(trainer, config, options.steps, options.warmup))
        trainer.warm_start()
        trainer.policy.begin(with_reference=trainer.variant.kl_coef > 0)
        rows = [trainer.step(step) for step in range(1, options.warmup + options.steps + 1)][options.warmup :]
        return by_parts(rows, max(trainer.ranks.gather([lane.peak_memory_gib()])))


def by_parts(rows: list[dict[str, Any]], memory_gib: float) -> tuple[dict[str, Any], Table]:
    seconds = {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}
    tokens = statistics.median(row["tokens"] for row in rows)
    result = {
        "seconds": seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": {part: tokens / seconds[part] if seconds[part] else None for part in PARTS},
        "peak_memory_gib": memory_gib,
        "seconds_all": {part: [row[f"time/{part}_s"] for row in rows] for part in PARTS},
    }
    title = f"{tokens:,.0f} tokens a step; peak memory of a process {memory_gib:.2f} GiB"
    table = columns(title, "part", "s (median)", "tokens/s")
    for part in PARTS:
        table.add_row(part, f"{seconds[part]:.3f}", f"{tokens / seconds[part]:,.0f}" if seconds[part] else "-")
    return result, table


def beside_pretraining(result: dict[str, Any]) -> tuple[dict[str, Any], Table]:
    table = columns("An update beside a plain pre-training step", "", "ratio", "s (median)", "tokens", "scored")
    for name, seconds in result["seconds"].items():
        ratio = seconds / result["seconds"]["pretraining"]
        table.add_row(
            name, f"{ratio:.3f}", f"{seconds:.4f}", f"{result['tokens'][name]:,}", f"{result['scored'][name]:,}"
        )
    return result, table


def beside_trl(config: Config, options: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    result = against_trl.measure(config, options.steps, options.warmup, options.experts)
    table = columns("A step beside one of TRL", "", "ratio", "s (median)", "processor s", "tokens")
    for name, seconds in result["seconds"].items():
        numbers = f"{seconds:.3f}", f"{result['cpu_seconds'][name]:.3f}", f"{result['tokens'][name]:,.0f}"
        table.add_row(name, f"{seconds / result['seconds']['trl']:.3f}", *numbers)
    return result, table


def columns(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    return table


def report(result: dict[str, Any], table: Table, lane: Lane, options: argparse.Namespace) -> None:
    """Prints the table; writes the JSON, with what it was measured on."""
    result |= {
        "config": options.config,
        "overrides": options.overrides,
        "steps": options.steps,
        "processes": lane.world_size,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {lane.describe()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
    }
    console = Console()
    console.print(table)
    console.say(f"{options.config}, {options.steps} steps, {lane.world_size} processes on {lane.describe()}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
