"""One engine apart from a run: settings -> a server that is started, watched and started again."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gspo_megatron.base.errors import ConfigError, EngineError, plural
from gspo_megatron.build.engine_checks import check_heads
from gspo_megatron.build.engine_servers import FOLDER, server_settings, write_config
from gspo_megatron.build.inputs import settle_model
from gspo_megatron.build.trainer import folder_files
from gspo_megatron.config.loading import replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.device import DTYPES
from gspo_megatron.device.engine_token import engine_token
from gspo_megatron.layout.refusal import fewest_processes
from gspo_megatron.rollout.engine_server import EngineServer, free_port

POLL_S = 0.2
FORGIVEN_S = 3600.0
"""A server that has answered for so long and dies, dies for the first time."""
ANY = ("0.0.0.0", "::")
"""To listen at all addresses of the machine."""


def engine_of(config: Config, host: str, port: int) -> EngineServer:
    """The server of one engine for the run of these settings, at `port` of `host`; 0: engine.port, or a free one.
    Writes the model's config.json. The settings' own addresses are where runs find engines, and play no part.

    Raises:
        ConfigError: settings that cannot work, or that one engine apart from a run would ignore.
        EngineError: it cannot listen there.
    """
    if config.rollout.engine != "vllm":
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: a run of these settings asks no engine; set rollout.engine=vllm"
        )
    if config.engine.count > 1:
        raise ConfigError(
            f"engine.count={config.engine.count}: this command starts one engine; remove it, and start the command "
            f"{config.engine.count} times"
        )
    config = replaced(config, {"engine.addresses": []})
    inputs = settle_model(config, fewest_processes(config))
    config, tokenizer = inputs.config, inputs.tokenizer
    if not config.engine.gpus:
        check_heads(config.model.shape)
    try:
        port = free_port(host, port or config.engine.port)
    except OSError as error:
        raise EngineError(
            f"cannot listen at port {port or config.engine.port} of {host} ({error}); --host names an address of this "
            "machine, --port a port that nothing else has, or 0"
        ) from error
    folder = Path(config.run.dir) / FOLDER / f"{host}_{port}"
    files = folder_files(config.model.shape, tokenizer, config.data.tokenizer, config.model.hf)
    settings = replace(server_settings(config, folder / "model").on(tuple(config.engine.gpus)), host=host)
    write_config(settings.folder, files, DTYPES[config.precision.dtype])
    return EngineServer("the engine", settings, folder / "engine.log", port, token=engine_token())


def keep_up(server: EngineServer, most_starts: int, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Starts the server, and starts it again when it dies, until `stop` says so; then ends it.

    Raises:
        EngineError: it does not start, or has died more often than `most_starts`.
    """
    deaths, ready = 0, time.monotonic()
    try:
        while not stop():
            try:
                say(f"vLLM starts; its log is {server.log}")
                server.start()
                server.wait(stop)
                if not stop():
                    ready = time.monotonic()
                    say(f"ready: engine.addresses=[{reached_at(server)}]")
                why = _death_of(server, stop)
            except EngineError as error:
                if not deaths:
                    raise
                why = str(error)
            if why:
                deaths = 1 if time.monotonic() - ready > FORGIVEN_S else deaths + 1
                if deaths > most_starts:
                    raise EngineError(
                        f"{why}, after {plural(deaths, 'start')} (engine.most_starts={most_starts}); {server.log} ends "
                        f"with:\n{server.last_lines()}"
                    )
                say(f"{why}; it is started again")
    finally:
        server.end()


def reached_at(server: EngineServer) -> str:
    """Its address as runs on other machines write it."""
    host = socket.gethostname() if server.settings.host in ANY else server.settings.host
    return replace(server.address, host=host).url


def _death_of(server: EngineServer, stop: Callable[[], bool]) -> str:
    """What the server died of; empty if it is to end."""
    while not stop():
        if (status := server.status()) is not None:
            return f"{server.name} ended with status {status}"
        time.sleep(POLL_S)
    return ""
