"""The best evaluation so far by a metric: which checkpoint is kept, and when a run has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gspo_megatron.config.sections import Config


class Record(NamedTuple):
    """The largest value of a metric. `since`: evaluations after it, none of them better."""

    value: float
    step: int
    since: int = 0


class Records:
    """The records of the metrics that checkpoint.keep_best and eval.patience watch. They are part of the run's state:
    a run that continues keeps and stops where it would have without a pause."""

    def __init__(self, config: Config, saved: Mapping[str, Record]) -> None:
        self._kept = config.checkpoint.keep_best
        self._patience, self._watched = config.eval.patience, config.eval.stop_metric
        names = (self._kept, self._watched if self._patience else None)
        self._names = [name for name in dict.fromkeys(names) if name]
        self.held = {name: record for name, record in saved.items() if name in self._names}

    def note(self, row: Mapping[str, Any]) -> bool:
        """An evaluation is done; returns whether it is the best by checkpoint.keep_best. Equal is not better."""
        step = row["step"]
        for name in self._names:
            value, best = row[name], self.held.get(name)
            better = math.isfinite(value) and (best is None or value > best.value)
            if better:
                self.held[name] = Record(value, step)
            elif best is not None:
                self.held[name] = best._replace(since=best.since + 1)
        return self._kept is not None and self.best_step == step

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is kept."""
        best = self.held.get(self._kept or "")
        return None if best is None else best.step

    def stopped(self) -> str:
        """Why the run ends before its last step; empty where it goes on."""
        best = self.held.get(self._watched)
        if not self._patience or best is None or best.since < self._patience:
            return ""
        return (
            f"{self._watched} was {best.value:.6g} after step {best.step} and has not risen in {best.since} "
            f"evaluations since (eval.patience={self._patience}); a larger eval.patience continues the run"
        )
