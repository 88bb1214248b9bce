"""Trains a policy: `torchrun ... -m gspo_megatron.train --config FILE [section.key=value ...] [--dry-run]`.

The composition root: settings are read and checked, then device, process groups, policy and sampler are made and handed
to the trainer. Without torchrun the same command runs on one process. Exit status 2: settings or data cannot work.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.config import Config, load_config, to_yaml
from gspo_megatron.console import Console
from gspo_megatron.data.prompts import PromptSource, load_prompts
from gspo_megatron.data.tasks import find_task
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.device import Lane, open_lane, transformer_engine_available
from gspo_megatron.metrics import RunWriter
from gspo_megatron.plan import describe_plan
from gspo_megatron.trainer import Trainer, rewards_of, variant_of
from gspo_megatron.types import CheckpointError, ConfigError, DataError

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
def open_trainer(config: Config, lane: Lane, inputs: Inputs, console: Console) -> Iterator[Trainer]:
    """The run's parts on this process, put together and, at the end, closed. Collective: every process of the run
    calls it.

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
    groups = Groups(check_config(config, lane.world_size))
    compat.mend(lane.on_cpu)
    console.say(f"{groups.layout} on {lane.describe()}, Megatron-Core {compat.VERSION}")
    policy = MegatronPolicy(config, groups, lane, use_te)
    sampler = MegatronSampler(policy, eos_id=inputs.tokenizer.eos_id, pad_id=inputs.tokenizer.pad_id)
    checkpoints = MegatronCheckpoints(policy, Path(config.run.dir) / "checkpoints", keep=config.checkpoint.keep)
    state = checkpoints.load(config.checkpoint.load)
    completed_steps = state["step"] if state else 0
    if state and variant_of(config).kl_coef > 0 and policy.reference is None:
        raise CheckpointError(
            f"checkpoint.load={config.checkpoint.load}: that run had no reference policy, so algorithm.kl_coef above 0 "
            "has nothing to hold against; set algorithm.kl_coef=0, or start anew with checkpoint.load=none"
        )
    if state:
        console.say(f"continuing after step {completed_steps}")
    writer = RunWriter.of_run(config, continued_after=completed_steps if state else None) if groups.is_main else None
    parts = (policy, sampler, groups, inputs.tokenizer, inputs.train_prompts, inputs.eval_prompts)
    try:
        yield Trainer(config, *parts, checkpoints, writer, console, completed_steps=completed_steps)
    finally:
        if writer:
            writer.close()
    groups.close()


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
        with open_trainer(config, lane, inputs, console) as trainer:
            trainer.fit()
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
