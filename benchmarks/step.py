"""Times an RL step of a config by its parts: rollout, log-probs, update. Prints a table, writes JSON.

    torchrun --nproc_per_node 2 -m benchmarks.step --config examples/cpu_tiny_moe.yaml [--steps 10] [--output FILE]
    [--against pretraining | --against trl] [section.key=value ...]
    python -m benchmarks.step --from benchmarks/results/bench_step*.json --markdown docs/benchmarks.md    # tables only

The config's own warm start comes first (shorten it with train.warm_start_steps=N), then --warmup steps that are not
counted. Nothing is saved. Medians over steps, from the main process's clock. Compared with a baseline in the same run:

    --against pretraining   an update and a plain Megatron-Core pre-training step (step_vs_pretraining.py)
    --against trl           a step and one of TRL's GRPOTrainer (step_vs_trl.py), one process each; needs trl
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_vs_trl
from benchmarks.reports import machine, versions, write_between_marks
from benchmarks.step_tables import PARTS, tables
from gspo_megatron.build.inputs import settle
from gspo_megatron.build.trainer import device_of, open_trainer
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.monitor.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config")
    parser.add_argument("--against", choices=("pretraining", "trl"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--experts", default="grouped_mm", help="with --against trl: transformers' experts (grouped_mm)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--from", dest="results", type=Path, nargs="+", help="measure nothing; show these results")
    parser.add_argument("--markdown", type=Path, help="with --from: file whose text between the step marks is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(argv)
    if bool(options.config) == bool(options.results) or bool(options.markdown) != bool(options.results):
        parser.error("give --config to measure, or --from and --markdown to show what was measured")
    if options.results:
        rewrite(options.results, options.markdown)
        return 0
    for quiet in (r"megatron\.core", r"torch\.distributed"):
        warnings.filterwarnings("ignore", module=quiet)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(options.config, [*options.overrides, f"run.dir={scratch}", "logging.tensorboard=false"])
        device = device_of(config)
        if options.against == "trl":
            if device.world_size > 1:
                parser.error("--against trl runs one process of each; start it without torchrun")
            result = step_vs_trl.measure(config, options.steps, options.warmup, options.experts)
        else:
            result = measured(config, device, options)
    if device.rank == 0:
        start = ["torchrun", "--nproc_per_node", str(device.world_size)] if device.world_size > 1 else ["python"]
        result = {
            "kind": f"step-{options.against}" if options.against else "step",
            "command": shlex.join([*start, "-m", "benchmarks.step", *argv]),
            "machine": machine(device, torch.get_num_threads()),
            "versions": versions(("torch", "megatron-core")),
            "processes": device.world_size,
            **result,
        }
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(*tables({"this run": result}).values())
    return 0


def rewrite(files: list[Path], markdown: Path) -> None:
    """Puts the tables of earlier results into a Markdown file in a directory above them."""
    names = {path: f"[{path.stem}]({path.resolve().relative_to(markdown.resolve().parent)})" for path in files}
    for kind, text in tables({names[path]: json.loads(path.read_text()) for path in files}).items():
        write_between_marks(markdown, kind, text)


def measured(config: Config, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """Measures on this process, or on those of torchrun together."""
    with open_trainer(settle(config, device.world_size), device, Console(on=device.rank == 0)) as trainer:
        if options.against == "pretraining":
            from benchmarks.step_vs_pretraining import measure

            return measure(trainer, config, options.steps, options.warmup)
        trainer.begin()
        rows = [trainer.step(step) for step in range(1, options.warmup + options.steps + 1)][options.warmup :]
        return by_parts(rows, max(trainer.ranks.gather([device.peak_memory_gib()])))


def by_parts(rows: list[dict[str, Any]], memory_gib: float) -> dict[str, Any]:
    seconds = {part: statistics.median(row[f"time/{part}_s"] for row in rows) for part in PARTS}
    tokens = statistics.median(row["tokens"] for row in rows)
    return {
        "seconds": seconds,
        "tokens_per_step": tokens,
        "tokens_per_second": {part: tokens / seconds[part] if seconds[part] else None for part in PARTS},
        "peak_memory_gib": memory_gib,
        "seconds_all": {part: [row[f"time/{part}_s"] for row in rows] for part in PARTS},
    }


if __name__ == "__main__":
    sys.exit(main())
