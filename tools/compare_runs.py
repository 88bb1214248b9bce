"""Finds where two runs diverge: compares metrics.jsonl and, if both have them, rollouts/ of two run directories.

    python tools/compare_runs.py runs/a runs/b [--tolerance 0] [--all]

Prints the first step and key where they differ, with both values; --all prints every one. Wall-clock measurements are
ignored. Two numbers a and b are equal when |a - b| <= tolerance * max(1, |a|, |b|); the default requires equality.
Exit status: 0 equal, 1 different, 2 a run that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gspo_megatron.monitor.catalogue import OF_THE_MACHINE

Difference = tuple[float, str]
"""(step, what differs there)."""


class UnreadableRun(ValueError):
    """A run directory has no metrics, or a line that is not a JSON object."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without wall-clock measurements.

    Raises:
        UnreadableRun: the file is missing, or a line is not a JSON object.
    """
    if not path.is_file():
        raise UnreadableRun(f"{path} does not exist; expected the directory of a run")
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append({k: v for k, v in json.loads(line).items() if not k.startswith(OF_THE_MACHINE)})
            except (ValueError, AttributeError) as error:
                raise UnreadableRun(f"{path}:{number} is not a JSON object: {line[:60]!r}; is it truncated?") from error
    return rows


def value_differences(a: Any, b: Any, tolerance: float, key: str = "") -> Iterator[str]:
    """`key: value in A, value in B` wherever two JSON values differ; of objects and lists, wherever their parts do."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            inner = f"{key}.{name}" if key else name
            if name in a and name in b:
                yield from value_differences(a[name], b[name], tolerance, inner)
            else:
                yield f"{inner}: only in {'A' if name in a else 'B'}, {a.get(name, b.get(name))!r}"
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{key}: {len(a)} items in A, {len(b)} in B"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from value_differences(x, y, tolerance, f"{key}[{i}]")
    elif not _same(a, b, tolerance):
        yield f"{key}: {a!r} in A, {b!r} in B"


def metrics_differences(a: Path, b: Path, tolerance: float) -> Iterator[Difference]:
    """Row by row. A step with several rows, or none on one side, is a difference."""
    runs = [_by_step(path / "metrics.jsonl") for path in (a, b)]
    for step in sorted({*runs[0], *runs[1]}):
        in_a, in_b = (run.get(step, []) for run in runs)
        if len(in_a) == len(in_b) == 1:
            yield from ((step, text) for text in value_differences(in_a[0], in_b[0], tolerance))
        else:
            yield step, f"{_rows(len(in_a))} in A, {_rows(len(in_b))} in B"


def rollout_differences(a: Path, b: Path, tolerance: float) -> Iterator[Difference]:
    """File by file, `rollouts/step_000001.jsonl` and so on, rollout by rollout."""
    for name in sorted({path.name for run in (a, b) for path in (run / "rollouts").glob("step_*.jsonl")}):
        digits = name.removeprefix("step_").removesuffix(".jsonl")
        step = int(digits) if digits.isdecimal() else math.inf
        files = [run / "rollouts" / name for run in (a, b)]
        if not all(file.is_file() for file in files):
            yield step, f"rollouts/{name}: only in {'A' if files[0].is_file() else 'B'}"
            continue
        rows_a, rows_b = (read_rows(file) for file in files)
        yield from ((step, text) for text in value_differences(rows_a, rows_b, tolerance, "rollouts"))


def _by_step(path: Path) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in read_rows(path):
        if not isinstance(row.get("step"), int):
            raise UnreadableRun(f"{path}: a row has no step: {str(row)[:60]}")
        steps.setdefault(row["step"], []).append(row)
    if not steps:
        raise UnreadableRun(f"{path} is empty; has the run completed a step?")
    return steps


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if type(a) in (int, float) and type(b) in (int, float):
        both_nan = a != a and b != b
        return a == b or both_nan or abs(a - b) <= tolerance * max(1.0, abs(a), abs(b)) < math.inf
    return type(a) is type(b) and a == b


def _rows(count: int) -> str:
    return f"{count or 'no'} row{'s' * (count != 1)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("a", type=Path, metavar="A", help="a run directory")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--all", action="store_true", help="every difference, not only the first")
    options = parser.parse_args(argv)
    runs = (options.a, options.b)
    with_rollouts = [(run / "rollouts").is_dir() for run in runs]
    try:
        differences = list(metrics_differences(*runs, options.tolerance))
        if all(with_rollouts):
            differences += rollout_differences(*runs, options.tolerance)
    except (UnreadableRun, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if any(with_rollouts) and not all(with_rollouts):
        print(f"rollouts are not compared: {runs[with_rollouts.index(False)]} has none")
    differences.sort(key=lambda difference: difference[0])
    for step, text in differences if options.all else differences[:1]:
        print(f"step {step:g}: {text}")
    if not options.all and len(differences) > 1:
        print(f"and {len(differences) - 1} more; --all prints them")
    if not differences:
        print("equal")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
