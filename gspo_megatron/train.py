"""Trains a policy: `torchrun ... -m gspo_megatron.train --config FILE [section.key=value ...] [--dry-run]`.

The composition root: settings are read and checked, then device, process groups, policy and sampler are made and handed
to the trainer. Without torchrun the same command runs on one process. Exit status 2: settings or data cannot work.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.config import Config, check_config, config_warnings, load_config, prompt_limit, to_yaml
from gspo_megatron.console import Console
from gspo_megatron.data.prompts import PromptSource, load_prompts
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.device import Lane, open_lane, transformer_engine_available
from gspo_megatron.metrics import RunWriter
from gspo_megatron.plan import describe_plan
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
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than model.vocab_size={config.model.vocab_size}; "
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


def train(config: Config, lane: Lane, inputs: Inputs, console: Console) -> None:
    """Builds the run's parts on this process and fits. Collective: every process of the run calls it."""
    # Megatron-Core is imported only now: the lane has to be open before.
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.checkpoint import MegatronCheckpoints
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler
    from gspo_megatron.trainer import Trainer

    layout = check_config(config, lane.world_size)
    use_te = wants_transformer_engine(config)
    lane.start_processes(config.parallel.timeout_s)
    groups = Groups(layout)
    compat.mend(lane.on_cpu)
    console.say(f"{layout} on {lane.describe()}, Megatron-Core {compat.VERSION}")
    policy = MegatronPolicy(config, groups, lane, use_te)
    sampler = MegatronSampler(policy, eos_id=inputs.tokenizer.eos_id, pad_id=inputs.tokenizer.pad_id)
    run_dir = Path(config.run.dir)
    checkpoints = MegatronCheckpoints(policy, run_dir / "checkpoints", keep=config.checkpoint.keep)
    state = checkpoints.load(config.checkpoint.load)
    writer = None
    if groups.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        first_step = state["step"] + 1 if state else 0
        writer = RunWriter(run_dir, tensorboard=config.logging.tensorboard, first_step=first_step)
    trainer = Trainer(
        config,
        policy,
        sampler,
        groups,
        inputs.tokenizer,
        inputs.train_prompts,
        inputs.eval_prompts,
        checkpoints,
        writer,
        console,
    )
    if state:
        trainer.completed_steps = state["step"]
        console.say(f"continuing after step {state['step']}")
    trainer.fit()
    if writer:
        writer.close()
    groups.close()


def wants_transformer_engine(config: Config) -> bool:
    """Whether the model is built from Transformer Engine layers. Raises ConfigError when asked for and not importable."""
    wanted, available = config.precision.transformer_engine, transformer_engine_available()
    if (wanted == "on" or config.precision.fp8 != "none") and not available:
        raise ConfigError(
            "precision.transformer_engine=on or precision.fp8 needs a GPU and the package transformer_engine (pip install 'gspo_megatron[te]')"
        )
    return available and wanted != "off"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gspo_megatron.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="YAML file with sections as in gspo_megatron/config.py")
    parser.add_argument("--dry-run", action="store_true", help="print settings, layout, parameters and memory per rank, and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    # Megatron-Core warns about every optional package it does without; our own choices are printed by the run.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        config = load_config(options.config, options.overrides)
        lane = open_lane(config.precision.device, config.precision.dtype)
        console = Console(on=lane.rank == 0)
        layout = check_config(config, (options.dry_run and options.world_size) or lane.world_size)
        inputs = load_inputs(config)
        if options.dry_run:
            console.say(to_yaml(config))
            console.say(describe_plan(config, layout))
            return 0
        for warning in config_warnings(config):
            console.warn(warning)
        train(config, lane, inputs, console)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
