"""A process group of its own, for processes that share no default group: a trainer and the workers of its engines."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KEY, READY = "private_group", "ready"
POLL_S = 0.0005


class PrivateGroup:
    """Rank 0 sends, all others receive. The default process group, if there is one, is not touched.

    The first process calls `listen`, tells the others its address, and calls `open` once they are on their way; each of
    them calls `join`. gloo moves host memory, NCCL a GPU's.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, host: str, device: torch.device, timeout_s: float):
        """`host`: the address of this machine that the others reach."""
        self.size, self._sent = size, 0
        self._store = store  # it listens as long as it is referred to
        kind: Any = dist.ProcessGroupGloo if device.type == "cpu" else dist.ProcessGroupNCCL
        options = kind._Options() if device.type == "cpu" else kind.Options()
        options._timeout = timedelta(seconds=timeout_s)
        if device.type == "cpu":
            # By default gloo listens at the address of this machine's name, which may be one that no other machine
            # reaches, or one of another network.
            options._devices = [kind.create_device(hostname=host)]
        self._group = kind(dist.PrefixStore(KEY, store), rank, size, options)

    @classmethod
    def listen(cls, host: str, timeout_s: float) -> dist.TCPStore:
        """A store that others reach at `host` only, and at its attribute `port`.

        Raises:
            OSError: `host` is no address of this machine.
        """
        listener = socket.create_server((host, 0), family=family_of(host))
        port = listener.getsockname()[1]
        timeout = timedelta(seconds=timeout_s)
        # The store closes the descriptor.
        return dist.TCPStore(
            host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    @classmethod
    def open(
        cls,
        store: dist.TCPStore,
        size: int,
        device: torch.device,
        *,
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> PrivateGroup:
        """The group of rank 0. `check` is called while the others are waited for, and may raise.

        Raises:
            TimeoutError: they do not come.
        """
        deadline = time.monotonic() + timeout_s
        while not store.check([_arrived(rank) for rank in range(1, size)]):
            check()
            if time.monotonic() > deadline:
                missing = [rank for rank in range(1, size) if not store.check([_arrived(rank)])]
                raise TimeoutError(f"ranks {missing} of {size} did not come within {timeout_s:g} s")
            time.sleep(POLL_S)
        return cls(store, 0, size, store.host, device, timeout_s)

    @classmethod
    def join(
        cls, host: str, port: int, rank: int, size: int, device: torch.device, *, timeout_s: float
    ) -> PrivateGroup:
        store = dist.TCPStore(host, port, None, False, timedelta(seconds=timeout_s))
        store.set(_arrived(rank), "")
        return cls(store, rank, size, own_address(host), device, timeout_s)

    def send(self, tensor: Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Rank 0: to all others, once they all wait for it; nothing can end a broadcast that one of them never joins.
        `check` is called meanwhile, and may raise."""
        self._sent += self.size - 1
        while self._store.add(READY, 0) < self._sent:
            check()
            time.sleep(POLL_S)
        self._broadcast(tensor)

    def receive(self, tensor: Tensor) -> None:
        """The others: fills in what rank 0 sends."""
        self._store.add(READY, 1)
        self._broadcast(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Closes connections: another rank that waits for this one gets an error. Call it once."""
        for end in (self._group.abort, self._group.shutdown):
            with suppress(RuntimeError):
                end()
        del self._group, self._store


def _arrived(rank: int) -> str:
    return f"{KEY}/arrived/{rank}"


def family_of(host: str) -> socket.AddressFamily:
    """
    Raises:
        OSError: the name is unknown.
    """
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def own_address(towards: str) -> str:
    """The address of this machine from which it reaches `towards`, a name or an address.

    Raises:
        OSError: the name is unknown, or no network leads there.
    """
    family, kind, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # which sends nothing
        address: str = probe.getsockname()[0]
        return address


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine's, and reaches no other."""
    try:
        found = {place[0] for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return all(ipaddress.ip_address(each).is_loopback for each in found)
