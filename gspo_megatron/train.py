"""Trains a policy: `torchrun ... -m gspo_megatron.train --config FILE [section.key=value ...] [--dry-run]`.

Settings are read, completed and checked, then the parts of the run are assembled and the trainer runs. Without
torchrun the same command runs on one process. Exit status: 0 done; 1 the processes did not meet, an engine did not
start, or an error in the code; 2 settings, data or a checkpoint cannot work; 70 a guard stopped the run, or an engine
has other weights; 75 saved and stopped on request, or because all engines died: start again to continue; 130 Ctrl-C
before there was anything to save, or twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from gspo_megatron.base.errors import ConfigError, GuardError
from gspo_megatron.build.command import KNOWN_ERRORS, Parser, report, reported
from gspo_megatron.build.inputs import Inputs, settle
from gspo_megatron.build.summary import describe_end, describe_newest, describe_start
from gspo_megatron.build.trainer import check_machine, device_of, open_trainer
from gspo_megatron.checkpoint.directory import POINTER
from gspo_megatron.checkpoint.lock import RunLock
from gspo_megatron.checkpoint.names import CHECKPOINTS, name_of
from gspo_megatron.config.loading import changed_yaml, load_config, replaced, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device, open_device, torchrun
from gspo_megatron.layout.refusal import fewest_processes
from gspo_megatron.layout.verdict import describe_plan, memory_verdict
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.resume import describe
from gspo_megatron.run.stop import QUIT, STOPPED, StopRequest
from gspo_megatron.run.trainer import Trainer

EXAMPLE = """example, two processes on this machine:
  torchrun --nproc_per_node 2 -m gspo_megatron.train --config examples/cpu_tiny_moe.yaml train.steps=20
"""


def main(argv: Sequence[str] | None = None, *, prepare: Callable[[Trainer], None] | None = None) -> int:
    """The command; returns the exit status. An experiment may `prepare` the trainer before it runs."""
    # Megatron-Core warns about every missing optional package; our own choices are printed by the run.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        options = parsed(argv)
        config = load_config(options.config, options.overrides)
        # A dry run needs no device: a laptop can print the plan of a cluster.
        device = open_device("cpu", config.precision.dtype) if options.dry_run else device_of(config)
        console = Console(on=device.rank == 0)
        config = continued_after_restart(config, device, console)
        if options.dry_run:
            dry_run(config, options, device, console)
            return 0
        inputs = settle(config, device.world_size)
        announce(inputs, device, console)
        # What the machine lacks comes first: the plan counts on Transformer Engine's layers.
        check_machine(inputs.config, device)
        check_memory(inputs, device.free_memory_gib(), console)
        c = inputs.config.checkpoint
        stop = StopRequest(
            exit_after_s=c.exit_after_s, grace_s=c.grace_s, forwarded=torchrun.launched(), say=console.say
        )
        for line in describe_start(inputs):
            console.say(line)
        with opened(inputs, device, console, stop) as trainer:
            if prepare:
                prepare(trainer)
            if trainer.run():
                for line in describe_end(inputs.config):
                    console.say(line)
                return 0
            position = trainer.position
        saved = Path(inputs.config.run.dir) / CHECKPOINTS / name_of(position)
        message = f"stopped after {describe(position)}; saved in {saved}; the same command with checkpoint.load=latest"
        message += f" continues ({stop.reason or 'another process was asked to stop'})"
        console.say(message)
        torchrun.leave_message(message)
        return STOPPED
    except GuardError as error:
        return reported(GuardError(f"{error}; {describe_newest(config)}"))
    except KNOWN_ERRORS as error:
        return reported(error)
    except KeyboardInterrupt:
        report("interrupted; nothing was saved since the last checkpoint")
        return QUIT


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="gspo_megatron.train",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file; docs/settings.md lists every section and key")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, layout, parameters and memory per rank, and exit"
    )
    parser.add_argument("--verbose", action="store_true", help="with --dry-run: print settings at their defaults, too")
    parser.add_argument(
        "--world-size", type=int, help="with --dry-run: the number of processes to plan for (default: the fewest)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="with --dry-run: memory of a GPU; status 2 if it is too little"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    options = parser.parse_intermixed_args(argv)
    if options.config is None and not options.overrides:
        parser.error("no settings: name a file with --config, or give overrides to train the demo's tiny model")
    if options.world_size is not None and not (options.dry_run and options.world_size > 0):
        parser.error("--world-size needs --dry-run and 1 or more processes; a run has those that torchrun starts")
    if options.verbose and not options.dry_run:
        parser.error("--verbose needs --dry-run; a run writes all of its settings to config.yaml in run.dir")
    if options.gpu_memory is not None and not (options.dry_run and options.gpu_memory > 0):
        parser.error("--gpu-memory needs --dry-run and more than 0 GiB; a run asks its own GPU")
    return options


def dry_run(config: Config, options: argparse.Namespace, device: Device, console: Console) -> None:
    """Prints what a run of these settings would be.

    Raises:
        ConfigError: it cannot work, or does not fit in options.gpu_memory.
    """
    world_size = options.world_size or max(device.world_size, fewest_processes(config))
    inputs = settle(config, world_size)
    announce(inputs, device, console)
    console.say(to_yaml(inputs.config) if options.verbose else changed_yaml(inputs.config))
    if not options.verbose:
        console.say("other settings have their defaults: --verbose prints all, docs/settings.md explains them\n")
    console.say(f"algorithm: {inputs.algorithm}")
    console.say(describe_plan(inputs.config, inputs.layout, with_reference=inputs.algorithm.needs_reference))
    if options.world_size is None and device.world_size == 1:
        console.say(
            f"processes: {world_size}, the fewest that the layout can have; --world-size N plans for those of your run"
        )
    check_memory(inputs, options.gpu_memory, console)


def announce(inputs: Inputs, device: Device, console: Console) -> None:
    """Prints what the user may not expect from the settings."""
    vocab_size, known = inputs.config.model.vocab_size, inputs.tokenizer.vocab_size
    if vocab_size != known:
        console.say(
            f"model.vocab_size={vocab_size} exceeds the tokenizer's {known} ids; the extra ids are never sampled"
        )
    for warning in (*device.warnings, *inputs.warnings):
        console.warn(warning)


def check_memory(inputs: Inputs, available_gib: float | None, console: Console) -> None:
    """Prints whether the run fits in the memory of a GPU, before anything is allocated. None: not known.

    Raises:
        ConfigError: it does not fit, and guards.on_memory is not warn.
    """
    if available_gib is None:
        return
    with_reference = inputs.algorithm.needs_reference
    try:
        console.say(
            f"memory: {memory_verdict(inputs.config, inputs.layout, available_gib, with_reference=with_reference)}"
        )
    except ConfigError as error:
        if inputs.config.guards.on_memory == "stop":
            raise
        console.warn(str(error))


@contextmanager
def opened(inputs: Inputs, device: Device, console: Console, stop: StopRequest) -> Iterator[Trainer]:
    """The trainer, while the run directory is locked and signals set `stop`."""
    lock = RunLock(Path(inputs.config.run.dir)) if device.rank == 0 else nullcontext()
    with lock:
        if isinstance(lock, RunLock) and lock.warning:
            console.warn(lock.warning)
        # Signals are handled once there is something to save.
        with open_trainer(inputs, device, console, stop.is_set) as trainer, stop:
            yield trainer


def continued_after_restart(config: Config, device: Device, console: Console) -> Config:
    """The settings; after a restart by torchrun they continue the run, because checkpoint.load on the command line is
    meant for the first attempt.

    Raises:
        ConfigError: torchrun restarts processes on several nodes.
    """
    if device.nodes > 1 and device.max_restarts:
        raise ConfigError(
            "torchrun --max-restarts does not work on several nodes: their restart counts differ, so they would not "
            "find each other; set --max-restarts=0 and start the job again (examples/slurm/train.sbatch does)"
        )
    if device.restarts and (Path(config.run.dir) / CHECKPOINTS / POINTER).exists():
        console.say("restarted by torchrun: continuing from the newest checkpoint of this run")
        return replaced(config, {"checkpoint.load": "latest"})
    return config


def leave_status(status: int) -> None:
    """Writes the exit status to $GSPO_STATUS_FILE, for a batch script, unless another process has: torchrun exits with
    1 whatever its processes exit with. A file that cannot be written does not make a good run fail."""
    if path := os.environ.get("GSPO_STATUS_FILE"):
        try:
            with suppress(FileExistsError), Path(path).open("x") as file:
                file.write(f"{status}\n")
        except OSError as error:
            print(f"warning: GSPO_STATUS_FILE={path} cannot be written ({error})", file=sys.stderr)


if __name__ == "__main__":
    status = main()
    leave_status(status)
    sys.exit(status)
