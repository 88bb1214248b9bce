"""The run directory: metrics.jsonl, rollouts/ and guards/."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import ConfigError, plural
from gspo_megatron.config.loading import to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.catalogue import board_name
from gspo_megatron.monitor.sinks import Sink, open_sinks


class RunWriter:
    """The run directory's metrics.jsonl and rollouts/, and the sinks of its metrics. Only the main process has one."""

    @classmethod
    def of_run(
        cls, config: Config, *, first_step: int, fresh: bool, warn: Callable[[str], None] = lambda text: None
    ) -> RunWriter:
        """Opens config.run.dir and writes the resolved config.yaml into it. Rows of `first_step` and later, from a run
        that got further, are moved aside; with `fresh`, so is everything that an earlier run left."""
        run_dir = Path(config.run.dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        moved = []
        if fresh:
            # Neither its rollouts nor its newest checkpoint may be taken for this run's.
            for old in (run_dir / name for name in ("rollouts", "guards", "checkpoints", "hf")):
                if old.exists() and any(old.iterdir()):
                    moved.append(f"its {old.name}/ is now {_move_aside(old).name}/")
        writer = cls(run_dir, first_step=first_step)
        writer.moved = [*moved, *writer.moved]
        writer.sinks = open_sinks(config, first_step=first_step, fresh=fresh, warn=warn)
        return writer

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Rows of `first_step` and later are moved to metrics.replaced.jsonl."""
        self.run_dir = run_dir
        with _written(run_dir / "rollouts"):
            (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        self.moved: list[str] = []
        """What an earlier run left and where it is now, for the user."""
        with _written(self._path):
            self._move_rows_aside(first_step)
        self.sinks: Sequence[Sink] = ()

    def _move_rows_aside(self, first_step: int) -> None:
        if not self._path.exists():
            return
        kept: list[str] = []
        replaced: list[str] = []
        for row in self._path.read_text().splitlines():
            (kept if _step_of(row) < first_step else replaced).append(row + "\n")
        if replaced:
            with (self.run_dir / "metrics.replaced.jsonl").open("a") as aside:
                aside.writelines(replaced)
            self.moved.append(f"{plural(len(replaced), 'row')} of its metrics moved to metrics.replaced.jsonl")
        fresh = self._path.with_suffix(".tmp")
        with fresh.open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one row; `step` is its key. A non-finite number becomes null, as JSON has none."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with _written(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            # The checkpoint of this step will survive a power cut; so must its row.
            file.flush()
            os.fsync(file.fileno())
        numbers = {
            board_name(name): value for name, value in row.items() if name != "step" and isinstance(value, (int, float))
        }
        for sink in self.sinks:
            sink.write(row["step"], numbers)

    def rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """rollouts/step_000001.jsonl, one object per rollout."""
        write_json_lines(self.run_dir / "rollouts" / f"step_{step:06d}.jsonl", rows)

    def held_out(self, name: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """rollouts/eval_NAME_step_000001.jsonl, one object per held-out response; eval_step_... of data.eval."""
        file = f"eval_{name}_step_{step:06d}.jsonl" if name else f"eval_step_{step:06d}.jsonl"
        write_json_lines(self.run_dir / "rollouts" / file, rows)

    def offenders(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """guards/NAME.jsonl: what a guard objected to. Non-finite numbers are written as in Python, NaN or Infinity."""
        with _written(self.run_dir / "guards"):
            (self.run_dir / "guards").mkdir(exist_ok=True)
        write_json_lines(self.run_dir / "guards" / f"{name}.jsonl", rows)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """
    Raises:
        ConfigError: `path` cannot be written, or holds something else than a run writes.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be written ({error}); free some space, make it writable, or move it away; what is saved is "
            "not harmed, and the same command with checkpoint.load=latest continues"
        ) from error


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with _written(path), path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_json_line(row))


def _json_line(row: Mapping[str, Any]) -> str:
    """Readable in any language; escaped where the text cannot be UTF-8, as a reward's message may be."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def _move_aside(path: Path) -> Path:
    """Renames `path` to `NAME.replaced_1`, or the next free number: nothing is lost. Returns the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.replaced_{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def _step_of(row: str) -> float:
    """Infinity for a row cut short by a crash."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
