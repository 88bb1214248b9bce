"""The engines behind a pool: servers of the run, or those of engine.addresses; and the way of weights to them."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from gspo_megatron.base.errors import EngineError
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.config.sections import Config
from gspo_megatron.device import DTYPES, Device
from gspo_megatron.device.engine_token import engine_token
from gspo_megatron.device.private_group import is_loopback, own_address
from gspo_megatron.rollout.engine_draws import DRAWS, EngineDraw
from gspo_megatron.rollout.engine_server import HOST, EngineServer, ServerSettings
from gspo_megatron.rollout.external_engine import ExternalEngine
from gspo_megatron.rollout.http import Address
from gspo_megatron.rollout.weight_channels import Broadcast, Channel, Disk, SharedMemory

FOLDER = "engine"
"""In run.dir: the model's config.json for the engines, their logs, and weights on their way by disk."""


class Server(Protocol):
    """What is behind an engine of the pool."""

    @property
    def address(self) -> Address:
        """Where it listens, after `start`."""

    def start(self) -> None:
        """Starts it, or starts it again, where that is the run's to do. Raises EngineError."""

    def wait(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Returns when it can be used, or when `stop` says so. Raises EngineError."""

    def end(self) -> None:
        """Ends it, where that is the run's to do."""


def servers_of(config: Config, files: FolderFiles, device: Device, say: Callable[[str], None]) -> dict[str, Server]:
    """By their names."""
    e = config.engine
    if not e.addresses:
        return {f"engine {i}": _own(i, config, files) for i in range(e.count)}
    assert config.model.vocab_size is not None, "settle sets model.vocab_size"
    kind, token = channel_name(config, on_cpu=device.on_cpu), engine_token()
    found: dict[str, Server] = {}
    for i, url in enumerate(e.addresses):
        found[f"engine {i}"] = ExternalEngine(
            Address.of(f"engine {i}", str(url), token),
            max_length=config.model.max_sequence_length,
            vocab_size=config.model.vocab_size,
            model=files.content(DTYPES[config.precision.dtype])["config.json"],
            draw=e.draw,
            same_device=device.torch_device.type if kind == "broadcast" else "",
            start_timeout_s=e.start_timeout_s,
            run=f"{config.run.dir} on {socket.gethostname()}",
            say=say,
        )
    return found


def _own(number: int, config: Config, files: FolderFiles) -> EngineServer:
    e, folder = config.engine, Path(config.run.dir) / FOLDER
    settings = server_settings(config, folder / "model")
    write_config(settings.folder, files, DTYPES[config.precision.dtype])
    gpus = tuple(e.gpus[number * e.tensor_parallel : (number + 1) * e.tensor_parallel])
    log, port = folder / f"engine_{number}.log", e.port and e.port + number
    return EngineServer(f"engine {number}", settings.on(gpus), log, port)


def server_settings(config: Config, folder: Path) -> ServerSettings:
    """What each engine of the run is started with, but for its GPUs."""
    e = config.engine
    return ServerSettings(
        python=e.python or sys.executable,
        folder=folder,
        dtype=str(DTYPES[config.precision.dtype]).removeprefix("torch."),
        max_length=config.model.max_sequence_length,
        max_batch=config.rollout.max_batch,
        tensor_parallel=e.tensor_parallel,
        draw=DRAWS[e.draw].arguments,
        cache_gib=e.cache_gib,
        threads=e.threads,
        arguments=tuple(map(str, e.arguments)),
        start_timeout_s=e.start_timeout_s,
    )


def draw_of(inputs: Inputs) -> EngineDraw:
    """How the engines draw."""
    vocab_size = inputs.config.model.vocab_size
    assert vocab_size is not None, "settle sets model.vocab_size"
    return DRAWS[inputs.config.engine.draw](inputs.tokenizer.vocab_size, vocab_size)


def write_config(folder: Path, files: FolderFiles, dtype: torch.dtype) -> None:
    """config.json, from which an engine builds the model. Its weights come later, and it needs no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.content(dtype).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def channel_name(config: Config, *, on_cpu: bool) -> str:
    """engine.channel, with what `auto` stands for."""
    e = config.engine
    if e.channel != "auto":
        return e.channel
    here = all(is_loopback(Address.of("engine", str(url)).host) for url in e.addresses)
    return "shared_memory" if here and on_cpu else "broadcast"


def channel_of(config: Config, device: Device, say: Callable[[str], None]) -> Channel:
    """How the run sends weights to its engines.

    Raises:
        EngineError: no network leads to an engine.
    """
    directory = Path(config.run.dir)
    kind = channel_name(config, on_cpu=device.on_cpu)
    if kind == "shared_memory":
        return SharedMemory(job=re.sub(r"[^\w-]", "_", directory.name), say=say)
    if kind == "disk":
        return Disk(directory / FOLDER / "weights")
    hosts = [Address.of("engine", str(url)).host for url in config.engine.addresses] or [HOST]
    # All workers come to one address: one that those of other machines reach.
    towards = next((host for host in hosts if not is_loopback(host)), hosts[0])
    try:
        return Broadcast(own_address(towards), device.torch_device, timeout_s=config.engine.timeout_s)
    except OSError as error:
        raise EngineError(
            f"no network leads from this machine to the engine at {towards} ({error}); correct engine.addresses"
        ) from error
