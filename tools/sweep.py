"""A sweep: rows of settings x seeds, each a run of its own, and what is known of each run.

    title: GSPO and GRPO clip
    about: What is asked, in a sentence or two.
    base: ../cpu_tiny_moe.yaml           # a settings file, relative to this one
    settings: [train.steps=40]           # overrides for all runs
    rows:                                # what is compared: a name, and overrides
      gspo: [algorithm.variant=gspo]
      grpo: [algorithm.variant=grpo]
    seeds: [1, 2, 3]

`program` names another module that trains, with its own arguments: [gspo_megatron.testing.noisy_sampler, --bf16, --].

`points`, which may be left out, repeats every row under further overrides, which win over the row's:

    axis: updates per rollout batch
    points: {"1": [algorithm.updates_per_rollout=1], "4": [algorithm.updates_per_rollout=4]}
    rows:
      gspo: [algorithm.variant=gspo]
      replay: {settings: [algorithm.routing_replay=R2], points: ["4"]}         # only at these points
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean
from gspo_megatron.base.files import written_aside
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import SETTINGS, load_config, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.run.stop import STOPPED_BY_GUARD

KEYS = ("title", "about", "program", "base", "settings", "rows", "points", "axis", "seeds")
TRAIN = ("gspo_megatron.train",)
OWN = ("run.dir", "run.seed", "checkpoint.load")
"""Settings that the sweep gives each run."""
MAY_CHANGE = ("run.dir", "checkpoint.", "logging.")
"""Beginnings of the settings that do not decide what a run computes."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
"""Of a row or point: it names a folder."""
OUTCOME, MADE_BY, LOG = "outcome.json", "sweep.yaml", "console.log"
"""In the directory of a run: how it ended, the settings that it was started with, and what it printed."""
MADE_WITH = "# program: "
NOT_RUN = "not run"
"""The state of a run that has no directory."""


@dataclass(frozen=True)
class Run:
    """One process of `program`, and the directory that it writes."""

    seed: int
    directory: Path
    base: Path
    overrides: tuple[str, ...]
    program: tuple[str, ...] = TRAIN
    """A module that takes the arguments of `gspo_megatron.train`, after some of its own."""

    @property
    def arguments(self) -> list[str]:
        """Of `python -m`."""
        place = (f"run.dir={self.directory}", f"run.seed={self.seed}")
        return [*self.program, "--config", str(self.base), *self.overrides, *place]

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", *self.arguments])

    def config(self) -> Config:
        return load_config(self.base, [*self.overrides, f"run.dir={self.directory}", f"run.seed={self.seed}"])

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, by step. A line that a killed process left unfinished is not counted."""
        path, rows = self.directory / "metrics.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return sorted(rows, key=lambda row: row["step"])

    def outcome(self) -> dict[str, Any]:
        """`status`, `seconds` of all attempts, and `said`, the last lines where the status is not 0. Empty until an
        attempt has ended."""
        try:
            found = json.loads((self.directory / OUTCOME).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def state(self) -> str:
        status = self.outcome().get("status")
        if status is None:
            return "unfinished" if self.directory.exists() else NOT_RUN
        known = {0: "finished", STOPPED_BY_GUARD: "stopped by a guard", 1: "failed", 2: "failed"}
        return known.get(status, "finished" if self._said_results else "unfinished")

    @property
    def _said_results(self) -> bool:
        """Whether the run came to its end, after which a signal may still have taken its exit status."""
        log = self.directory / LOG
        said = log.read_text(errors="replace") if log.is_file() else ""
        return any(line.startswith(f"results are in {self.directory}:") for line in said.splitlines())

    @property
    def has_result(self) -> bool:
        """Whether it needs no further attempt. What a guard stopped is a result."""
        return self.state in ("finished", "stopped by a guard")

    def begin(self) -> None:
        """Makes the directory and notes the settings."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with written_aside(self.directory / MADE_BY) as file:
            file.write(f"{MADE_WITH}{shlex.join(self.program)}\n{to_yaml(self.config())}")

    def end(self, status: int, seconds: float, said: str) -> None:
        seconds += self.outcome().get("seconds", 0.0)
        with written_aside(self.directory / OUTCOME) as file:
            json.dump({"status": status, "seconds": round(seconds, 1), "said": said}, file)

    def check_settings(self) -> None:
        """
        Raises:
            ConfigError: what is in the directory was made with other settings.
        """
        made_by = self.directory / MADE_BY
        if not made_by.is_file():
            return
        text = made_by.read_text()
        first = text.partition("\n")[0]
        program = first.removeprefix(MADE_WITH) if first.startswith(MADE_WITH) else shlex.join(TRAIN)
        if program != shlex.join(self.program):
            raise ConfigError(
                f"{self.directory} was made by {program}, and the sweep has {shlex.join(self.program)}; name another "
                "folder with --runs, or remove this one"
            )
        before, now = (OmegaConf.create(each) for each in (text, to_yaml(self.config())))
        for key in SETTINGS:
            old, new = OmegaConf.select(before, key, default=...), OmegaConf.select(now, key)
            if not key.startswith(MAY_CHANGE) and old is not ... and old != new:
                raise ConfigError(
                    f"{self.directory} was made with {key}={old}, and the sweep has {key}={new}; name another folder "
                    "with --runs, or remove this one"
                )


@dataclass(frozen=True)
class Curve:
    """A row at a point: its runs differ in the seed only."""

    row: str
    point: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return f"{self.row}/{self.point}" if self.point else self.row

    @property
    def has_begun(self) -> bool:
        """Whether one of its runs has."""
        return any(run.state != NOT_RUN for run in self.runs)


@dataclass(frozen=True)
class Sweep:
    """What a file asks for."""

    file: Path
    title: str
    about: str
    axis: str
    curves: tuple[Curve, ...]

    @property
    def points(self) -> list[str]:
        return list(dict.fromkeys(curve.point for curve in self.curves))

    @property
    def runs(self) -> Iterator[Run]:
        """The first seed of every curve, then the second: what is there when the time is up can be compared."""
        most = max((len(curve.runs) for curve in self.curves), default=0)
        for i in range(most):
            yield from (curve.runs[i] for curve in self.curves if i < len(curve.runs))

    @property
    def has_begun(self) -> bool:
        return any(curve.has_begun for curve in self.curves)

    def selected(self, rows: Sequence[str] = (), num_seeds: int | None = None) -> Sweep:
        """
        Args:
            rows: the curves that are wanted, as ROW or ROW/POINT; none: all.
            num_seeds: of the seeds, this many, from the first; None: all.

        Raises:
            ConfigError: there is no such row, or there are fewer seeds.
        """
        for name in rows:
            if not any(name in (curve.row, curve.name) for curve in self.curves):
                known = [curve.name for curve in self.curves]
                raise ConfigError(f"the sweep has no row {name!r}{did_you_mean(name, known)} Rows: {', '.join(known)}")
        seeds = [run.seed for run in self.curves[0].runs]
        if num_seeds is not None and num_seeds > len(seeds):
            raise ConfigError(
                f"--seeds {num_seeds} asks for the first {num_seeds} seeds, and {self.file} has {len(seeds)}: "
                f"{', '.join(map(str, seeds))}; give a number up to {len(seeds)}, or add seeds to the file"
            )
        wanted = [curve for curve in self.curves if not rows or curve.row in rows or curve.name in rows]
        return replace(self, curves=tuple(replace(curve, runs=curve.runs[:num_seeds]) for curve in wanted))


def load_sweep(file: Path, folder: Path | None = None) -> Sweep:
    """The sweep of a YAML file, every run's settings checked as `gspo_megatron.train` checks them.

    Args:
        folder: the directory of the runs; by default runs/NAME for NAME.yaml.

    Raises:
        ConfigError: what in the file cannot work, by row.
        DataError: a tokenizer or prompts that a row cannot use.
    """
    content = _read(file)
    folder = folder or Path("runs") / file.stem
    base = Path(os.path.normpath(file.parent / str(content["base"])))
    program = content.get("program", list(TRAIN))
    if not isinstance(program, list) or not all(isinstance(item, str) for item in program) or not program:
        raise ConfigError(f"{file}: program must be a list, a module and its arguments, got {program!r}")
    common = _overrides(content.get("settings", []), f"{file}: settings")
    points = {str(name): _overrides(value, f"{file}: points.{name}") for name, value in content["points"].items()}
    curves = []
    for name, value in content["rows"].items():
        place = f"{file}: rows.{name}"
        asked = value if isinstance(value, dict) else {"settings": value}
        if unknown := [key for key in asked if key not in ("settings", "points")]:
            raise ConfigError(
                f"{place} has the key {unknown[0]!r}; a row is a list of overrides, or settings and points"
            )
        for point in [str(point) for point in asked.get("points", points)]:
            if point not in points:
                raise ConfigError(f"{place} names the point {point!r}, and points has {', '.join(points)}")
            overrides = (*common, *_overrides(asked.get("settings", []), place), *points[point])
            directory = folder / str(name) / point if point else folder / str(name)
            runs = tuple(
                Run(seed, directory / f"seed_{seed}", base, overrides, tuple(program)) for seed in content["seeds"]
            )
            curves.append(Curve(str(name), point, runs))
    for curve in curves:
        _check(curve, file)
    about = " ".join(str(content.get("about", "")).split())
    return Sweep(file, str(content.get("title", file.stem)), about, str(content.get("axis", "")), tuple(curves))


def _read(file: Path) -> dict[str, Any]:
    """The file with every key in its form; `points` has one without a name where the file has none."""
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; expected the YAML file of a sweep, such as those in examples/sweeps")
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the YAML parser's own, of many kinds
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold keys: {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{file} has the key {key!r}{did_you_mean(str(key), KEYS)} Keys: {', '.join(KEYS)}")
    content.setdefault("points", {"": []})
    for key in ("base", "rows", "seeds"):
        if not content.get(key):
            raise ConfigError(f"{file} has no {key}; a sweep needs base, rows and seeds")
    for key in ("rows", "points"):
        if not isinstance(content[key], dict):
            raise ConfigError(f"{file}: {key} must be names with lists of overrides, got {content[key]!r}")
        for name in content[key]:
            if not NAME.fullmatch(str(name)) and content[key] != {"": []}:
                raise ConfigError(f"{file}: {key} has the name {name!r}, which is to name a folder: use {NAME.pattern}")
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{file}: seeds must be a list of different numbers from 0, got {seeds!r}")
    return {str(key): value for key, value in content.items()}


def _overrides(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{place} must be a list of overrides, [section.key=value, ...], got {value!r}")
    for item in value:
        if item.partition("=")[0] in OWN:
            raise ConfigError(f"{place} sets {item}, which the sweep sets for each run; leave it out")
    return tuple(value)


def _check(curve: Curve, file: Path) -> None:
    try:
        settle(curve.runs[0].config(), world_size=1)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{file}: row {curve.name}: {error}") from error
    for run in curve.runs:
        run.check_settings()
