"""Runs the parts of parts.py, writes a JSON file for each and the GPU column of docs/status.md.

    make gpu-hour                                         # or: python -m benchmarks.gpu_hour
    python -m benchmarks.gpu_hour --parts kernels log_probs --minutes 8
    python -m benchmarks.gpu_hour --rehearse --output /tmp/rehearsal      # without a GPU: the same code, tiny
    python -m benchmarks.gpu_hour --from benchmarks/results/gpu           # only the table

A part that fails, or runs into its time limit, does not stop the others. When --minutes are over, what is left is cut,
and says so. Exit status: 0 all that ran has met its targets; 1 something failed or missed one; 2 no GPU was found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_hour.parts import BY_NAME, ROOT, Part, chosen
from benchmarks.gpu_hour.status import MARK, missed, results_in, table
from benchmarks.reports import versions, write_between_marks
from gspo_megatron.device.checkup import problem_of_recipe
from gspo_megatron.device.facts import Facts
from gspo_megatron.device.gather import gather

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
STATUS = ROOT / "docs" / "status.md"
LEAST_S = 20.0
"""Time in which no part can start and finish."""


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if options.results:
        rewrite(options.results, options.markdown)
        return 0
    started = time.monotonic()
    facts = gather(ROOT, None, limit_s=90.0)
    if not facts.gpus and not options.rehearse:
        print("gpu-hour: torch sees no GPU; `python -m gspo_megatron.doctor` says why. --rehearse needs none.")
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * options.minutes
    parts, failed = chosen(options.parts), 0
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.name}: {part.about}", flush=True)
        result = skipped(part, facts, deadline, options) or run(part, deadline, options)
        keep(options.output / f"{part.name}.json", about(part, result, facts, options))
        failed += result["state"] == "failed"
        shown = ", ".join(f"{key} {value}" for key, value in result["values"].items() if key != "worst_gradients")
        print(f"    {result['state']} in {result['seconds']:.0f} s: {result['reason'] or shown}", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s in all; results in {options.output}")
    if options.rehearse:
        return min(failed, 1)
    rewrite(options.output, options.markdown)
    said = missed(results_in(options.output))
    print("\n".join(said) or "every target of what was measured is met")
    return 1 if failed or said else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_hour", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(BY_NAME), metavar="PART", help=", ".join(BY_NAME))
    parser.add_argument("--minutes", type=float, default=28.0, help="for everything together (default: 28)")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: does the code run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--markdown", type=Path, default=STATUS, help="the page whose table is written")
    parser.add_argument("--from", dest="results", type=Path, help="run nothing; write the table of these results")
    options = parser.parse_args(argv)
    if options.rehearse and options.output == RESULTS:
        parser.error("--rehearse needs --output: a rehearsal is no result of a GPU")
    return options


def skipped(part: Part, facts: Facts, deadline: float, options: argparse.Namespace) -> dict[str, Any] | None:
    """Why a part cannot run here, as its result; None where it can."""
    state, reason = "skipped", None
    if deadline - time.monotonic() < LEAST_S:
        state, reason = "cut", f"the {options.minutes:g} minutes were over"
    elif options.rehearse:
        reason = None
    elif len(facts.gpus) < part.gpus:
        reason = f"needs {part.gpus} GPUs, here is {len(facts.gpus)}: NCCL takes one process for each GPU"
    elif (part.needs_te or part.fp8 != "none") and not facts.transformer_engine.works:
        reason = f"Transformer Engine: {facts.transformer_engine.error or 'not installed'}"
    elif part.fp8 != "none":
        problem = problem_of_recipe(part.fp8, facts)
        reason = problem.what if problem else None
    return {"state": state, "reason": reason, "seconds": 0.0, "values": {}} if reason else None


def run(part: Part, deadline: float, options: argparse.Namespace) -> dict[str, Any]:
    """Starts a part in a process group of its own and reads what it left."""
    started = time.monotonic()
    own_s = 60 * part.minutes
    limit_s = deadline - started if options.rehearse else min(own_s, deadline - started)
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "result", Path(folder) / "log"
        command = part.command(output, options.rehearse)
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            reason = None
            try:
                status = process.wait(limit_s)
                if status:
                    reason = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            except subprocess.TimeoutExpired:
                whose = "its own limit" if limit_s == own_s else "what was left"
                reason = f"not done after {limit_s:.0f} s, {whose}"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = log.read_text(errors="replace").strip().splitlines()
        values: dict[str, Any] = {}
        details: dict[str, Any] = {}
        if reason is None:
            try:
                values = dict(part.values(output))
            except Exception as error:  # whatever is wrong with one result, the next part runs
                reason = f"its result cannot be read: {type(error).__name__}: {error}"
            with suppress(OSError, ValueError):
                details = json.loads(output.read_text())
        if reason is not None:
            reason = f"{reason}: {lines[-1].strip()}" if lines else reason
    state = "failed" if reason else "measured"
    shown = ["RESULT" if argument == str(output) else argument for argument in command[1:]]
    result: dict[str, Any] = {"state": state, "reason": reason, "values": values}
    result |= {"seconds": time.monotonic() - started, "command": shown, "details": details}
    return result | ({"end_of_log": lines[-60:]} if reason else {})


def environment() -> dict[str, str]:
    """As for a run that is started by hand: no rank of another's, one thread, our modules first."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {k: v for k, v in os.environ.items() if k not in left_out}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"OMP_NUM_THREADS": "1", **variables, "PYTHONPATH": path}


def about(part: Part, result: dict[str, Any], facts: Facts, options: argparse.Namespace) -> dict[str, Any]:
    gpus = f"{len(facts.gpus)} x {facts.gpus[0].name}, driver {facts.driver}" if facts.gpus else "no GPU"
    return {
        "part": part.name,
        "about": part.about,
        "rehearsal": options.rehearse,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": gpus,
        "versions": versions(PACKAGES),
        **result,
    }


def keep(path: Path, result: dict[str, Any]) -> None:
    """A part that could not run leaves an earlier measurement in place."""
    if result["state"] in ("skipped", "cut") and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["state"] == "measured" and earlier["rehearsal"] == result["rehearsal"]:
            return
    path.write_text(json.dumps(result, indent=1) + "\n")


def rewrite(folder: Path, markdown: Path) -> None:
    write_between_marks(markdown, MARK, table(results_in(folder)))


if __name__ == "__main__":
    sys.exit(main())
