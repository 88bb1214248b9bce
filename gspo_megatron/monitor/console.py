"""What a run prints: a line per step, warnings, and a small table at the end. Only the main process prints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from gspo_megatron.base.errors import plural, printable

QUIET_S = 60
"""Without a line for so long, a run says how far its sampling is."""
WIDE = 140
"""Columns of a terminal with room for ON_WIDE."""
ON_WIDE = {
    # printed as: metric
    "entropy": "entropy",
    "length": "response_length/mean",
    "gradient": "grad_norm",
    "kl": "kl/old",
}


class Console:
    """`on=False` prints nothing: for the other processes of a run, and tests."""

    def __init__(self, on: bool = True) -> None:
        self._out = RichConsole(highlight=False, emoji=False, quiet=not on, soft_wrap=True)
        self._started = time.perf_counter()
        self._last = time.monotonic()
        self._first_step: int | None = None
        self._evaluations: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []

    def print(self, table: Table) -> None:
        self._out.print(table)
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        self._out.print(escape(printable(text)))
        self._last = time.monotonic()

    def warn(self, text: str) -> None:
        self._out.print(f"[yellow]warning:[/] {escape(printable(text))}")
        self._last = time.monotonic()

    def sign_of_life(self, text: Callable[[], str]) -> None:
        """Prints `text()` if nothing was printed for QUIET_S seconds. Cheap enough to call at every token."""
        if time.monotonic() - self._last >= QUIET_S:
            self.say(text())

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """A progress bar for `total` bytes; yields the function that advances it by a number of bytes."""
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=self._out) as bar:
            task = bar.add_task(escape(what), total=total)
            yield lambda count: bar.advance(task, count)

    def warm_start(self, step: int, steps: int, loss: float) -> None:
        if step == steps or step % 50 == 0:
            self.say(f"warm start {step}/{steps}  loss {loss:.4f}")

    def step(self, row: dict[str, Any], steps: int, every: int = 1) -> None:
        """Step, reward, accuracy, clip fraction, tokens/s, remaining time; held-out accuracy where it was measured. On
        a wide terminal also the time of day, entropy, response length, gradient norm and KL. Prints every `every`-th
        step, evaluations and the last step."""
        if "eval/accuracy" in row:
            self._evaluations.append(row)
        held_out = f"  held-out accuracy {row['eval/accuracy']:.1%}" if "eval/accuracy" in row else ""
        of_sets = (key.split("/") for key in row if key.startswith("eval/"))
        held_out += "".join(f", {k[1]} {row['/'.join(k)]:.1%}" for k in of_sets if k[2:] == ["accuracy"])
        if row["step"] == 0:
            self.say(f"step 0/{steps}{held_out}")
            return
        self._steps.append(row)
        if self._first_step is None:
            self._first_step, self._started = row["step"] - 1, time.perf_counter() - row["time/step_s"]
        if row["step"] % every and "eval/accuracy" not in row and row["step"] != steps:
            return
        assert self._first_step is not None
        done = row["step"] - self._first_step
        wide = self._out.width >= WIDE
        clock = f"{time.strftime('%H:%M:%S')}  " if wide else ""
        more = "".join(f"  {name} {_number(row.get(key))}" for name, key in ON_WIDE.items()) if wide else ""
        left = (time.perf_counter() - self._started) / done * (steps - row["step"])
        self.say(
            f"{clock}step {row['step']}/{steps}  reward {row['reward/mean']:.3f}  accuracy {row['accuracy']:.1%}  "
            f"clip {_percent(row['clip_fraction'])}  {row['tokens_per_second']:,.0f} tokens/s  {_duration(left)} "
            f"left{more}{held_out}"
        )

    def summary(self) -> None:
        """A table of the first and the last steps since this process started: of a run that was continued, the rest."""
        if not self._steps:
            return
        table = Table(title=f"Steps {self._steps[0]['step']} to {self._steps[-1]['step']}", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        tenth = max(1, len(self._steps) // 10)
        first, last = self._steps[:tenth], self._steps[-tenth:]
        if len(self._evaluations) > 1:
            before, after = (f"{e['eval/accuracy']:.1%}" for e in (self._evaluations[0], self._evaluations[-1]))
            table.add_row("held-out accuracy (greedy)", before, after)
        steps = plural(tenth, "step")
        table.add_row(f"reward (mean of {steps})", _mean(first, "reward/mean"), _mean(last, "reward/mean"))
        table.add_row("clip fraction", _mean(first, "clip_fraction"), _mean(last, "clip_fraction"))
        table.add_row("seconds per step", _mean(first, "time/step_s"), _mean(last, "time/step_s"))
        self.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    known = [row[key] for row in rows if not math.isnan(row[key])]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
