"""Can a run start here? `python -m gspo_megatron.doctor [--build] [--json] [--dir RUN_DIR]`: what is wrong, what to do.

Checks Python, torch, driver, GPUs, NCCL, Megatron-Core, Transformer Engine, that the log-prob kernel compiles, limits,
disk and versions, and starts no process group. --build: while an image is built, without GPUs; there everything has to
work. Exit status: 0 a run can start here (on the CPU if no GPU is found); 1 something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gspo_megatron.device.checkup import Finding, State, examine, passes
from gspo_megatron.device.facts import Facts
from gspo_megatron.device.gather import gather

PINS = Path(__file__).parents[1] / "requirements" / "pins.txt"
WIDTH = 118


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gspo_megatron.doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--build", action="store_true", help="what can be checked while an image is built")
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where runs write (default: runs)")
    parser.add_argument("--pins", type=Path, default=PINS, help="the versions that are tested together")
    parser.add_argument("--limit-s", type=float, default=90.0, help="time limit of every check (default: 90)")
    options = parser.parse_args(argv)
    facts = gather(options.dir, options.pins, options.limit_s)
    findings = examine(facts, build=options.build)
    good = passes(findings, build=options.build)
    if options.json:
        found = {name: asdict(finding) | {"state": finding.state.value} for name, finding in findings}
        print(json.dumps({"ok": good, "findings": found, "facts": asdict(facts)}, indent=1))
    else:
        print(table(findings))
        print(verdict(facts, findings, build=options.build))
    return 0 if good else 1


def table(findings: list[tuple[str, Finding]]) -> str:
    """A line for each check; what is wrong and what to do on the lines below it."""
    lines, indent = [], " " * 27
    for name, finding in findings:
        texts = {f"{finding.state.value:<6} {name:<19} ": finding.found, indent: finding.problem}
        texts |= {f"{indent}-> ": finding.advice}
        for start, text in texts.items():
            how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
            lines += textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), **how)
    return "\n".join(lines)


def verdict(facts: Facts, findings: list[tuple[str, Finding]], *, build: bool) -> str:
    bad = [name for name, finding in findings if finding.state is State.WRONG]
    limits = [name for name, finding in findings if finding.state is State.LIMIT]
    if bad or (build and limits):
        return f"\nNot ready: {', '.join(bad + (limits if build else []))}."
    if build:
        return "\nThe image is ready."
    where = f"on {len(facts.gpus)} GPU{'s'[: len(facts.gpus) > 1]}" if facts.gpus else "on the CPU"
    return f"\nA run can start {where}." + (f" With limits: {', '.join(limits)}." if limits else "")


if __name__ == "__main__":
    sys.exit(main())
