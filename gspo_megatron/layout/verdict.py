"""What a run needs in memory, in words: the plan of --dry-run, and whether it fits a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gspo_megatron.base.errors import ConfigError, memory_size, plural
from gspo_megatron.config.sections import Config
from gspo_megatron.layout.layout import Layout, broken_rules
from gspo_megatron.layout.memory import (
    GIB,
    RESERVED_GIB,
    Memory,
    checkpoint_bytes,
    counts_of,
    fullest_stage,
    parameters_per_rank,
)


def describe_plan(config: Config, layout: Layout, *, with_reference: bool) -> str:
    """The layout, parameters in total and on the fullest rank, and a memory estimate by phase with its assumptions."""
    m = config.model.shape
    n = counts_of(m)[0]
    dense, experts = parameters_per_rank(m, layout)
    memory = fullest_stage(config, layout, with_reference=with_reference)
    stages = layout.stage_layers(m.num_layers)
    unit, size = ("GiB", GIB) if memory.peak >= GIB else ("MiB", GIB / 1024)
    return "\n".join(
        (
            f"layout: {plural(layout.world_size, 'process')} = {layout}",
            f"layers of the pipeline stages: {_runs(stages)}",
            f"parameters: {n.total:,} in total, {n.active(m.experts_per_token):,} active per token, "
            f"{dense + experts:,} on the rank with the most ({dense:,} dense, {experts:,} expert)",
            f"memory estimate, {unit} on each GPU of the stage with the largest peak "
            f"({memory.stage + 1} of {layout.pp}):",
            *(f"  {phase:<8} {_parts(memory, phase, size)}" for phase in memory.phases),
            f"  {_disk(config, checkpoint_bytes(config, with_reference=with_reference) / GIB)}",
            f"  while a checkpoint is written, each process keeps {memory_size(memory.host / GIB)} in host memory",
            "  assumes micro-batches of train.tokens_per_micro_batch, balanced routing, and rollouts of full length; "
            f"fragmentation, communication buffers and the device's driver take 2 to {RESERVED_GIB:.0f} GiB more on a "
            "GPU",
        )
    )


def _disk(config: Config, each_gib: float) -> str:
    """A checkpoint is complete before an older one is deleted."""
    keep, every = config.checkpoint.keep, config.checkpoint.keep_every
    kept = f"on disk checkpoint.keep={keep} takes {memory_size(keep * each_gib)}, "
    kept += f"{memory_size((keep + 1) * each_gib)} during a save"
    forever = f", and one more stays for every {plural(every, 'step')} (checkpoint.keep_every)" if every else ""
    return f"a checkpoint has {memory_size(each_gib)}; {kept}{forever}"


def _parts(memory: Memory, phase: str, unit: float) -> str:
    parts = ", ".join(f"{name} {size / unit:.2f}" for name, size in memory.of(phase).items())
    return f"{parts}; total {memory.total(phase) / unit:.2f}"


def _runs(stages: tuple[int, ...]) -> str:
    """11, 6 x 12, 11"""
    runs: list[list[int]] = []
    for size in stages:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return ", ".join(f"{count} x {size}" if count > 1 else f"{size}" for count, size in runs)


def memory_verdict(config: Config, layout: Layout, available_gib: float, *, with_reference: bool) -> str:
    """One line: the run fits in `available_gib` of a GPU, or barely fits.

    Raises:
        ConfigError: it does not fit. Names the phase, the largest parts and settings that change it, with what they
            would leave.
    """
    memory = fullest_stage(config, layout, with_reference=with_reference)
    phase = max(memory.phases, key=memory.total)
    needed, there = memory.total(phase) / GIB, memory_size(available_gib)
    where = f"{phase} needs {memory_size(needed)} on each GPU of stage {memory.stage + 1} of {layout.pp}"
    if needed <= available_gib - RESERVED_GIB:
        return f"fits: {where}; {there} are there"
    if needed <= available_gib:
        return (
            f"barely fits: {where}, and {there} are there, of which communication buffers and "
            f"fragmentation take up to {RESERVED_GIB:.0f}; {_advice(config, layout, needed, needed, with_reference)}"
        )
    largest = sorted(memory.of(phase).items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {memory_size(size / GIB)}" for name, size in largest)
    raise ConfigError(
        f"not enough memory: {where} ({parts}, ...), and {there} are there; "
        f"{_advice(config, layout, needed, available_gib - RESERVED_GIB, with_reference)}"
    )


def _advice(config: Config, layout: Layout, needed: float, available_gib: float, with_reference: bool) -> str:
    """Single changes that need less than `needed`, the most effective first; whether one is enough."""
    found = []
    for settings, changed, other in _changes(config, layout):
        if next(broken_rules(changed, other), None) is None:
            left = fullest_stage(changed, other, with_reference=with_reference).peak / GIB
            if left < needed - 0.05:
                found.append((left, settings))
    if not found:
        return "no single setting helps; use more GPUs (tools/plan_layout.py searches for a layout)"
    found.sort()
    enough, others = ([each for each in found if (each[0] <= available_gib) == fits] for fits in (True, False))
    listed = [
        ", or ".join(f"{settings} ({memory_size(left)})" for left, settings in some[:4]) for some in (enough, others)
    ]
    if not enough:
        return f"no single setting is enough (tools/plan_layout.py searches for a layout); these help: {listed[1]}"
    return f"set {listed[0]}" + (f"; not enough alone: {listed[1]}" if others else "")


def _changes(config: Config, layout: Layout) -> Iterator[tuple[str, Config, Layout]]:
    """(settings, the config and the layout with them) of changes that may need less memory."""
    p, t, r, o = config.parallel, config.train, config.rollout, config.optimizer
    if p.recompute != "full":
        yield "parallel.recompute=full", replace(config, parallel=replace(p, recompute="full")), layout
    if t.tokens_per_micro_batch > config.model.max_sequence_length:
        fewest = config.model.max_sequence_length
        changed = replace(config, train=replace(t, tokens_per_micro_batch=fewest))
        yield f"train.tokens_per_micro_batch={fewest}", changed, layout
    if r.max_batch > 1:
        changed = replace(config, rollout=replace(r, max_batch=r.max_batch // 2))
        yield f"rollout.max_batch={r.max_batch // 2}", changed, layout
    if not o.distributed:
        yield "optimizer.distributed=true", replace(config, optimizer=replace(o, distributed=True)), layout
    for axis in ("tp", "pp", "ep", "cp"):
        size = 2 * getattr(p, axis)
        other = replace(layout, **{axis: size})
        if axis != "pp" or (p.first_stage_layers, p.last_stage_layers) == (None, None):
            yield f"parallel.{axis}={size}", replace(config, parallel=replace(p, **{axis: size})), other
