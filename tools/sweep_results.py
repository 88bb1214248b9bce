"""The numbers of a sweep: curves over steps, final values and their confidence intervals over seeds, as JSON.

The interval of n seeds is mean ± t(n - 1) s / sqrt(n): Student's 95 % interval, s the standard deviation with n - 1. It
takes the seeds' values as normally distributed. A bootstrap does not, but with three to ten seeds its intervals are
too narrow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from sweep import Curve, Run, Sweep

from gspo_megatron.testing.intervals import LEVEL, Interval

Row = Mapping[str, Any]

LAST = 0.1
"""The share of a run's rows whose mean is its final value, where that is not one measurement."""
COLLAPSED = 0.5


class Measure(NamedTuple):
    """What is drawn over steps and, as one number a run, compared.

    Attributes:
        of: its value in a row of metrics.jsonl, or None.
        number: a run's number: `final`, the last measured; `gain`, that minus the first; `end`, the mean of its last
            rows; `mean`, of all its rows.
        drawn: over steps, too.
        may_lack: many sweeps do not have it, and then no line of it either.
    """

    key: str
    title: str
    of: Callable[[Row], float | None]
    number: str
    drawn: bool = True
    may_lack: bool = False

    def values(self, rows: Sequence[Row]) -> dict[int, float]:
        """By step, where measured."""
        found = ((row["step"], self.of(row)) for row in rows)
        return {step: value for step, value in found if value is not None}

    def number_of(self, rows: Sequence[Row]) -> float | None:
        values = list(self.values(rows).values())
        if not values:
            return None
        if self.number == "gain":
            return values[-1] - values[0]
        last = {"final": 1, "end": max(1, round(LAST * len(values))), "mean": len(values)}[self.number]
        return statistics.fmean(values[-last:])


def metric(key: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(key)


def ratio_spread(row: Row) -> float | None:
    low, high = row.get("ratio/min"), row.get("ratio/max")
    return math.log(high / low) if low and high and low > 0 else None


def mean_of_layers(key: str) -> Callable[[Row], float | None]:
    def mean(row: Row) -> float | None:
        layers = [value for name, value in row.items() if name.startswith(f"{key}/") and value is not None]
        return statistics.fmean(layers) if layers else None

    return mean


MEASURES = (
    Measure("accuracy", "held-out accuracy", metric("eval/accuracy"), "final"),
    Measure("gain", "gain in held-out accuracy", metric("eval/accuracy"), "gain", drawn=False),
    Measure("reward", "reward", metric("reward/mean"), "end"),
    Measure("clip_fraction", "clip fraction", metric("clip_fraction"), "mean"),
    Measure("ratio_spread", "ratio spread, log(max / min)", ratio_spread, "mean"),
    Measure(
        "routers_changed", "router drift, share of changed choices", mean_of_layers("router/changed_fraction"), "mean"
    ),
    Measure("grad_norm", "gradient norm", metric("grad_norm"), "mean"),
    Measure("kl_old", "KL to the old policy, nats a token", metric("kl/old"), "mean"),
    Measure("entropy", "entropy, nats a token", metric("entropy"), "end"),
    Measure("sampler_kl", "KL from sampler to policy, nats a token", metric("sampler/kl"), "mean", may_lack=True),
    Measure(
        "sampler_routing",
        "share of tokens with other experts in the sampler, mean of the layers",
        mean_of_layers("router/sampler_changed_fraction"),
        "mean",
        drawn=False,
        may_lack=True,
    ),
    Measure(
        "correction_weight", "weight of the correction", metric("sampler/weight"), "mean", drawn=False, may_lack=True
    ),
)
NUMBERS = {
    "final": "at the end",
    "gain": "end minus start",
    "end": f"mean of the last {LAST:.0%} of steps",
    "mean": "mean of all steps",
}


def results(sweep: Sweep, command: str) -> dict[str, Any]:
    """Everything that the page shows, of the curves that have runs. `command` made the runs, and continues them."""
    every = [_curve(curve, command) for curve in sweep.curves]
    for curve in every:
        first = next(other for other in every if other["point"] == curve["point"])
        curve["against"] = {"row": first["row"], **_differences(curve, first)}
    curves = [made for made, curve in zip(every, sweep.curves, strict=True) if curve.has_begun]
    shown = [m for m in MEASURES if not m.may_lack or any(c["measures"][m.key]["interval"] for c in curves)]
    keys = {measure.key for measure in shown}
    for curve in curves:
        for part in (curve["measures"], curve["against"]):
            for key in {measure.key for measure in MEASURES} - keys:
                del part[key]
    return {
        "title": sweep.title,
        "about": sweep.about,
        "command": command,
        "axis": sweep.axis,
        "points": list(dict.fromkeys(curve["point"] for curve in curves)),
        "interval": f"Student's t over seeds, {LEVEL:.0%}",
        "made": datetime.now(timezone.utc).strftime("%d %B %Y"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "measures": {
            measure.key: {"title": measure.title, "number": NUMBERS[measure.number], "drawn": measure.drawn}
            for measure in shown
        },
        "curves": curves,
    }


def _curve(curve: Curve, command: str) -> dict[str, Any]:
    rows = {run.seed: run.rows() for run in curve.runs}
    # A run that is still to be continued has no end, and its curve is not to be compared with whole ones.
    whole = {run.seed: rows[run.seed] for run in curve.runs if run.has_result}
    measures = {}
    for measure in MEASURES:
        seeds = {seed: measure.values(found) for seed, found in whole.items()}
        numbers = {seed: measure.number_of(found) for seed, found in whole.items()}
        known = [number for number in numbers.values() if number is not None]
        measures[measure.key] = {
            **_band(list(seeds.values())),
            "seeds": {seed: {"steps": list(values), "values": list(values.values())} for seed, values in seeds.items()},
            "numbers": numbers,
            "interval": Interval.of(known)._asdict() if known else None,
        }
    return {
        "row": curve.row,
        "point": curve.point,
        "name": curve.name,
        "repeat": f"{command} --rows {curve.name}",
        "runs": [_about(run, rows[run.seed]) for run in curve.runs],
        "measures": measures,
    }


def _band(seeds: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """Mean and interval at every step that all seeds have: where one has stopped, the others' mean would be of the
    survivors."""
    common = sorted(set.intersection(*(set(values) for values in seeds))) if seeds else []
    intervals = [Interval.of([values[step] for values in seeds]) for step in common]
    return {"steps": common, **{part: [getattr(i, part) for i in intervals] for part in ("mean", "low", "high")}}


def _about(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    outcome = run.outcome()
    accuracies = list(MEASURES[0].values(rows).values())
    return {
        "seed": run.seed,
        "state": run.state,
        "status": outcome.get("status"),
        "seconds": outcome.get("seconds"),
        "steps": rows[-1]["step"] if rows else 0,
        "collapsed": bool(accuracies) and accuracies[-1] < COLLAPSED * max(accuracies),
        "said": outcome.get("said", ""),
        "command": run.command,
    }


def _differences(curve: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Of every measure, curve minus first, seed by seed: prompts and initial weights of a seed are the same in both."""
    found: dict[str, Any] = {}
    for key, mine in curve["measures"].items():
        theirs = first["measures"][key]["numbers"]
        pairs = [(value, theirs.get(seed)) for seed, value in mine["numbers"].items()]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        found[key] = Interval.of(differences)._asdict() if differences and curve is not first else None
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {len(names)} cores of {names[0]}" if names else "CPU"
