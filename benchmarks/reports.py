"""Shared by the benchmarks: ratios, the machine, versions, tables in Markdown files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gspo_megatron.device import Device


def machine(device: Device, threads: int) -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cores = f"{os.cpu_count()} cores of {name[1] if name else platform.machine()}"
    return f"{device.describe()}; {cores}, threads: {threads}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios within each turn, in which both saw the same load of the machine."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def spread_ratio(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """`median_ratio`, and the quartiles of the ratios: half of the turns lie between them."""
    low, middle, high = statistics.quantiles(
        (a / b for a, b in zip(mine, theirs, strict=True)), n=4, method="inclusive"
    )
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; short rows are padded."""
    rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_between_marks(path: Path, mark: str, text: str) -> None:
    """Replaces the text between `<!-- mark -->` and `<!-- end of mark -->`.

    Raises:
        ValueError: the file does not have these marks.
    """
    marks = re.compile(rf"(?<=<!-- {mark} -->\n).*?(?=<!-- end of {mark} -->)", re.DOTALL)
    old = path.read_text()
    if not marks.search(old):
        raise ValueError(f"{path} has no lines '<!-- {mark} -->' and '<!-- end of {mark} -->' to write between")
    path.write_text(marks.sub(lambda _: text, old))


def keep(result: Mapping[str, Any], text: str, mark: str, *, output: Path | None, markdown: Path | None) -> None:
    """Writes what was measured as JSON to `output`, and as `text` between the marks of the page `markdown`, where these
    are given."""
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
    if markdown:
        write_between_marks(markdown, mark, text)
