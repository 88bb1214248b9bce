"""Every layout of a cluster on paper: which fit in memory, what a step takes, and which is fastest.

plans = search(config, 64, Cluster(GPUS["h100"], 8), work, with_reference=False)
plans[0].config                                                         # the fastest that fits, ready to be written
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

from gspo_megatron.config.sections import Config
from gspo_megatron.layout.layout import Layout, broken_rules, divisors_of
from gspo_megatron.layout.memory import GIB, RESERVED_GIB, Memory, fullest_stage, held_sizes, rollouts_at_once
from gspo_megatron.layout.stages import uneven_stages
from gspo_megatron.layout.timing import Cluster, StepTime, Work

MAX_TP = 8
MAX_CP = 8
MAX_PP = 64
MAX_VPP = 4
MICRO_BATCH_FACTORS = (1, 2, 4)
"""Micro-batches of this many longest sequences are tried."""
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Plan:
    """A layout with the settings it runs with.

    Attributes:
        config: with parallel.* and train.tokens_per_micro_batch set.
        memory: of the fullest pipeline stage.
    """

    config: Config
    layout: Layout
    memory: Memory
    time: StepTime

    @property
    def peak_gib(self) -> float:
        return self.memory.peak / GIB

    @cached_property
    def order(self) -> tuple[float, ...]:
        """Faster first; of equally fast ones those that split less."""
        ranks = self.layout
        return (
            round(self.time.total, 6),
            ranks.tp * ranks.pp * ranks.cp,
            ranks.pp,
            ranks.ep * ranks.etp,
            self.memory.peak,
        )


def search(
    config: Config,
    world_size: int,
    cluster: Cluster,
    work: Work,
    *,
    with_reference: bool,
    memory_gib: float | None = None,
) -> list[Plan]:
    """Layouts of `world_size` GPUs that keep the rules of layout.py and fit, the fastest first. `memory_gib`: of a GPU,
    without what is left to driver and libraries (RESERVED_GIB)."""
    usable = (cluster.gpu.memory_gib - RESERVED_GIB if memory_gib is None else memory_gib) * GIB
    found = []
    for layout in layouts(config, world_size, cluster.node):
        if layout.dp * work.updates > work.sequences:
            continue
        own = _with_layout(config, layout)
        # What stays is the same whatever is recomputed; most layouts fail here.
        stays = (held_sizes(own, layout, s, with_reference=with_reference) for s in {0, layout.pp - 1})
        if max(sum(sizes.values()) for sizes in stays) > usable:
            continue
        for factor, recompute in product(MICRO_BATCH_FACTORS, RECOMPUTE):
            tried = replace(
                own,
                parallel=replace(own.parallel, recompute=recompute),
                train=replace(own.train, tokens_per_micro_batch=factor * config.model.max_sequence_length),
            )
            memory = fullest_stage(tried, layout, with_reference=with_reference)
            while memory.total("rollout") > usable and tried.rollout.max_batch > 1:
                # Fewer rollouts decode together; the others wait.
                tried = replace(
                    tried, rollout=replace(tried.rollout, max_batch=rollouts_at_once(tried, layout) // 2 or 1)
                )
                memory = fullest_stage(tried, layout, with_reference=with_reference)
            if memory.peak <= usable:
                found.append(Plan(tried, layout, memory, StepTime(tried, layout, cluster, work)))
    return sorted(found, key=lambda plan: plan.order)


def layouts(config: Config, world_size: int, node: int) -> Iterator[Layout]:
    """Those that keep all rules. Tensor parallel stays inside a node; stages are unequal only where equal ones do not
    work, and then the best balanced."""
    m = config.model.shape
    divisors = divisors_of(world_size)
    tps = [d for d in divisors if d <= min(MAX_TP, node)]
    cps = [d for d in divisors if d <= MAX_CP]
    pps = [d for d in divisors if d <= min(MAX_PP, m.num_layers)]
    eps = [d for d in divisors if m.num_experts % d == 0]
    for pp, vpp in product(pps, range(1, MAX_VPP + 1)):
        split = stage_split(m.num_layers, pp, vpp)
        if split is None:
            continue
        for tp, cp, ep in product(tps, cps, eps):
            for etp in {1, tp}:
                layout = Layout(world_size, tp, pp, vpp, cp, ep, etp, first=split[0], last=split[1])
                if next(broken_rules(config, layout), None) is None:
                    yield layout


@cache
def stage_split(num_layers: int, pp: int, vpp: int) -> tuple[int | None, int | None] | None:
    """(first_stage_layers, last_stage_layers) for these stages: neither where equal ones work; None: nothing does."""
    if num_layers % (pp * vpp) == 0:
        return None if pp == 1 < vpp else (None, None)
    return next(uneven_stages(num_layers, pp, vpp), None)


def _with_layout(config: Config, ranks: Layout) -> Config:
    parallel = replace(
        config.parallel,
        tp=ranks.tp,
        pp=ranks.pp,
        vpp=ranks.vpp,
        cp=ranks.cp,
        ep=ranks.ep,
        etp=ranks.etp,
        first_stage_layers=ranks.first,
        last_stage_layers=ranks.last,
    )
    return replace(config, parallel=parallel)


def distinct(plans: Sequence[Plan], limit: int) -> list[Plan]:
    """The best plan of each layout, the fastest `limit`."""
    best: dict[Layout, Plan] = {}
    for plan in plans:
        best.setdefault(plan.layout, plan)
    return list(best.values())[:limit]
