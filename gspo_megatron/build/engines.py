"""The engines of a run as one source of rollouts: from their start, or the first look at them, to the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError, EngineError, StopRequested
from gspo_megatron.build.engine_checks import check_heads
from gspo_megatron.build.engine_servers import FOLDER, channel_of, draw_of, servers_of
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.parts import packer_of
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.data.responses import Response
from gspo_megatron.device import Device
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.console import Console
from gspo_megatron.rollout.buffered import BufferedSource
from gspo_megatron.rollout.engine import Engine, Weights
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.native.stopping import stops_of
from gspo_megatron.rollout.probe import FP32_RESOLUTION, Probe
from gspo_megatron.rollout.served import ServedSource
from gspo_megatron.rollout.vllm import VllmEngine
from gspo_megatron.rollout.weight_channels import Channel
from gspo_megatron.rollout.weight_sync import send_weights
from gspo_megatron.run.scoring import Scorer

STREAM_INTERVAL = 16
"""Tokens of an event: one for every token takes the server of a small model more time than the tokens."""
PROBE_LIMIT = {"fp32": 1e-4, "bf16": 0.5}
PROBE_RESOLUTION = {"fp32": FP32_RESOLUTION, "bf16": 2.0**-8}
"""In bf16 half a unit in the last place of a logit."""


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
        self.servers = servers_of(config, files, device, say)
        self.pool: EnginePool | None = None
        self._say, self._timeout_s, self._most_starts = say, e.timeout_s, e.most_starts
        self._most_in_flight = config.rollout.max_batch
        self._starts, self._closed = threading.Lock(), False
        self._running_already = bool(e.addresses)
        self._open_channel = partial(channel_of, config, device, say)
        self._channel: Channel | None = None
        self._engine = partial(
            VllmEngine,
            draw=draw_of(inputs),
            temperature=config.rollout.temperature,
            timeout_s=e.timeout_s,
            # Weights that change under way need the version of every token.
            stream_interval=1 if config.rollout.max_lag else STREAM_INTERVAL,
            # A group may be larger, and would leave the probe no room.
            most_streams=config.rollout.max_batch,
        )

    def start(self, stop: Callable[[], bool]) -> None:
        """Starts all servers; they become ready meanwhile. Those that run already are looked at now, before anything is
        trained.

        Raises:
            StopRequested: `stop` says so.
            EngineError: a port is in use, or an engine of engine.addresses cannot be used.
        """
        for server in self.servers.values():
            server.start()
        if self._running_already:
            self._wait(stop)
        self._channel = self._open_channel()

    def _wait(self, stop: Callable[[], bool]) -> None:
        for server in self.servers.values():
            server.wait(stop)
            if stop():
                raise StopRequested

    def ready(self, wrong: Callable[[Engine], str], stop: Callable[[], bool]) -> EnginePool:
        """The pool, once all servers answer. `wrong`: what is wrong with an engine's log-probs, if anything.

        Raises:
            StopRequested: `stop` says so.
            EngineError: one does not start.
        """
        self._wait(stop)
        self.pool = EnginePool(
            [self._engine(server.address) for server in self.servers.values()],
            probe=wrong,
            start=self._start_again,
            send=self._send,
            most_starts=self._most_starts,
            most_in_flight=self._most_in_flight,
            returns="it is waited for" if self._running_already else "it is started again",
            say=self._say,
        )
        return self.pool

    def _start_again(self, engine: Any) -> None:
        server = self.servers[engine.name]
        with self._starts:
            if self._closed:
                raise EngineError(f"{engine.name} is not started again: the run ends")
            server.start()
        server.wait(lambda: self._closed)
        engine.address = server.address

    def _send(self, engines: Seq[Any], weights: Weights) -> None:
        addresses = [engine.address for engine in engines]
        if addresses:
            urls, token = [address.url for address in addresses], addresses[0].token
            assert self._channel is not None, "start() was called"
            send_weights(urls, weights, self._channel, timeout_s=self._timeout_s, token=token)

    def close(self) -> None:
        """Ends all servers."""
        if self.pool:
            # First: it would start them again.
            self.pool.close()
        with self._starts:
            self._closed = True
        if self._channel:
            self._channel.close()
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: server.end(), self.servers.values()))


def probe_of(inputs: Inputs) -> Probe:
    """What engines score after every change of weights."""
    config = inputs.config
    limit = config.engine.probe_limit or PROBE_LIMIT[config.precision.dtype]
    return Probe.of_vocabulary(
        inputs.tokenizer.vocab_size,
        config.model.max_sequence_length,
        limit=limit,
        resolution=PROBE_RESOLUTION[config.precision.dtype],
    )


def scores_of(inputs: Inputs, policy: Any, ranks: Any, console: Console) -> Callable[[Seq[int], int], Seq[float]]:
    """The trainer's log-probs of a sequence from a position on. All ranks call it together."""
    scorer = Scorer(policy, ranks, packer_of(inputs, ranks), console)
    return lambda tokens, begin: scorer.log_probs([Response("the probe", {}, list(tokens), begin)])[0]


@contextmanager
def open_engines(
    inputs: Inputs,
    policy: Any,
    ranks: Any,
    files: FolderFiles,
    device: Device,
    console: Console,
    stop: Callable[[], bool],
) -> Iterator[Callable[..., ServedSource]]:
    """What makes the source of rollouts from the arguments that every source has. Engines start meanwhile, and end with
    the context. Collective.

    Raises:
        ConfigError: engines on a CPU beside a run on GPUs, or the other way round.
        EngineError: one cannot be started.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    if not config.engine.addresses and device.on_cpu == bool(config.engine.gpus):
        raise ConfigError(
            f"engine.gpus={config.engine.gpus} with a run on {device.describe()}: "
            + ("remove it" if device.on_cpu else "name GPUs of the first node that no process of the run uses")
        )
    if device.on_cpu and not config.engine.addresses:
        check_heads(config.model.shape)
    if ranks.is_main and not config.engine.addresses:
        console.say(f"vLLM starts; its logs are in {Path(config.run.dir) / FOLDER}")
    engines = VllmEngines(inputs, files, device, console.warn) if ranks.is_main else None
    rules, r = family_of(config.model.shape).rules, config.rollout
    try:
        ranks.from_main(lambda stopped: engines.start(stopped.is_set) if engines else None, stop)
        yield partial(
            partial(BufferedSource, max_lag=r.max_lag, warn=console.warn) if r.max_lag else ServedSource,
            policy=policy,
            open_pool=engines.ready if engines else None,
            weights=partial(policy.weights, rules, only_to=0),
            probe=probe_of(inputs),
            score=scores_of(inputs, policy, ranks, console),
            as_in_training=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, config.run.seed),
            stop_ids=stops_of(r.stop, tokenizer).ids,
            stop=stop,
            sign_of_life=console.sign_of_life,
        )
    finally:
        if engines:
            engines.close()
