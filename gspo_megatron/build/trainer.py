"""The trainer of a run on this process: devices, process groups, policy, sampler, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.parts import assemble, never
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device, open_device
from gspo_megatron.device.machine import Machine, Needs, problems
from gspo_megatron.layout.hardware import gpu_named
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.monitor.watchdog import RankWatchdog
from gspo_megatron.run.resume import Continuation
from gspo_megatron.run.state import RunState
from gspo_megatron.run.trainer import Trainer


def device_of(config: Config) -> Device:
    """Opens the device that the settings ask for, with the environment of their number format. Call it before anything
    imports Megatron-Core or Transformer Engine.

    Raises:
        ConfigError: as `open_device`.
    """
    p = config.precision
    return open_device(p.device, p.dtype, fp8=p.fp8, deterministic=p.deterministic)


@contextmanager
def open_trainer(
    inputs: Inputs, device: Device, console: Console, stop: Callable[[], bool] = never
) -> Iterator[Trainer]:
    """Opens the trainer of a run on this process, and closes everything at the end. Collective: every process of the
    run calls it. `stop` is called at safe points.

    Raises:
        CheckpointError: checkpoint.load names something that cannot be loaded.
    """
    # Megatron-Core is imported only here: the device has to be open before that.
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler
    from gspo_megatron.mcore.saving import MegatronCheckpoints

    config, algorithm, tokenizer = inputs.config, inputs.algorithm, inputs.tokenizer
    use_te = wants_transformer_engine(config, device)
    if use_te:
        compat.check_transformer_engine()
    device.start_processes(config.parallel.timeout_s)
    with RankWatchdog(device.notes(), device.rank, device.world_size, timeout_s=config.parallel.timeout_s) as watchdog:
        groups = Groups(inputs.layout, device.torch_device, config.parallel.timeout_s)
        compat.apply_patches(device.on_cpu)
        console.say(f"{groups.layout} on {device.describe()}, Megatron-Core {compat.VERSION}")
        policy = MegatronPolicy(config, groups, device, use_te, algorithm.scoring)
        sampler = MegatronSampler(
            policy,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            stop=stop,
            sign_of_life=console.sign_of_life,
        )
        c = config.checkpoint
        directory = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep=c.keep, keep_every=c.keep_every)
        checkpoints = MegatronCheckpoints(policy, directory, console.warn)
        state = checkpoints.load(c.load, RunState.from_saved)
        continuation = Continuation.of(state, config, algorithm, has_reference=policy.reference is not None)
        for setting in continuation.changed:
            console.warn(f"continuing with a changed setting, {setting}")
        for message in continuation.messages(config):
            console.say(message)
        writer = None
        if groups.is_main:
            writer = RunWriter.of_run(config, first_step=continuation.first_step, fresh=continuation.fresh)
            if writer.moved:
                console.say(f"an earlier run used {config.run.dir}: {', '.join(writer.moved)}")
        gpu = gpu_named(device.name)
        parts = assemble(
            inputs,
            policy,
            sampler,
            groups,
            console=console,
            writer=writer,
            checkpoints=checkpoints,
            guards=state.guards if state else None,
            peak_flops=gpu.peak_flops(fp8=config.precision.fp8 != "none") if gpu else None,
            stop=stop,
            note=watchdog.note,
        )
        trainer = Trainer(parts, continuation)
        # A loaded step maps its files. The trainer has copied what it needs, and they may be deleted.
        del state, continuation
        try:
            yield trainer
        finally:
            if writer:
                writer.close()
        groups.close()


def wants_transformer_engine(config: Config, device: Device) -> bool:
    """Whether the model is built from Transformer Engine layers, which need a GPU.

    Raises:
        ConfigError: this process's GPU or its libraries cannot do what the settings ask.
    """
    p = config.precision
    needs = Needs(p.dtype, p.fp8, p.transformer_engine, config.parallel.cp)
    if device.on_cpu and not needs.needs_transformer_engine:
        return False
    machine = Machine.of_this_process()
    if device.on_cpu:
        why = "precision.device=cpu" if p.device == "cpu" else next(problems(machine, needs)).what
        raise ConfigError(
            f"precision.transformer_engine={needs.transformer_engine} with precision.fp8={needs.fp8} needs a GPU and "
            f"Transformer Engine, and this run is on the CPU ({why}); set precision.transformer_engine=auto and "
            "precision.fp8=none to run without"
        )
    for problem in problems(machine, needs):
        raise ConfigError(str(problem))
    return needs.uses_transformer_engine(machine)
