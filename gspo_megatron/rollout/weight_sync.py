"""Sends the policy's weights to engines, through vLLM's routes for weight updates.

    channel = Broadcast(host="127.0.0.1")
    send_weights(["http://127.0.0.1:8000"], Weights(version, policy.weights(rules, only_to=0)), channel)

Engines are servers with the worker of vllm_worker.py. They must be paused: vLLM dies of a forward during an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.http import Address, call
from gspo_megatron.rollout.weight_channels import Channel

GET = ("/get_world_size", "/is_paused", "/weight_info")
TIMEOUT_S = 600.0
"""Of one request: an engine may have to load gigabytes for it."""


def send_weights(
    addresses: Sequence[str], weights: Weights, channel: Channel, *, timeout_s: float = TIMEOUT_S, token: str = ""
) -> None:
    """Returns when all engines have these weights, and answer with their version.

    `weights.tensors` is read to its end in any case, since other ranks iterate with it.

    Raises:
        EngineError: an engine is not paused (nothing was changed), or does not take the weights. Then none of them
            may be used until it is started again.
    """
    with Servers(addresses, timeout_s=timeout_s, token=token) as engines:
        try:
            _check_paused(engines)
            channel.connect(engines)
            engines.post("/start_weight_update")
            channel.send(engines, weights)
            engines.post("/finish_weight_update", {"weight_version": str(weights.version)})
            _check_version(engines, weights.version)
        except BaseException:
            channel.close()
            raise
        finally:
            for _ in weights.tensors:
                pass


def _check_paused(engines: Servers) -> None:
    answers = engines.post("/is_paused")
    for address, answer in zip(engines.addresses, answers, strict=True):
        if not answer.get("is_paused"):
            raise EngineError(f"engine {address} is not paused, and would die of an update; pause it first")


def _check_version(engines: Servers, version: int) -> None:
    for address, answer in zip(engines.addresses, engines.post("/weight_info"), strict=True):
        found = answer.get("weight_version")
        if found != str(version):
            raise EngineError(
                f"engine {address} says that it has weights version {found!r} after it was given version {version}; "
                "start it again"
            )


class Servers:
    """The HTTP servers of some engines, asked all at once.

    Attributes:
        addresses: `http://host:port` of each.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_s: float, token: str = "") -> None:
        self.addresses = tuple(addresses)
        self._timeout_s = timeout_s
        self._servers = [Address.of("engine", address, token) for address in self.addresses]
        self._threads = ThreadPoolExecutor(max_workers=2 * len(self.addresses), thread_name_prefix="engines")

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        # A request that hangs ends by its own time limit.
        self._threads.shutdown(wait=False)

    def post(self, route: str, *bodies: dict[str, Any]) -> list[Any]:
        """See `Engines`. The routes in GET are asked by that method."""
        return self.begin(route, *bodies).result()

    def begin(self, route: str, *bodies: dict[str, Any]) -> Future[list[Any]]:
        method = "GET" if route in GET else "POST"
        each = bodies if len(bodies) > 1 else (bodies or ({},)) * len(self.addresses)
        asked = [
            self._threads.submit(call, server, method, route, body, timeout_s=self._timeout_s)
            for server, body in zip(self._servers, each, strict=True)
        ]
        return _Together(asked)


class _Together(Future[list[Any]]):
    """The answers of several; the first error at once, since the others may wait for what failed."""

    def __init__(self, parts: Sequence[Future[Any]]) -> None:
        super().__init__()
        self._parts = parts
        for part in parts:
            part.add_done_callback(self._one_is_done)

    def _one_is_done(self, part: Future[Any]) -> None:
        with self._condition:
            if self.done():
                return
            error = part.exception()
            if error is None and not all(each.done() for each in self._parts):
                return
        # Two that end at once both come to this point.
        with suppress(InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result([each.result() for each in self._parts])
