"""The trainer of a run on this process: devices, process groups, policy, sampler, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.colocated import open_colocated
from gspo_megatron.build.contents import contents_of
from gspo_megatron.build.engines import open_engines
from gspo_megatron.build.eval_sets import rewards_in
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.parts import assemble, never
from gspo_megatron.build.rewards import RunRewards
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.sections import Config
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.device import Device, open_device
from gspo_megatron.device.machine import Needs, problems
from gspo_megatron.device.own import this_process
from gspo_megatron.environments.environment import Environment
from gspo_megatron.layout.hardware import gpu_named
from gspo_megatron.layout.layout import Layout
from gspo_megatron.log_probs import Scoring, backends
from gspo_megatron.models.families import family_of
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.monitor.sinks import check_packages
from gspo_megatron.monitor.watchdog import RankWatchdog
from gspo_megatron.rollout.native.stopping import stops_of
from gspo_megatron.run.resume import Continuation
from gspo_megatron.run.state import RunState, settings_of
from gspo_megatron.run.trainer import Trainer

OPENED: Mapping[str, Callable[..., AbstractContextManager[Callable[..., Any] | None]]] = {
    "collective": lambda *_: nullcontext(),  # the model under training samples
    "vllm": open_engines,
    "vllm_colocated": open_colocated,
}
"""What rollout.engine opens."""


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
    from gspo_megatron.mcore.hugging_face import MegatronExports, load_folder
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler
    from gspo_megatron.mcore.saving import MegatronCheckpoints

    config, algorithm, tokenizer = inputs.config, inputs.algorithm, inputs.tokenizer
    with (
        open_groups(config, inputs.layout, device, console) as (groups, use_te, watchdog),
        at_work(rewards_in(inputs.rewards, inputs.sets), inputs.environment, config, device, groups),
    ):
        scoring = agreed_scoring(algorithm.scoring, device, console)
        policy = MegatronPolicy(config, groups, device, use_te, scoring, num_ids=tokenizer.vocab_size)
        sampler = MegatronSampler(
            policy,
            stops=stops_of([*config.rollout.stop, *inputs.environment.stop], tokenizer),
            pad_id=tokenizer.pad_id,
            stop=stop,
            sign_of_life=console.sign_of_life,
        )
        c = config.checkpoint
        directory = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep=c.keep, keep_every=c.keep_every)
        checkpoints = MegatronCheckpoints(policy, directory, console.warn)
        state = checkpoints.load(c.load, RunState.from_saved)
        if config.model.hf and state is None:
            for note in load_folder(policy, config.model.hf, allow_nan=config.model.hf_allow_nan):
                console.say(f"model.hf: {note}")
        contents = contents_of(inputs)
        continuation = Continuation.of(
            state, config, algorithm, has_reference=policy.reference is not None, contents=contents
        )
        for setting in continuation.changed:
            console.warn(f"continuing with a changed setting, {setting}")
        for warning in continuation.other_contents:
            console.warn(warning)
        for message in continuation.messages(config):
            console.say(message)
        writer = None
        if groups.is_main:
            first_step, fresh = continuation.first_step, continuation.fresh
            writer = RunWriter.of_run(config, first_step=first_step, fresh=fresh, warn=console.warn)
            if writer.moved:
                console.say(f"an earlier run used {config.run.dir}: {', '.join(writer.moved)}")
        beside = folder_files(config.model.shape, tokenizer, config.data.tokenizer, config.model.hf)
        with OPENED[config.rollout.engine](inputs, policy, groups, beside, device, console, stop) as served:
            gpu = gpu_named(device.name)
            parts = assemble(
                inputs,
                policy,
                sampler,
                groups,
                console=console,
                writer=writer,
                checkpoints=checkpoints,
                exports=MegatronExports(policy, beside, console.say),
                guards=state.guards if state else None,
                taken=continuation.taken,
                held=state.held if state else None,
                contents=contents,
                peak_flops=gpu.peak_of(config.precision.dtype, fp8=config.precision.fp8 != "none") if gpu else None,
                stop=stop,
                note=watchdog.note,
                served=served,
            )
            trainer = Trainer(parts, continuation)
            # A loaded step maps its files. The trainer has copied what it needs, and they may be deleted.
            del state, continuation
            try:
                yield trainer
            finally:
                trainer.parts.source.close()
                if writer:
                    writer.close()


@contextmanager
def open_groups(
    config: Config, layout: Layout, device: Device, console: Console
) -> Iterator[tuple[Any, bool, RankWatchdog]]:
    """The `Groups` of the layout, whether the model has Transformer Engine layers, and the watchdog of this process.
    Collective: every process of the run calls it.

    Raises:
        ConfigError: this process's GPU or its libraries cannot do what the settings ask.
        StartError: the processes do not find each other.
    """
    # Megatron-Core is imported only now: the device has to be open before that.
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups

    use_te = wants_transformer_engine(config, device)
    if use_te:
        compat.check_transformer_engine()
    device.start_processes(config.parallel.timeout_s)
    with RankWatchdog(device.notes(), device.rank, device.world_size, timeout_s=config.parallel.timeout_s) as watchdog:
        check_same_settings(config)
        groups = Groups(layout, device.torch_device, config.parallel.timeout_s)
        compat.apply_patches(device.on_cpu)
        console.say(f"{groups.layout} on {device.describe()}, Megatron-Core {compat.VERSION}")
        yield groups, use_te, watchdog
        groups.close()


def folder_files(shape: ModelShape, tokenizer: Tokenizer, spec: str, hf: str | None) -> FolderFiles:
    """What an exported folder holds besides weights: as in the folder `hf` that the run started from, with the run's
    tokenizer, which data.tokenizer=`spec` names."""
    folder = None
    if isinstance(tokenizer, HuggingFaceTokenizer):  # else `spec` need not be a path
        place = Path(spec)
        folder = place if place.is_dir() else place.parent
    if hf:
        return FolderFiles.like(Path(hf), folder)
    return FolderFiles.of(family_of(shape).hf_config(shape), tokenizer.stop_ids, tokenizer.pad_id, folder)


def agreed_scoring(scoring: Scoring, device: Device, console: Console) -> Scoring:
    """With the kernels that all ranks can run. Collective."""
    kernels = backends.agree(scoring.backend, device.torch_device, device.dtype, dist.group.WORLD)
    if kernels.warning:
        console.warn(kernels.warning)
    return scoring._replace(backend=kernels.backend)


def check_same_settings(config: Config) -> None:
    """Each process reads the settings for itself. Only `run.dir` may differ, where a node has its disks elsewhere.
    Collective, and called before the groups of a layout are made: with two layouts, that would never end.

    Raises:
        ConfigError: a process has others than rank 0, on every rank.
    """
    if dist.get_world_size() == 1:
        return
    mine = {key: value for key, value in settings_of(asdict(config)).items() if key != "run.dir"}
    heard: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(heard, mine)
    for rank, theirs in enumerate(heard):
        differing = [f"{key}={theirs[key]}, not {value}" for key, value in heard[0].items() if theirs[key] != value]
        if differing:
            raise ConfigError(
                f"rank {rank} has other settings than rank 0: {'; '.join(differing[:3])}; give every process the same "
                "file and overrides (data.chat_date, where only the day differs)"
            )


@contextmanager
def at_work(
    rewards: Sequence[RunRewards], environment: Environment, config: Config, device: Device, groups: Any
) -> Iterator[None]:
    """Rewards and environment with their processes, which end with it. Their services are tried first, before a model
    takes minutes to build. Collective. Raises as `check_services` does."""
    workers = config.reward.workers or device.cores_for_each(groups.layout.dp * groups.layout.cp)
    working: list[RunRewards | Environment] = [*rewards, environment]
    try:
        check_services(rewards, groups.is_reporter)
        for each in working:
            each.use_workers(workers)
        yield
    finally:
        for each in working:
            each.close()


def check_services(rewards: Sequence[RunRewards], scores: bool) -> None:
    """Asks the services that rewards need for a trial, all at once. `scores`: this rank will ask them.
    Collective.

    Raises:
        ConfigError: one gives no score, on every rank.
    """
    complaint = ""
    if scores:
        try:
            with ThreadPoolExecutor(len(rewards)) as threads:
                list(threads.map(lambda each: each.check_services(), rewards))
        except ConfigError as error:
            complaint = str(error)
    heard = [complaint] * dist.get_world_size()
    if len(heard) > 1:
        dist.all_gather_object(heard, complaint)
    if found := next(filter(None, heard), ""):
        raise ConfigError(found)


def check_machine(config: Config, device: Device) -> None:
    """Refuses a run that this process's GPU and its packages cannot do, before anything else is asked of them.

    Raises:
        ConfigError: what is missing, and what to do.
    """
    check_packages(config)
    wants_transformer_engine(config, device)


def wants_transformer_engine(config: Config, device: Device) -> bool:
    """Whether the model is built from Transformer Engine layers, which need a GPU.

    Raises:
        ConfigError: this process's GPU or its libraries cannot do what the settings ask.
    """
    p = config.precision
    needs = Needs(p.dtype, p.fp8, p.transformer_engine, config.parallel.cp)
    if device.on_cpu and not needs.needs_transformer_engine:
        return False
    machine = this_process()
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
