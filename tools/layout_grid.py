"""Every layout of up to 8 processes against one process: the gradient of every parameter, for four algorithms.

    python tools/layout_grid.py --output benchmarks/results/grid.json --table docs/layouts.md      (`make grid`)

Axes: tp, pp, vpp, cp, etp, dp of 1 and 2, ep of 1, 2 and 4, wherever they make a valid layout. Each is compared with
tools/check_layout.py in float64 and in float32 for gspo, gspo_sum, grpo and dapo; token dispatcher and activation
recompute change from one comparison to the next, so that every layout runs with several combinations of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from check_layout import FIXED, LayoutRequest, Report, Row, compare, run

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.layout.layout import AXES

# A vocabulary of 13 that no tp divides; responses of 1 to 8 tokens after prompts of 3 to 8; micro-batches of a few
# sequences, so that ranks differ in their number, length and content; KL and entropy terms with a gradient.
CONFIG = """
run: {seed: 3}
precision: {device: cpu}
model: {num_layers: 4, hidden_size: 16, num_attention_heads: 4, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 24, init_std: 0.2}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 6}, eval_size: 12,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 8, group_size: 4, max_new_tokens: 8}
algorithm: {kl_coef: 0.05, entropy_coef: 0.02}
train: {tokens_per_micro_batch: 48}
"""
SIZES = {"tp": (1, 2), "pp": (1, 2), "vpp": (1, 2), "cp": (1, 2), "ep": (1, 2, 4), "etp": (1, 2), "dp": (1, 2)}
MAX_PROCESSES = 8
VARIANTS = ("gspo", "gspo_sum", "grpo", "dapo")
DISPATCHERS = ("alltoall", "allgather")
RECOMPUTE = ("none", "selective", "full")
TABLE = re.compile(r"(?<=<!-- grid -->\n).*?(?=<!-- end of grid -->)", re.DOTALL)


class Case(NamedTuple):
    """One comparison on a layout."""

    variant: str
    dtype: str
    dispatcher: str
    recompute: str

    @property
    def overrides(self) -> list[str]:
        return [
            f"algorithm.variant={self.variant}",
            f"precision.dtype={self.dtype}",
            f"parallel.token_dispatcher={self.dispatcher}",
            f"parallel.recompute={self.recompute}",
        ]


@cache
def settings(case: Case) -> Config:
    """Settings of a comparison, on one process."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(CONFIG)
        file.flush()
        config = settle(load_config(file.name, [*FIXED, *case.overrides]), 1).config
    return config


def config_of(case: Case, layout: LayoutRequest) -> Config:
    """Settings of a comparison on a layout.

    Raises:
        ConfigError: the layout is not valid.
    """
    base = settings(case)
    config = replace(base, parallel=replace(base.parallel, **{axis: getattr(layout, axis) for axis in AXES}))
    check_config(config, layout.world_size)
    return config


@cache
def layouts() -> tuple[LayoutRequest, ...]:
    """All valid layouts, smallest first."""
    found = []
    for sizes in itertools.product(*SIZES.values()):
        layout = LayoutRequest(**dict(zip(SIZES, sizes, strict=True)))
        try:
            if layout.world_size <= MAX_PROCESSES:
                config_of(Case(VARIANTS[0], "fp64", DISPATCHERS[0], RECOMPUTE[0]), layout)
                found.append(layout)
        except ConfigError:
            continue
    return tuple(sorted(found, key=lambda layout: layout.world_size))


def cases(layout: LayoutRequest) -> Iterator[Case]:
    """Every algorithm in both formats. Dispatcher and recompute cycle with different periods."""
    start = layouts().index(layout)
    for dtype, (i, variant) in itertools.product(("fp64", "fp32"), enumerate(VARIANTS, start)):
        yield Case(variant, dtype, DISPATCHERS[i % 2], RECOMPUTE[i % 3])


def cover() -> list[LayoutRequest]:
    """A few small layouts that together have every pair of axis sizes of any valid layout; greedy, by new pairs per
    process."""

    def pairs(layout: LayoutRequest) -> set[tuple[object, ...]]:
        return set(itertools.combinations(vars(layout).items(), 2))

    missing, chosen = set().union(*map(pairs, layouts())), []
    while missing:
        chosen.append(max(layouts(), key=lambda layout: len(pairs(layout) & missing) / (4 + layout.world_size)))
        missing -= pairs(chosen[-1])
    return chosen


@cache
def reference(variant: str, dtype: str) -> Report:
    """One process, without recompute."""
    return run(config_of(Case(variant, dtype, DISPATCHERS[0], RECOMPUTE[0]), LayoutRequest()), 1, timeout_s=120)


def compared(layout: LayoutRequest, case: Case) -> list[Row]:
    """The rows of one comparison."""
    theirs = reference(case.variant, case.dtype)
    ours = run(config_of(case, layout), layout.world_size, timeout_s=120, given=theirs.rollouts)
    return compare(theirs, ours, case.dtype)


# --- the command ---


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="Markdown file whose table between the grid marks is replaced")
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    for number, layout in enumerate(layouts(), 1):
        found = [{**case._asdict(), **summary(compared(layout, case))} for case in cases(layout)]
        results.append({"layout": str(layout), "processes": layout.world_size, "cases": found})
        ok = all(case["ok"] for case in found)
        seconds = time.monotonic() - start
        print(
            f"{number:>3} of {len(layouts())}  {layout!s:<40} {'equal' if ok else 'NOT EQUAL'}  {seconds:.0f} s",
            flush=True,
        )
    versions = {package: version(package) for package in ("megatron-core", "torch")}
    options.output.write_text(json.dumps({"versions": versions, "layouts": results}, indent=1) + "\n")
    if options.table:
        text = options.table.read_text()
        options.table.write_text(TABLE.sub(lambda _: table(results), text))
    return 0 if all(case["ok"] for result in results for case in result["cases"]) else 1


def summary(rows: Sequence[Row]) -> dict[str, object]:
    """The largest differences of a comparison."""
    metrics = {row.name: row for row in rows if row.reference is not None}
    gradients = [row for row in rows if row.reference is None]
    worst = max(gradients, key=lambda row: row.difference)
    apart = ("rollouts that differ", "grad_norm", "loss")
    return {
        "ok": all(row.ok for row in rows),
        "rollouts_that_differ": metrics["rollouts that differ"].difference,
        "loss": metrics["loss"].difference,
        "metrics": max(row.difference for name, row in metrics.items() if name not in apart),
        "grad_norm": metrics["grad_norm"].difference,
        "gradient": worst.difference,
        "worst": worst.name,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each layout: the largest difference of all its cases."""
    head = (
        "| layout | processes | loss, fp64 | gradients, fp64 | loss, fp32 | gradients, fp32 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
    )
    lines = []
    for result in results:
        cells = [
            f"{max(case[what] for case in result['cases'] if case['dtype'] == dtype):.0e}"
            for dtype in ("fp64", "fp32")
            for what in ("loss", "gradient")
        ]
        lines.append(f"| {result['layout']} | {result['processes']} | {' | '.join(cells)} |\n")
    return head + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
