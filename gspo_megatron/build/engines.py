"""The engines of a run: started on the machine of the main process, watched, and ended with it."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError, EngineError, StopRequested
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.parts import packer_of
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.config.sections import Config
from gspo_megatron.data.responses import Response
from gspo_megatron.device import DTYPES, Device
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.console import Console
from gspo_megatron.rollout.buffered import BufferedSource
from gspo_megatron.rollout.engine import Engine, Weights
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.engine_server import HOST, EngineServer, ServerSettings
from gspo_megatron.rollout.native.stopping import stops_of
from gspo_megatron.rollout.probe import FP32_RESOLUTION, Probe
from gspo_megatron.rollout.served import ServedSource
from gspo_megatron.rollout.vllm import VllmEngine
from gspo_megatron.rollout.weight_channels import Broadcast, Channel, SharedMemory
from gspo_megatron.rollout.weight_sync import send_weights
from gspo_megatron.run.scoring import Scorer

STREAM_INTERVAL = 16
"""Tokens of an event: one for every token takes the server of a small model more time than the tokens."""
PROBE_LIMIT = {"fp32": 1e-4, "bf16": 0.5}
PROBE_RESOLUTION = {"fp32": FP32_RESOLUTION, "bf16": 2.0**-8}
"""In bf16 half a unit in the last place of a logit."""
FOLDER = "engine"
"""In run.dir: the model's config.json for the engines, and their logs."""


class VllmEngines:
    """On the main process: the servers of a run, and the pool over them."""

    def __init__(
        self,
        inputs: Inputs,
        files: FolderFiles,
        device: Device,
        say: Callable[[str], None],
    ) -> None:
        config, e = inputs.config, inputs.config.engine
        self.folder = Path(config.run.dir) / FOLDER
        settings = server_settings(config, self.folder / "model")
        write_config(settings.folder, files, DTYPES[config.precision.dtype])
        self.servers = {f"engine {i}": self._server(i, config, settings) for i in range(e.count)}
        self.pool: EnginePool | None = None
        self._say, self._timeout_s, self._most_starts = say, e.timeout_s, e.most_starts
        self._most_in_flight = config.rollout.max_batch
        self._starts, self._closed = threading.Lock(), False
        self._channel: Channel = (
            SharedMemory(job=re.sub(r"[^\w-]", "_", Path(config.run.dir).name), say=say)
            if device.on_cpu
            else Broadcast(HOST, device.torch_device, timeout_s=e.timeout_s)
        )
        self._engine = partial(
            VllmEngine,
            num_ids=inputs.tokenizer.vocab_size,
            temperature=config.rollout.temperature,
            timeout_s=e.timeout_s,
            # Weights that change under way need the version of every token.
            stream_interval=1 if config.rollout.max_lag else STREAM_INTERVAL,
            # A group may be larger, and would leave the probe no room.
            most_streams=config.rollout.max_batch,
        )

    def _server(self, number: int, config: Config, settings: ServerSettings) -> EngineServer:
        e = config.engine
        gpus = tuple(e.gpus[number * e.tensor_parallel : (number + 1) * e.tensor_parallel])
        log, port = self.folder / f"engine_{number}.log", e.port and e.port + number
        return EngineServer(f"engine {number}", settings.on(gpus), log, port)

    def start(self) -> None:
        """Starts all servers; they become ready meanwhile.

        Raises:
            EngineError: a port is in use.
        """
        for server in self.servers.values():
            server.start()

    def ready(self, wrong: Callable[[Engine], str], stop: Callable[[], bool]) -> EnginePool:
        """The pool, once all servers answer. `wrong`: what is wrong with an engine's log-probs, if anything.

        Raises:
            StopRequested: `stop` says so.
            EngineError: one does not start.
        """
        for server in self.servers.values():
            server.wait(stop)
            if stop():
                raise StopRequested
        self.pool = EnginePool(
            [self._engine(server.address) for server in self.servers.values()],
            probe=wrong,
            start=self._start_again,
            send=self._send,
            most_starts=self._most_starts,
            most_in_flight=self._most_in_flight,
            say=self._say,
        )
        return self.pool

    def _start_again(self, engine: Any) -> None:
        server = self.servers[engine.name]
        with self._starts:
            if self._closed:
                raise EngineError(f"{engine.name} is not started again: the run ends")
            server.start()
        # Nobody waits for this thread; `close` ends the server, and with it the waiting.
        server.wait()
        engine.address = server.address

    def _send(self, engines: Seq[Any], weights: Weights) -> None:
        addresses = [engine.address for engine in engines]
        if addresses:
            urls, token = [address.url for address in addresses], addresses[0].token
            send_weights(urls, weights, self._channel, timeout_s=self._timeout_s, token=token)

    def close(self) -> None:
        """Ends all servers."""
        if self.pool:
            # First: it would start them again.
            self.pool.close()
        with self._starts:
            self._closed = True
        self._channel.close()
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: server.end(), self.servers.values()))


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
        cache_gib=e.cache_gib,
        threads=e.threads,
        arguments=tuple(map(str, e.arguments)),
        start_timeout_s=e.start_timeout_s,
    )


def write_config(folder: Path, files: FolderFiles, dtype: torch.dtype) -> None:
    """config.json, from which an engine builds the model. Its weights come later, and it needs no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.content(dtype).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def open_engines(
    inputs: Inputs,
    policy: Any,
    ranks: Any,
    files: FolderFiles,
    device: Device,
    console: Console,
    stop: Callable[[], bool],
) -> Iterator[Callable[..., ServedSource] | None]:
    """What makes the source of rollouts from the arguments that every source has; None: the model under training
    samples. Engines start meanwhile, and end with the context. Collective.

    Raises:
        ConfigError: engines on a CPU beside a run on GPUs, or the other way round.
        EngineError: one cannot be started.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    if config.rollout.engine == "collective":
        yield None
        return
    if device.on_cpu == bool(config.engine.gpus):
        raise ConfigError(
            f"engine.gpus={config.engine.gpus} with a run on {device.describe()}: "
            + ("remove it" if device.on_cpu else "name GPUs of the first node that no process of the run uses")
        )
    limit = config.engine.probe_limit or PROBE_LIMIT[config.precision.dtype]
    scorer = Scorer(policy, ranks, packer_of(inputs, ranks), console)
    engines = VllmEngines(inputs, files, device, console.warn) if ranks.is_main else None
    rules, r = family_of(config.model.shape).rules, config.rollout
    try:
        ranks.from_main(lambda stopped: engines.start() if engines else None, lambda: False)
        yield partial(
            partial(BufferedSource, max_lag=r.max_lag, warn=console.warn) if r.max_lag else ServedSource,
            policy=policy,
            open_pool=engines.ready if engines else None,
            weights=partial(policy.weights, rules, only_to=0),
            probe=Probe.of_vocabulary(
                tokenizer.vocab_size,
                config.model.max_sequence_length,
                limit=limit,
                resolution=PROBE_RESOLUTION[config.precision.dtype],
            ),
            score=lambda tokens, begin: scorer.log_probs([Response("the probe", {}, list(tokens), begin)])[0],
            as_in_training=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, config.run.seed),
            stop_ids=stops_of(r.stop, tokenizer).ids,
            stop=stop,
            sign_of_life=console.sign_of_life,
        )
    finally:
        if engines:
            engines.close()
