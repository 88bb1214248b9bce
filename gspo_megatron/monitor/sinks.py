"""Where metrics are drawn, besides metrics.jsonl: a class for each in SINKS."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.sections import Config

Say = Callable[[str], None]


class Sink(Protocol):
    """Draws the numbers of each step."""

    package: ClassVar[str]
    """What it needs to be installed."""

    @staticmethod
    def wanted(config: Config) -> bool:
        """Whether the settings ask for it."""

    def __init__(self, config: Config, *, first_step: int, fresh: bool, warn: Say) -> None:
        """Opens it for a run that begins at `first_step`. `fresh`: the run does not continue an earlier one of its
        directory."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step by the names of docs/metrics.md's last column."""

    def close(self) -> None:
        """Writes what is left. Called once, however the run ends."""


class TensorBoard(Sink):
    """Event files in RUN/tensorboard. Those of `first_step` and later, from a run that got further, are not shown."""

    package = "tensorboard"

    @staticmethod
    def wanted(config: Config) -> bool:
        return config.logging.tensorboard

    def __init__(self, config: Config, *, first_step: int, fresh: bool, warn: Say) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second, which a run without it saves

        self._writer = SummaryWriter(str(Path(config.run.dir) / "tensorboard"), purge_step=first_step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Sink):
    """A run of the service wandb, in the project that logging.wandb names. Its files are in RUN/wandb.

    Training never waits for the service for long and never fails by it: without a network or an account the run is
    kept on disk (wandb's offline mode), for `wandb sync`. A run that continues has the id of the one it continues."""

    package = "wandb"
    INIT_S, FINISH_S = 30, 60
    """How long the start and the end of a run may wait for the service."""
    ID = "wandb_id"
    """The file in the run directory that has the run's id."""

    @staticmethod
    def wanted(config: Config) -> bool:
        return config.logging.wandb is not None

    def __init__(self, config: Config, *, first_step: int, fresh: bool, warn: Say) -> None:
        import wandb  # an extra

        run_dir = Path(config.run.dir)
        file = run_dir / self.ID
        if fresh or not file.exists():
            file.write_text(f"{uuid.uuid4().hex[:8]}\n")
        about: dict[str, Any] = {
            "project": config.logging.wandb,
            "id": file.read_text().strip(),
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": asdict(config),
            "settings": wandb.Settings(
                # It would put itself between the run and its terminal, and print lines of its own.
                console="off",
                silent=True,
                init_timeout=self.INIT_S,
                login_timeout=self.INIT_S,
                finish_timeout=self.FINISH_S,
                finish_timeout_raises=False,
            ),
        }
        self._warn = warn
        try:
            self._run: Any = wandb.init(resume="allow", **about)
        except wandb.Error as error:
            wandb.teardown()  # the process that it has started has the run's id
            self._run = wandb.init(mode="offline", **about)
            warn(f"wandb cannot be reached, and this run is kept in {self._run.settings.sync_dir}: {error}")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._guarded(lambda run: run.log(dict(numbers), step=step))

    def close(self) -> None:
        self._guarded(lambda run: run.finish())

    def _guarded(self, act: Callable[[Any], None]) -> None:
        """The process that wandb starts may have died; metrics.jsonl has everything anyway."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            self._warn(f"wandb has failed and gets no more metrics of this run: {error}")


SINKS: tuple[type[Sink], ...] = (TensorBoard, WeightsAndBiases)


def open_sinks(config: Config, *, first_step: int, fresh: bool, warn: Say) -> list[Sink]:
    """Those that the settings ask for."""
    return [sink(config, first_step=first_step, fresh=fresh, warn=warn) for sink in SINKS if sink.wanted(config)]


def check_packages(config: Config) -> None:
    """Called on every process, before a run is opened.

    Raises:
        ConfigError: a package that a sink needs is not installed.
    """
    for sink in SINKS:
        if sink.wanted(config) and importlib.util.find_spec(sink.package) is None:
            value = getattr(config.logging, sink.package)
            raise ConfigError(
                f"logging.{sink.package}={value} needs the package {sink.package}, which is not installed: "
                f"pip install {sink.package}, or do not set logging.{sink.package}"
            )
