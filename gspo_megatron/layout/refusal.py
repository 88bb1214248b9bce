"""The layout that the settings ask for, or why it cannot work and which ones can."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.sections import Config
from gspo_megatron.layout.hardware import GPUS
from gspo_megatron.layout.layout import AXES, Layout, broken_rules, changed_axes, nearest_layouts
from gspo_megatron.layout.memory import GIB, held_sizes

LARGEST_GIB = max(gpu.memory_gib for gpu in GPUS.values())
"""No GPU has more."""


def fewest_processes(config: Config) -> int:
    """How many the axes take at least, in whole engines where those are in the processes of the run."""
    p, engine = config.parallel, config.rollout.engine
    an_engine = config.engine.tensor_parallel if engine == "vllm_colocated" else 1
    return lcm(p.tp * p.pp * p.cp, p.etp * p.ep * p.pp, an_engine)


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout of `world_size` processes.

    Raises:
        ConfigError: the layout does not work. Names the nearest ones that do, of those that can hold the model.
    """
    p = config.parallel
    axes = (getattr(p, axis) for axis in AXES)
    layout = Layout(world_size, *axes, first=p.first_stage_layers, last=p.last_stage_layers)
    complaint = next(broken_rules(config, layout), None)
    if complaint is None:
        return layout
    even = replace(layout, first=None, last=None)
    near = nearest_layouts(config, layout) or nearest_layouts(config, even)
    if not near:
        raise ConfigError(f"{complaint}; no layout works for this model with precision.fp8={config.precision.fp8}")
    held = {other: _held_gib(config, other) for other in near}
    fitting = [_settings(layout, other) for other, gib in held.items() if gib <= LARGEST_GIB]
    if fitting:
        raise ConfigError(f"{complaint}; nearest layouts that work on WORLD_SIZE={world_size}: {', or '.join(fitting)}")
    raise ConfigError(
        f"{complaint}; on WORLD_SIZE={world_size}, weights, gradients and optimizer state alone take at least "
        f"{min(held.values()):,.0f} GiB on a GPU, more than any has: start more processes (tools/plan_layout.py "
        "searches for layouts)"
    )


def _held_gib(config: Config, layout: Layout) -> float:
    """At least, where the size of the vocabulary is not known yet."""
    known = replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or 1))
    stages = (held_sizes(known, layout, stage, with_reference=False) for stage in range(layout.pp))
    return max(sum(sizes.values()) for sizes in stages) / GIB


def _settings(asked: Layout, other: Layout) -> str:
    """The settings that make `other` of `asked`."""
    changed = [f"parallel.{axis}={getattr(other, axis)}" for axis in changed_axes(asked, other)]
    stages = ("first", asked.first, other.first), ("last", asked.last, other.last)
    return " ".join(changed + [f"parallel.{name}_stage_layers=null" for name, old, new in stages if new != old])
