"""What a run says of itself at its start, and where its results are at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gspo_megatron.base.errors import plural
from gspo_megatron.build.data import shown
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.programs import describe_sandbox
from gspo_megatron.checkpoint.directory import POINTER
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.sections import Config
from gspo_megatron.data.mixture import Mixture
from gspo_megatron.models.counts import count_parameters


def describe_start(inputs: Inputs) -> Iterator[str]:
    """Run directory, model, algorithm, data and steps, a line each."""
    c, n = inputs.config, count_parameters(inputs.config.model.shape)
    yield f"run directory {c.run.dir}, seed {c.run.seed}"
    active = n.active(c.model.experts_per_token)
    yield f"model {c.model.family}: {n.total:,} parameters, {active:,} of them active in a token"
    yield f"algorithm {inputs.algorithm}"
    size = inputs.train_prompts.size
    number = "endless" if size is None else f"{size:,}"
    held_out_from = shown(c.data.eval or c.data.train)
    yield f"prompts: {number} from {shown(c.data.train)}; held out {inputs.sets[0].num_prompts:,} from {held_out_from}"
    if isinstance(inputs.train_prompts, Mixture):
        yield from _describe_sources(inputs.train_prompts)
    yield from describe_sandbox(c)
    warm = f"{plural(c.train.warm_start_steps, 'warm-start update')}, then " if c.train.warm_start_steps else ""
    rollouts = f"{plural(c.rollout.prompts_per_step, 'prompt')} x {plural(c.rollout.group_size, 'rollout')}"
    updates = plural(c.algorithm.updates_per_rollout, "update")
    yield f"{warm}{plural(c.train.steps, 'step')} of {rollouts}, {updates} each"


def _describe_sources(mixture: Mixture) -> Iterator[str]:
    total = sum(part.weight for part in mixture.parts)
    for part in mixture.parts:
        number = "endless" if part.prompts.size is None else plural(part.prompts.size, "prompt")
        yield f"  {part.name}: {number}, {part.weight / total:.1%} of those taken"


def describe_end(config: Config) -> Iterator[str]:
    """Where the results are, and the commands to look at them."""
    run = Path(config.run.dir)
    yield f"results are in {run}: metrics.jsonl, rollouts/, {CHECKPOINTS}/"
    yield f"plot them:      python tools/plot_run.py {run} --output {run / 'plot.png'}"
    if config.logging.tensorboard:
        yield f"or browse them: tensorboard --logdir {run / 'tensorboard'}"


def describe_newest(config: Config) -> str:
    """What `checkpoint.load=latest` would continue from."""
    saved = Path(config.run.dir) / CHECKPOINTS
    pointer = saved / POINTER
    if pointer.is_file() and (name := pointer.read_text().strip()):
        return f"the newest checkpoint of this run is {saved / name}"
    return f"this run had saved no checkpoint in {saved}, so checkpoint.load=latest would start from the beginning"
