"""Metrics: merged as (total, weight) pairs, and turned into numbers once per step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A partial metric. `mean` is the sum of totals divided by the sum of weights, over all ranks and micro-batches;
    `sum`, `min` and `max` use the totals only. Totals may be tensors on the device."""

    total: Any
    weight: Any = 1.0
    reduction: str = "mean"


class LossTerms(NamedTuple):
    """`loss`: this micro-batch's share of the update's loss, already divided by the update's global count (scalar)."""

    loss: Tensor
    metrics: dict[str, Metric]


def _lower(a: Any, b: Any) -> Any:
    """min(a, b) of tensors, numbers, or one of each (an empty micro-batch contributes a plain inf)."""
    if isinstance(a, torch.Tensor):
        return a.clamp(max=b)
    return _lower(b, a) if isinstance(b, torch.Tensor) else min(a, b)


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "mean": operator.add,
    "sum": operator.add,
    "min": _lower,
    "max": lambda a, b: -_lower(-a, -b),
}


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Combines metrics of the same name by their reduction. Tensors stay tensors, without device synchronisation."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            seen = merged.get(name)
            if seen is None:
                merged[name] = metric
            else:
                assert seen.reduction == metric.reduction, f"metric {name} has two reductions"
                total = _COMBINE[metric.reduction](seen.total, metric.total)
                merged[name] = Metric(total, seen.weight + metric.weight, metric.reduction)
    return merged


def on_host(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The same metrics as Python numbers: the one synchronisation of a step."""
    return {name: Metric(float(m.total), float(m.weight), m.reduction) for name, m in metrics.items()}


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """total / weight for means (NaN where there was nothing to average), the total otherwise."""
    return {
        name: (float(m.total) / float(m.weight) if float(m.weight) else math.nan)
        if m.reduction == "mean"
        else float(m.total)
        for name, m in metrics.items()
    }
