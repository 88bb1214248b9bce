"""Compares settings by runs: rows x seeds of a sweep, each run a process; curves with confidence bands, on one page.

    python tools/compare_algorithms.py examples/sweeps/figure2.yaml                        # runs/figure2/report.html
    python tools/compare_algorithms.py examples/sweeps/updates.yaml --rows gspo/4 grpo/4 --seeds 3 --jobs 1
    python tools/compare_algorithms.py examples/sweeps/figure2.yaml --report-only

tools/sweep.py says what a sweep is. A run that has finished is not repeated, and one that was cut off goes on from its
newest checkpoint, so the same command continues after Ctrl-C. A run that a guard stopped is a result. --rows and
--seeds choose what is run; the report has every row that has runs. Exit status: 0 every run has a result; 1 some
failed, see their console.log; 2 the sweep cannot work; 75 stopped, start again to continue.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sweep import LOG, Run, Sweep, load_sweep
from sweep_page import markdown, page, picture
from sweep_results import results

import gspo_megatron
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.base.files import written_aside
from gspo_megatron.run.stop import FAILED, REFUSED, STOPPED

LAST_LINES = 12
POLL_S = 0.1


class Asked:
    """How many signals have asked this process to stop."""

    def __init__(self) -> None:
        self.times = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        if self.times == 1:
            print("stopping: the runs save and end; once more kills them", file=sys.stderr, flush=True)


@contextmanager
def counted_signals() -> Iterator[Asked]:
    asked = Asked()
    before = {number: signal.signal(number, asked.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(runs: Sequence[Run], jobs: int) -> bool:
    """Runs those without a result, `jobs` at a time; whether it came to the end of them. The first signal is handed on
    to the runs, which save; the second kills them."""
    waiting = deque(run for run in runs if not run.has_result)
    active: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    told = 0
    print(f"{len(runs)} runs, {len(waiting)} of them to do", flush=True)
    try:
        with counted_signals() as asked:
            while active or (waiting and not asked.times):
                while waiting and len(active) < jobs and not asked.times:
                    run = waiting.popleft()
                    active[run] = (start(run), time.monotonic())
                if told < asked.times:
                    told = asked.times
                    for process, _ in active.values():
                        process.send_signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
                for run, (process, since) in list(active.items()):
                    if (status := process.poll()) is not None:
                        del active[run]
                        finish(run, status, time.monotonic() - since)
                time.sleep(POLL_S)
        return not asked.times
    finally:
        for process, _ in active.values():  # where a directory could not be written
            process.terminate()


def start(run: Run) -> subprocess.Popen[bytes]:
    """The run's process. It stays in this process group, so that closing the terminal ends it, too."""
    run.begin()
    places = [str(Path(gspo_megatron.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-W", "ignore", "-m", *run.arguments, "checkpoint.load=latest"]
    with (run.directory / LOG).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def finish(run: Run, status: int, seconds: float) -> None:
    lines = (run.directory / LOG).read_text(errors="replace").rstrip().splitlines()
    said = "\n".join(lines[-LAST_LINES:]) if status else ""
    run.end(status, seconds, said)
    print(f"{run.directory}: {run.state} after {seconds:.0f} s (status {status})", flush=True)
    if run.state == "failed":
        print(said, file=sys.stderr, flush=True)


def write_report(sweep: Sweep, folder: Path, command: str) -> dict[str, Any]:
    """Writes report.json and report.html, and returns what is in them."""
    found = results(sweep, command)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(found, indent=1) + "\n"), ("report.html", page(found))):
        with written_aside(folder / name) as file:
            file.write(text)
    print(f"{folder / 'report.html'}, {folder / 'report.json'}")
    return found


def write_into(document: Path, name: str, found: dict[str, Any]) -> None:
    """The table of numbers between the marks `name` of a Markdown page, and the curves into images/ beside it."""
    start, end = between_marks(document, name)
    text = document.read_text()
    document.write_text(text[:start] + markdown(found) + text[end:])
    (document.parent / "images").mkdir(exist_ok=True)
    (document.parent / "images" / f"{name}.svg").write_text(picture(found))


def between_marks(document: Path, name: str) -> tuple[int, int]:
    """Where the text between the marks begins and ends.

    Raises:
        ConfigError: there is no such page, or it does not have the marks.
    """
    marks = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not (document.is_file() and (found := marks.search(document.read_text()))):
        raise ConfigError(
            f"--document {document} is to have the lines '<!-- {name} -->' and '<!-- end of {name} -->', between which "
            "the table goes; add them, or name another page"
        )
    return found.span()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--runs", type=Path, help="folder of the runs and the report (default: runs/NAME of NAME.yaml)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW[/POINT]", help="run only these curves")
    parser.add_argument("--seeds", type=int, help="run only the first N seeds", metavar="N")
    parser.add_argument("--report-only", action="store_true", help="report what is there, and start nothing")
    parser.add_argument(
        "--document", type=Path, help="Markdown page whose table, and picture, of the sweep is replaced"
    )
    options = parser.parse_args(argv)
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        parser.error("--jobs and --seeds must be 1 or more")
    folder = options.runs or Path("runs") / options.sweep.stem
    try:
        sweep = load_sweep(options.sweep, folder)
        runs = list(sweep.selected(options.rows, options.seeds).runs)
        if options.report_only and not sweep.has_begun:
            raise ConfigError(f"{folder} has no run to report; start the sweep without --report-only")
        if options.document:
            between_marks(options.document, options.sweep.stem)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    to_the_end = options.report_only or run_all(runs, options.jobs)
    if sweep.has_begun:
        place = ["--runs", str(folder)] if options.runs else []
        command = shlex.join(["python", "tools/compare_algorithms.py", str(options.sweep), *place])
        found = write_report(sweep, folder, command)
        if options.document:
            write_into(options.document, options.sweep.stem, found)
    states = {run.state for run in runs} if not options.report_only else set()
    if "failed" in states:
        return FAILED
    return 0 if to_the_end and "unfinished" not in states else STOPPED


if __name__ == "__main__":
    sys.exit(main())
