"""Trains a policy: `torchrun ... -m gspo_megatron.train --config FILE [section.key=value ...] [--dry-run]`.

The composition root: settings are read and checked, then device, process groups, policy and sampler are made and handed
to the trainer. Without torchrun the same command runs on one process. Exit status: 0 done; 2 settings, data or a
checkpoint cannot work; 70 a guard stopped the run; 75 stopped as asked, everything saved: start again to continue.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from gspo_megatron.base.errors import CheckpointError, ConfigError, DataError, GuardError, StopRequested
from gspo_megatron.build.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.build.inputs import Inputs, load_inputs
from gspo_megatron.build.parts import open_trainer
from gspo_megatron.checkpoint.directory import POINTER
from gspo_megatron.checkpoint.lock import RunLock
from gspo_megatron.config.loading import load_config, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device, open_device
from gspo_megatron.layout.memory import describe_plan
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.algorithm import variant_of
from gspo_megatron.run.resume import describe
from gspo_megatron.run.stop import REFUSED, STOPPED, STOPPED_BY_GUARD, StopRequest

USER_ERRORS = (ConfigError, DataError, CheckpointError)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gspo_megatron.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="YAML file; docs/settings.md lists every section and key")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, layout, parameters and memory per rank, and exit"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    options = parser.parse_intermixed_args(argv)
    if options.world_size is not None and not (options.dry_run and options.world_size > 0):
        parser.error("--world-size plans a --dry-run for 1 or more processes; a run has those that torchrun starts")
    # Megatron-Core warns about every optional package it does without; our own choices are printed by the run.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        config = load_config(options.config, options.overrides)
        # A plan needs no device: that of a cluster is printed on a laptop.
        device = open_device("cpu" if options.dry_run else config.precision.device, config.precision.dtype)
        console = Console(on=device.rank == 0)
        layout = check_config(config, options.world_size or device.world_size)
        inputs = load_inputs(config)
        if config.model.vocab_size != inputs.tokenizer.vocab_size:
            console.say(
                f"model.vocab_size={config.model.vocab_size} goes beyond the tokenizer's "
                f"{inputs.tokenizer.vocab_size} ids; "
                "one of the others counts as a token of a response, and as no text"
            )
        for name, source in (("train", inputs.train_prompts), ("eval", inputs.eval_prompts)):
            if source.dropped:
                console.warn(f"data.{name}: {source.dropped} prompts longer than {prompt_limit(config)} tokens dropped")
        for warning in config_warnings(config, kl_coef=variant_of(config).kl_coef):
            console.warn(warning)
        if options.dry_run:
            console.say(to_yaml(config))
            console.say(describe_plan(config, layout, with_reference=variant_of(config).kl_coef > 0))
            return 0
        return train(config, device, inputs, console)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED


def train(config: Config, device: Device, inputs: Inputs, console: Console) -> int:
    """Runs until the end, or until asked to stop; returns the exit status."""
    if device.restarts and (Path(config.run.dir) / "checkpoints" / POINTER).exists():
        # The command says what the first attempt was to begin from.
        console.say("restarted by torchrun: continuing from the newest checkpoint of this run")
        config.checkpoint.load = "latest"
    c = config.checkpoint
    if device.nodes > 1 and device.max_restarts:
        raise ConfigError(
            "torchrun --max-restarts on several nodes: their counts of restarts differ, so they would not find one "
            "another; set --max-restarts=0 and start the job again (examples/slurm/train.sbatch does)"
        )
    lock = RunLock(Path(config.run.dir)) if device.rank == 0 else nullcontext()
    stop_request = StopRequest(exit_after_s=c.exit_after_s, grace_s=c.grace_s)
    with lock:
        if isinstance(lock, RunLock) and lock.warning:
            console.warn(lock.warning)
        try:
            # Signals are handled from when there is something to save.
            with open_trainer(config, device, inputs, console, stop_request) as trainer, stop_request:
                try:
                    trainer.fit()
                except StopRequested:
                    reason = stop_request.reason or "another process was asked to"
                    console.say(
                        f"stopped after {describe(trainer.position)} ({reason}); checkpoint.load=latest continues"
                    )
                    return STOPPED
        except GuardError as error:
            print(f"GuardError: {error}", file=sys.stderr)
            return STOPPED_BY_GUARD
    return 0


def leave_status(status: int) -> None:
    """Writes the exit status where a batch script asked for it, unless another process has: torchrun exits with 1
    whatever its processes exit with."""
    if path := os.environ.get("GSPO_STATUS_FILE"):
        with suppress(FileExistsError), Path(path).open("x") as file:
            file.write(f"{status}\n")


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as usage:  # of the argument parser
        status = int(usage.code or 0)
    leave_status(status)
    sys.exit(status)
