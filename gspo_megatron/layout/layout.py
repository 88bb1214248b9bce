"""Parallel layouts: what one requires of a model and of the number of processes, and which valid ones are nearest to an
invalid one. All of it follows from the settings, before any process group exists.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, isqrt, lcm, prod

from gspo_megatron.base.batches import PackingRules
from gspo_megatron.base.errors import plural
from gspo_megatron.config.sections import Config
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.stages import broken_stages, layers_of_chunks, stage_layers
from gspo_megatron.models.families import family_of

AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")


@dataclass(frozen=True)
class Layout:
    """The number of ranks of each parallel axis, and of virtual stages per pipeline rank. dp and edp follow from the
    world size. `first` and `last`: layers of the outer pipeline stages where they differ from the others."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    first: int | None = field(default=None, kw_only=True)
    last: int | None = field(default=None, kw_only=True)

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the dense layers."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Data-parallel replicas of the experts."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline rank."""
        return stage_layers(num_layers, self.pp, self.first, self.last)

    def layers_of_stage(self, num_layers: int, stage: int) -> list[int]:
        """The layers of a pipeline rank, numbered from 0 over the whole model."""
        return [layer for chunk in layers_of_chunks(self.stage_layers(num_layers), self.vpp)[stage] for layer in chunk]

    def __str__(self) -> str:
        outer = [(name, size) for name, size in (("first", self.first), ("last", self.last)) if size is not None]
        notes = [f"vpp {self.vpp}"] * (self.vpp > 1) + [f"{name} {plural(size, 'layer')}" for name, size in outer]
        pipeline = f"pp {self.pp}" + (f" ({', '.join(notes)})" if notes else "")
        dense = f"tp {self.tp} x {pipeline} x cp {self.cp} x dp {self.dp}"
        return f"{dense}; experts: ep {self.ep} x etp {self.etp} x edp {self.edp}"


def broken_rules(config: Config, layout: Layout) -> Iterator[str]:
    """What `layout` requires of the model, the precision and the number of processes, and does not get.

    A rule that is broken while later ones of AXES are still 1 stays broken whatever they become: nearest_layouts relies
    on it.
    """
    m, columns = config.model.shape, RECIPES[config.precision.fp8].column_multiple
    for share in family_of(m).shares(m):
        unit = columns if share.columns else 1
        if share.value % (unit * _ranks(layout, share.axes)):
            yield f"{share.name}={share.value} is not divisible by {_product(layout, share.axes, unit)}" + (
                f" (matmuls in precision.fp8={config.precision.fp8} take {unit} columns at a time: "
                f"{_nearest_multiples(share.value, unit * _ranks(layout, share.axes))} would do, or precision.fp8=none)"
                if unit > 1
                else ""
            )
    if layout.cp > 1 and m.max_sequence_length % (2 * layout.cp):
        yield (
            f"parallel.cp={layout.cp} splits every sequence into 2 * cp equal chunks, but "
            f"model.max_sequence_length={m.max_sequence_length} is not divisible by {2 * layout.cp}; set it to "
            f"{_nearest_multiples(m.max_sequence_length, 2 * layout.cp)}"
        )
    yield from broken_stages(m.num_layers, layout.pp, layout.vpp, layout.first, layout.last)
    if layout.vpp > 1 and layout.pp == 1:
        yield f"parallel.vpp={layout.vpp} splits pipeline stages, but parallel.pp=1 has none"
    dense, experts = ("tp", "pp", "cp"), ("etp", "ep", "pp")
    for axes in (dense, experts):
        if layout.world_size % _ranks(layout, axes):
            both = lcm(_ranks(layout, dense), _ranks(layout, experts))
            yield (
                f"{_product(layout, axes)} does not divide the {plural(layout.world_size, 'process')}; start a "
                f"multiple of {both}, such as {_nearest_multiples(layout.world_size, both)}"
            )


def nearest_layouts(config: Config, asked: Layout) -> list[Layout]:
    """Up to three layouts of the same number of processes that work, the nearest to `asked` first.

    Every change in them is needed: with any one axis reset to `asked` they would not work. None is farther away than
    the nearest by more than two doublings.
    """
    found: list[tuple[Fraction, Layout]] = []
    for distance, layout in _by_distance(config, asked):
        if len(found) == 3 or (found and distance > 4 * found[0][0]):
            break
        put_back = (replace(layout, **{axis: getattr(asked, axis)}) for axis in changed_axes(asked, layout))
        if not any(_works(config, other) for other in put_back):
            found.append((distance, layout))
    return [layout for _, layout in found]


def _by_distance(config: Config, asked: Layout) -> Iterator[tuple[Fraction, Layout]]:
    """All layouts that work, with distance = sum over AXES of |log2(size / asked size)|, kept exact as the product of
    the ratios. Of equally distant ones, the one with tp closer to `asked` comes first, then pp, and so on.

    Best-first search over prefixes (tp; tp and pp; ...): the nearest one is extended by every size of its next axis.
    """
    of_world = divisors_of(asked.world_size)
    uneven = (asked.first, asked.last)
    of_layers = divisors_of(config.model.num_layers)  # vpp divides the layers of every stage, and so all
    beginnings: list[tuple[Fraction, tuple[Fraction, ...], tuple[int, ...]]] = [(Fraction(1), (), ())]
    while beginnings:
        distance, ratios, sizes = heapq.heappop(beginnings)
        if len(sizes) == len(AXES):
            yield distance, replace(asked, **dict(zip(AXES, sizes, strict=True)))
            continue
        axis = AXES[len(sizes)]
        wanted = getattr(asked, axis)
        for size in of_layers if axis == "vpp" else of_world:
            longer = (*sizes, size)
            # Before pp is chosen there are no stages.
            first, last = uneven if len(longer) > AXES.index("pp") else (None, None)
            if _works(config, Layout(asked.world_size, *longer, first=first, last=last)):
                ratio = Fraction(max(size, wanted), min(size, wanted))
                heapq.heappush(beginnings, (distance * ratio, (*ratios, ratio), longer))


def _works(config: Config, layout: Layout) -> bool:
    return next(broken_rules(config, layout), None) is None


def changed_axes(asked: Layout, other: Layout) -> list[str]:
    """Of AXES, those whose sizes differ."""
    return [axis for axis in AXES if getattr(other, axis) != getattr(asked, axis)]


def divisors_of(number: int) -> list[int]:
    """Ascending. Each up to the root has a partner above it."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _ranks(layout: Layout, axes: tuple[str, ...]) -> int:
    return prod(getattr(layout, axis) for axis in axes)


def _product(layout: Layout, axes: tuple[str, ...], unit: int = 1) -> str:
    """The factors and their product, as in tp(4) * pp(2) = 8."""
    factors = [str(unit)] * (unit > 1) + [f"{axis}({getattr(layout, axis)})" for axis in axes]
    return " * ".join(factors) + (f" = {unit * _ranks(layout, axes)}" if len(factors) > 1 else "")


def _nearest_multiples(number: int, unit: int) -> str:
    """The multiple below and the one above, as in 8 or 16."""
    return " or ".join(str(n * unit) for n in (number // unit, ceil(number / unit)) if n)


def packing_rules(config: Config) -> PackingRules:
    """What the layout requires of micro-batches.

    sequence_multiple: context parallelism splits every sequence into 2 * cp chunks, two for each rank.
    token_multiple: a multiple of that, and on each context-parallel rank of `token_multiple(config)`.
    count_multiple: Megatron's interleaved schedule takes one micro-batch per pipeline stage in each round.
    same_tokens: the allgather dispatcher gathers the same number of tokens from every rank that shares the experts.
    """
    p = config.parallel
    sequence_multiple = 2 * p.cp if p.cp > 1 else 1
    return PackingRules(
        sequence_multiple=sequence_multiple,
        token_multiple=lcm(sequence_multiple, p.cp * token_multiple(config)),
        count_multiple=p.pp if p.vpp > 1 else 1,
        same_tokens=p.token_dispatcher == "allgather" and p.ep * p.etp > 1,
    )


def token_multiple(config: Config) -> int:
    """Tokens of a rank's forward in training and scoring come in multiples of this: sequence parallelism gives every
    tensor-parallel rank the same number, and a number format takes several rows at a time."""
    recipe, tp = RECIPES[config.precision.fp8], config.parallel.tp
    return tp * recipe.gathered_row_multiple if tp > 1 else recipe.row_multiple


def sampler_token_multiple(config: Config) -> int:
    """The same for the sampler, which runs without context parallelism. Its forwards are small, often a token for each
    rollout: they keep to what matmuls need, and rows that are gathered in bf16 are quantized to the same numbers."""
    return config.parallel.tp * RECIPES[config.precision.fp8].row_multiple
