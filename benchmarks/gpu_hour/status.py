"""The table of docs/status.md: what `make gpu-hour` has measured, each number beside its target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_hour.parts import PARTS, Part, Shown, derived

MARK = "gpu-hour"
NOT_YET = "not yet measured"
Result = Mapping[str, Any]


def results_in(folder: Path) -> dict[str, Result]:
    """By part; rehearsals are no results."""
    files = {part.name: folder / f"{part.name}.json" for part in PARTS}
    found = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    return {name: result for name, result in found.items() if not result["rehearsal"]}


def missed(results: Mapping[str, Result]) -> list[str]:
    """A sentence for each number that misses its target."""
    said = []
    values = _values(results)
    for part in PARTS:
        for shown in part.shown:
            value = values.get(part.name, {}).get(shown.key)
            if value is not None and shown.target and not shown.target.met(value):
                said.append(f"{part.name}: {shown.name} is {value:{shown.form}}, the target is {shown.target}")
    return said


def table(results: Mapping[str, Result]) -> str:
    """A row for each number; parts that have not run say so."""
    values = _values(results)
    lines = ["| part | | target | GPU |", "| --- | --- | ---: | ---: |"]
    for part in PARTS:
        for i, shown in enumerate(part.shown):
            cell = _cell(part, shown, results.get(part.name), values.get(part.name, {}))
            name = f"`{part.name}`" if i == 0 else ""
            lines.append(f"| {name} | {shown.name} | {shown.target or ''} | {cell} |")
    origins: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["state"] == "measured":
            origins.setdefault(_origin(result), []).append(name)
    notes = [f"- {', '.join(names)}: {origin}" for origin, names in origins.items()]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _values(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    return derived({name: result["values"] for name, result in results.items() if result["state"] == "measured"})


def _cell(part: Part, shown: Shown, result: Result | None, values: Mapping[str, Any]) -> str:
    if result is None:
        return NOT_YET
    if result["state"] != "measured":
        return f"{result['state']}: {result['reason']}".replace("|", "/")
    value = values.get(shown.key)
    if value is None:
        return NOT_YET
    missed = "" if shown.target is None or shown.target.met(value) else ", **missed**"
    return f"{value:{shown.form}}{missed}"


def _origin(result: Result) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['date']}, {result['machine']}; {packages}"
