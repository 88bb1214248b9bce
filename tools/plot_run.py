"""Plots a run's metrics.jsonl: reward terms, held-out accuracy, clip fraction, entropy and response length, over steps.

python tools/plot_run.py runs/demo --output runs/demo/plot.png          # needs the extra `plot`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("reward", ("reward/mean", "accuracy", "eval/accuracy")),
    ("reward terms", ()),
    ("clip fraction", ("clip_fraction",)),
    ("entropy, nats a token", ("entropy",)),
    ("response length, tokens", ("response_length/mean",)),
    ("truncated", ("truncated_fraction",)),
)
NOT_TERMS = {"reward/mean", "reward/std", "reward/errors"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run directory, or a metrics.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    path = options.run / "metrics.jsonl" if options.run.is_dir() else options.run
    if not path.is_file():
        print(f"{path} does not exist; expected a run directory or a metrics.jsonl", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    terms = tuple(k for k in rows[-1] if k.startswith("reward/") and k not in NOT_TERMS)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
        for key in keys or terms:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 12 else None, label=key)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(options.title)
    figure.savefig(options.output, dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
