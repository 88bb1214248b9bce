"""Plots a run's metrics.jsonl over steps: rewards, held-out accuracy, clip fraction, entropy, response length.

python tools/plot_run.py runs/demo --output runs/demo/plot.png                                # needs the extra `plot`
python tools/plot_run.py runs/demo --output runs/demo/plot.png --panels reward entropy

A long series is drawn faintly, with its mean over 10 steps on top.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "reward": ("reward", ("reward/mean", "accuracy", "eval/accuracy")),
    "terms": ("reward terms", ()),
    "clip": ("clip fraction", ("clip_fraction",)),
    "entropy": ("entropy, nats a token", ("entropy",)),
    "length": ("response length, tokens", ("response_length/mean",)),
    "truncated": ("truncated", ("truncated_fraction",)),
}
"""By the name that --panels takes: title, and the metrics in it (none: the terms of the reward)."""
NOT_TERMS = {"reward/mean", "reward/std", "reward/errors", "reward/lost"}
COLUMNS, WINDOW, LONG = 3, 10, 40


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run directory, or a metrics.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), metavar="PANEL")
    options = parser.parse_args(argv)
    path = options.run / "metrics.jsonl" if options.run.is_dir() else options.run
    if not path.is_file():
        print(f"{path} does not exist; expected a run directory or a metrics.jsonl", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = min(COLUMNS, len(options.panels))
    lines = -(-len(options.panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.33 * columns, 3.25 * lines), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(options.panels) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, options.panels, strict=False):
        draw(axis, rows, *PANELS[name])
    figure.suptitle(options.title)
    figure.savefig(options.output, dpi=90)
    return 0


def draw(axis: Any, rows: list[dict[str, Any]], title: str, keys: Sequence[str]) -> None:
    """One panel. A metric that has the same values as one already drawn shares its curve."""
    keys = keys or [key for key in rows[-1] if key.startswith("reward/") and key not in NOT_TERMS]
    curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for key in keys:
        points = tuple((row["step"], row[key]) for row in rows if row.get(key) is not None)
        if points:
            curves.setdefault(points, []).append(key)
    for number, (points, names) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        colour, label = f"C{number}", ", ".join(names)
        if len(points) > LONG:
            means = [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]
            axis.plot(steps, values, color=colour, alpha=0.3)
            axis.plot(steps, means, color=colour, label=label)
        else:
            axis.plot(steps, values, color=colour, marker="o" if len(points) < 12 else None, label=label)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
