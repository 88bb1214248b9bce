"""The parts of a run on this process, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError, ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device, transformer_engine_available
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.monitor.watchdog import RankWatchdog
from gspo_megatron.run.algorithm import variant_of
from gspo_megatron.run.resume import changed_settings, describe
from gspo_megatron.run.trainer import Trainer


@contextmanager
def open_trainer(
    config: Config, device: Device, inputs: Inputs, console: Console, stop: Callable[[], bool] = lambda: False
) -> Iterator[Trainer]:
    """The run's parts on this process, put together and, at the end, closed. Collective: every process of the run
    calls it. `stop` is asked at safe points.

    Raises CheckpointError when checkpoint.load names something that cannot be loaded.
    """
    # Megatron-Core is imported only now: the device has to be open before.
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler
    from gspo_megatron.mcore.saving import MegatronCheckpoints

    use_te = wants_transformer_engine(config, device)
    device.start_processes(config.parallel.timeout_s)
    with RankWatchdog(device.notes(), device.rank, device.world_size, timeout_s=config.parallel.timeout_s) as watchdog:
        groups = Groups(check_config(config, device.world_size), device.torch_device)
        compat.apply_patches(device.on_cpu)
        console.say(f"{groups.layout} on {device.describe()}, Megatron-Core {compat.VERSION}")
        policy = MegatronPolicy(config, groups, device, use_te)
        sampler = MegatronSampler(policy, eos_id=inputs.tokenizer.eos_id, pad_id=inputs.tokenizer.pad_id, stop=stop)
        c = config.checkpoint
        store = CheckpointDirectory(Path(config.run.dir) / "checkpoints", keep=c.keep, keep_every=c.keep_every)
        checkpoints = MegatronCheckpoints(policy, store, console.warn)
        state = checkpoints.load(c.load)
        if state and state["began"] and variant_of(config).kl_coef > 0 and policy.reference is None:
            raise CheckpointError(
                f"checkpoint.load={c.load}: that run had no reference policy, so algorithm.kl_coef above 0 has nothing "
                "to hold against; set algorithm.kl_coef=0, or start anew with checkpoint.load=none"
            )
        for setting in changed_settings(state, config) if state else ():
            console.warn(f"continuing with another {setting}")
        own = c.load == "latest" or Path(c.load).resolve().parent == store.directory.resolve()
        first_step = state["position"][1] + 1 if state and state["began"] else 0
        if state:
            console.say(f"continuing after {describe(Position(*state['position']))}")
        fresh = not (state and own)
        writer = RunWriter.of_run(config, first_step=first_step, fresh=fresh) if groups.is_main else None
        parts = (policy, sampler, groups, inputs.tokenizer, inputs.train_prompts, inputs.eval_prompts)
        try:
            yield Trainer(config, *parts, checkpoints, writer, console, state=state, stop=stop, note=watchdog.note)
        finally:
            if writer:
                writer.close()
        groups.close()


def wants_transformer_engine(config: Config, device: Device) -> bool:
    """Whether the model is built from Transformer Engine layers, which need a GPU. Raises ConfigError when they are
    asked for and cannot be had."""
    wanted = config.precision.transformer_engine
    available = not device.on_cpu and transformer_engine_available()
    needed = wanted == "on" or "local" not in RECIPES[config.precision.fp8].layers
    if needed and not available:
        raise ConfigError(
            "precision.transformer_engine=on or precision.fp8 needs a GPU and Transformer Engine (pip install "
            "'gspo_megatron[te]'); set precision.transformer_engine=auto and precision.fp8=none to run without"
        )
    return available and wanted != "off"
