"""Which layers each pipeline rank holds.

The first and the last stage may differ from the others (parallel.first_stage_layers, parallel.last_stage_layers): they
also hold the embedding and the output matrix, and a number of layers need not be divisible by the number of stages.
With virtual stages, every rank cuts its layers into vpp chunks of equal depth, and a token passes through the first
chunk of all ranks before the second chunk of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate


def stage_layers(num_layers: int, pp: int, first: int | None = None, last: int | None = None) -> tuple[int, ...]:
    """Layers of each pipeline rank; `first` and `last` are those of the outer ranks, None: as many as the others. What
    does not divide evenly is left out."""
    if pp == 1:
        return (num_layers,)
    if pp == 2 and (first is not None or last is not None):
        # One of the two says what the other is.
        first = first if first is not None else num_layers - (last or 0)
        return first, num_layers - first if last is None else last
    given = [size for size in (first, last) if size is not None]
    others = (num_layers - sum(given)) // (pp - len(given))
    return (
        others if first is None else first,
        *[others] * (pp - 2),
        others if last is None else last,
    )


@lru_cache(256)
def layers_of_chunks(sizes: tuple[int, ...], vpp: int) -> list[list[range]]:
    """For each pipeline rank, the layers of each of its `vpp` chunks; `sizes` are the layers of each rank."""
    chunk_sizes = [size // vpp for _ in range(vpp) for size in sizes]
    ends = list(accumulate(chunk_sizes))
    chunks = [range(end - size, end) for size, end in zip(chunk_sizes, ends, strict=True)]
    return [chunks[rank :: len(sizes)] for rank in range(len(sizes))]


def broken_stages(num_layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> Iterator[str]:
    """Why the layers cannot be split this way, with values that work."""
    if pp == 1 and (first is not None or last is not None):
        yield f"{_settings(first, last)} splits layers over pipeline stages, but parallel.pp=1 has only one; set null"
        return
    sizes = stage_layers(num_layers, pp, first, last) if pp <= num_layers else ()  # not a list of 10^9 stages
    if sum(sizes) == num_layers and min(sizes) > 0 and not any(size % vpp for size in sizes):
        return
    if first is None and last is None:
        text = f"model.num_layers={num_layers} is not divisible by pp({pp}) * vpp({vpp}) = {pp * vpp}"
    else:
        text = (
            f"model.num_layers={num_layers} with parallel.first_stage_layers={_shown(first)} and "
            f"parallel.last_stage_layers={_shown(last)} cannot be split over pp({pp}) stages: each needs a multiple of "
            f"vpp({vpp}) layers, above 0, and all stages between the first and the last have the same number"
        )
    if fitting := next(uneven_stages(num_layers, pp, vpp), None):
        text += f"; stages of unequal depth work: {_settings(*fitting)}"
    yield text


def uneven_stages(num_layers: int, pp: int, vpp: int) -> Iterator[tuple[int | None, int | None]]:
    """(first_stage_layers, last_stage_layers) that work, the best balanced first: smallest largest stage, then the
    most equal ones, then the fewest layers on the outer stages, which hold a vocabulary matrix each. Of those with the
    same stages between, the best one alone: the outer two are as equal as can be, the first before the last."""
    if pp < 2 or num_layers < pp * vpp:
        return
    pairs: Iterator[tuple[int, int | None]]
    if num_layers % vpp:
        return
    chunks = num_layers // vpp
    if pp == 2:
        pairs = iter([((chunks + 1) // 2 * vpp, None)])
    else:
        outer = (chunks - middle for middle in range(pp - 2, chunks - 1, pp - 2))
        pairs = (((both + 1) // 2 * vpp, both // 2 * vpp) for both in outer)

    def imbalance(pair: tuple[int | None, int | None]) -> tuple[int, ...]:
        sizes = stage_layers(num_layers, pp, *pair)
        return max(sizes), max(sizes) - min(sizes), sizes[0] + sizes[-1], abs(sizes[0] - sizes[-1]), -sizes[0]

    for first, last in sorted(pairs, key=imbalance):
        middle = stage_layers(num_layers, pp, first, last)[1]
        yield (None if first == middle and pp > 2 else first), (None if last == middle else last)


def _shown(size: int | None) -> str:
    return "null" if size is None else str(size)


def _settings(first: int | None, last: int | None) -> str:
    both = (("first", first), ("last", last))
    return " ".join(f"parallel.{name}_stage_layers={size}" for name, size in both if size is not None)
