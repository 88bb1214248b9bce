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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.config import Config, load_config, to_yaml
from gspo_megatron.console import Console
from gspo_megatron.data.prompts import PromptSource, load_prompts
from gspo_megatron.data.tasks import find_task
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.device import Lane, open_lane, transformer_engine_available
from gspo_megatron.interrupt import REFUSED, STOPPED, STOPPED_BY_GUARD, Interrupt
from gspo_megatron.lookout import Lookout
from gspo_megatron.metrics import RunWriter
from gspo_megatron.plan import describe_plan
from gspo_megatron.store import POINTER, CheckpointStore, RunLock
from gspo_megatron.trainer import Trainer, rewards_of, variant_of
from gspo_megatron.types import CheckpointError, ConfigError, DataError, GuardError, Position, StopAsked

USER_ERRORS = (ConfigError, DataError, CheckpointError)


@dataclass
class Inputs:
    """What a run needs before any process group exists."""

    tokenizer: Tokenizer
    train_prompts: PromptSource
    eval_prompts: PromptSource


def load_inputs(config: Config) -> Inputs:
    """Tokenizer and prompts; settles model.vocab_size. Raises DataError or ConfigError."""
    # The trainer makes its own; a name that is wrong ends the run here, before any process group exists.
    variant_of(config)
    if not config.reward.functions:
        kind, _, name = config.data.train.partition(":")
        judge = find_task(name, **config.data.task).reward if kind == "task" else "exact_match"
        config.reward.functions = {judge: 1.0}
    rewards_of(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={config.model.vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}, or null to take the tokenizer's"
        )
    d = config.data

    def prompts(spec: str, split: str, size: int | None) -> PromptSource:
        return load_prompts(
            spec,
            tokenizer,
            split=split,
            seed=config.run.seed,
            max_prompt_tokens=prompt_limit(config),
            size=size,
            task_parameters=d.task,
            prompt_field=d.prompt_field,
            answer_field=d.answer_field,
            solution_field=d.solution_field,
            prompt_template=d.prompt_template,
            overlong=d.overlong,
        )

    return Inputs(tokenizer, prompts(d.train, "train", None), prompts(d.eval, "eval", d.eval_size))


@contextmanager
def open_trainer(
    config: Config, lane: Lane, inputs: Inputs, console: Console, stop: Callable[[], bool] = lambda: False
) -> Iterator[Trainer]:
    """The run's parts on this process, put together and, at the end, closed. Collective: every process of the run
    calls it. `stop` is asked at safe points.

    Raises CheckpointError when checkpoint.load names something that cannot be loaded.
    """
    # Megatron-Core is imported only now: the lane has to be open before.
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.checkpoint import MegatronCheckpoints
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler

    use_te = wants_transformer_engine(config, lane)
    lane.start_processes(config.parallel.timeout_s)
    with Lookout(lane.notes(), lane.rank, lane.world_size, timeout_s=config.parallel.timeout_s) as lookout:
        groups = Groups(check_config(config, lane.world_size), lane.device)
        compat.mend(lane.on_cpu)
        console.say(f"{groups.layout} on {lane.describe()}, Megatron-Core {compat.VERSION}")
        policy = MegatronPolicy(config, groups, lane, use_te)
        sampler = MegatronSampler(policy, eos_id=inputs.tokenizer.eos_id, pad_id=inputs.tokenizer.pad_id, stop=stop)
        c = config.checkpoint
        store = CheckpointStore(Path(config.run.dir) / "checkpoints", keep=c.keep, keep_every=c.keep_every)
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
            yield Trainer(config, *parts, checkpoints, writer, console, state=state, stop=stop, note=lookout.note)
        finally:
            if writer:
                writer.close()
        groups.close()


def changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """`optimizer.lr: 0.001, was 0.003` for every setting that decides the run's future and is not what it was.

    Raises CheckpointError where a step under way was begun with settings that cut its rollouts otherwise.
    """
    changed = []
    for section, was in state["config"].items():
        now = asdict(getattr(config, section))
        if section not in ("run", "parallel", "checkpoint", "logging"):
            changed += [f"{section}.{k}: {now[k]!r}, was {was[k]!r}" for k in now if k in was and was[k] != now[k]]
    if state["config"]["run"]["seed"] != config.run.seed:
        changed.append(f"run.seed: {config.run.seed}, was {state['config']['run']['seed']}")
    # What cuts a step's rollouts into updates, and which of them take part.
    cuts = (
        *("run.seed", "rollout.group_size", "rollout.prompts_per_step", "algorithm.updates_per_rollout"),
        *("algorithm.variant", "algorithm.kl_coef", "algorithm.entropy_coef", "model.aux_loss_coef", "train.skip_dead"),
    )
    if state["step"] and (wrong := [text for text in changed if text.startswith(cuts)]):
        raise CheckpointError(
            f"this checkpoint is inside a step that was begun with other settings ({'; '.join(wrong)}); put them back "
            "until the next step is saved, or load an earlier checkpoint"
        )
    return changed


def describe(position: Position) -> str:
    """`step 12 and 2 updates of the next`."""
    if not position.steps and not position.updates:
        return f"{position.warm_start} updates of the warm start"
    return f"step {position.steps}" + (f" and {position.updates} updates of the next" if position.updates else "")


def wants_transformer_engine(config: Config, lane: Lane) -> bool:
    """Whether the model is built from Transformer Engine layers, which need a GPU. Raises ConfigError when they are
    asked for and cannot be had."""
    wanted = config.precision.transformer_engine
    available = not lane.on_cpu and transformer_engine_available()
    if (wanted == "on" or config.precision.fp8 != "none") and not available:
        raise ConfigError(
            "precision.transformer_engine=on or precision.fp8 needs a GPU and Transformer Engine (pip install "
            "'gspo_megatron[te]'); set precision.transformer_engine=auto and precision.fp8=none to run without"
        )
    return available and wanted != "off"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gspo_megatron.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="YAML file with sections as in gspo_megatron/config.py")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, layout, parameters and memory per rank, and exit"
    )
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    if options.world_size is not None and not (options.dry_run and options.world_size > 0):
        parser.error("--world-size plans a --dry-run for 1 or more processes; a run has those that torchrun starts")
    # Megatron-Core warns about every optional package it does without; our own choices are printed by the run.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        config = load_config(options.config, options.overrides)
        # A plan needs no device: that of a cluster is printed on a laptop.
        lane = open_lane("cpu" if options.dry_run else config.precision.device, config.precision.dtype)
        console = Console(on=lane.rank == 0)
        layout = check_config(config, options.world_size or lane.world_size)
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
        return train(config, lane, inputs, console)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED


def train(config: Config, lane: Lane, inputs: Inputs, console: Console) -> int:
    """Runs until the end, or until asked to stop; returns the exit status."""
    if lane.restarts and (Path(config.run.dir) / "checkpoints" / POINTER).exists():
        # The command says what the first attempt was to begin from.
        console.say("restarted by torchrun: continuing from the newest checkpoint of this run")
        config.checkpoint.load = "latest"
    c = config.checkpoint
    if lane.nodes > 1 and lane.max_restarts:
        raise ConfigError(
            "torchrun --max-restarts on several nodes: their counts of restarts differ, so they would not find one "
            "another; set --max-restarts=0 and start the job again (examples/slurm/train.sbatch does)"
        )
    lock = RunLock(Path(config.run.dir)) if lane.rank == 0 else nullcontext()
    interrupt = Interrupt(exit_after_s=c.exit_after_s, grace_s=c.grace_s)
    with lock:
        if isinstance(lock, RunLock) and lock.warning:
            console.warn(lock.warning)
        try:
            # Signals are handled from when there is something to save.
            with open_trainer(config, lane, inputs, console, interrupt) as trainer, interrupt:
                try:
                    trainer.fit()
                except StopAsked:
                    reason = interrupt.reason or "another process was asked to"
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
