"""How the processes of a run meet, and what to say when they do not: which rank, which address, what to try."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from gspo_megatron.base.errors import StartError

HINTS = (
    (
        r"duplicate gpu|both on cuda device",
        "two processes use one GPU: start one process per GPU with torchrun, which sets LOCAL_RANK",
    ),
    (r"does not resolve", "set MASTER_ADDR to a name or address of the first node that every node can look up"),
    (r"eaddrinuse|address already in use", "another program listens there: choose another port (--master_port)"),
    (
        r"clients joined",
        "the other processes did not come: every node must start torchrun with the same --nnodes, --nproc_per_node and "
        "--master_addr; raise parallel.timeout_s if they only come late",
    ),
    (
        r"ping failed|invalid value returned from server",
        "another program answers there: choose another port (--master_port)",
    ),
    (
        r"timed out.*connect|failed to connect|connection refused|no route to host|econnrefused",
        "rank 0 does not answer there: is it started, is the address that of its node, does a firewall close the port?",
    ),
    (
        r"insufficient driver|driver version",
        "NCCL needs a newer driver: install the driver that the CUDA version of torch asks for",
    ),
    (r"out of memory", "another process holds the GPU's memory: `nvidia-smi` lists it"),
    (
        r"unhandled system error|socket|ibv_|net/|remote error|connection closed|connection reset|connectfullmesh",
        "the ranks meet, but their network does not work: name the interface with NCCL_SOCKET_IFNAME (gloo: "
        "GLOO_SOCKET_IFNAME), and see with NCCL_DEBUG=INFO what NCCL tries",
    ),
)
"""(what the message contains, what to try), the first that matches."""
OTHERWISE = "NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=DETAIL print more"


def start(backend: str, device: torch.device, *, attempt: int, timeout_s: float) -> None:
    """Joins torch.distributed: through torchrun's environment, or alone when this process was started by hand. One sum
    over all ranks follows, because NCCL connects at the first one.

    Raises:
        StartError: the ranks do not find each other, two of them use one GPU, or the first sum fails.
    """
    timeout = timedelta(seconds=timeout_s)
    with explained(timeout_s):
        if "RANK" in os.environ:
            check_address(os.environ.get("MASTER_ADDR", ""))
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun's store survives a restart, with the addresses of processes that are gone.
            store = dist.PrefixStore(f"attempt_{attempt}", store)
        else:
            store, rank, world_size = dist.HashStore(), 0, 1
        if device.type != "cpu":
            claim_gpu(store, rank, str(torch.cuda.get_device_properties(device).uuid))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        assert int(total) == world_size  # reading it waits for NCCL, whose errors come late


def check_address(address: str) -> None:
    """Looks the address up at once: torch would try until its timeout.

    Raises:
        StartError: it is empty or does not resolve.
    """
    try:
        if address:
            socket.getaddrinfo(address, None)
            return
        reason = "it is not set"
    except OSError as error:
        reason = str(error)
    raise StartError(f"MASTER_ADDR={address} does not resolve ({reason})")


def claim_gpu(store: dist.Store, rank: int, gpu: str) -> None:
    """Notes in `store` that this rank uses the GPU with this id.

    Raises:
        StartError: another rank does.
    """
    owner = store.compare_set(f"gpu/{socket.gethostname()}/{gpu}", "", str(rank)).decode()
    if owner != str(rank):
        raise StartError(f"ranks {owner} and {rank} are both on CUDA device {gpu}")


@contextmanager
def explained(timeout_s: float) -> Iterator[None]:
    """Turns an error of torch.distributed inside into one line that names the rank, the address and what to try.

    Raises:
        StartError: instead of that error.
    """
    try:
        yield
    except (RuntimeError, StartError, ValueError) as error:  # gloo raises a plain RuntimeError
        text = " ".join(str(error).split()).rstrip(".")
        hint = next((hint for pattern, hint in HINTS if re.search(pattern, text, re.IGNORECASE)), OTHERWISE)
        raise StartError(f"{_who(timeout_s)}: {text}; {hint}") from error


def _who(timeout_s: float) -> str:
    if "RANK" not in os.environ:
        return f"this process, alone on {socket.gethostname()}, could not start torch.distributed"
    rank, size, local, address, port = (
        os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    )
    return (
        f"rank {rank} of {size} (LOCAL_RANK={local} on {socket.gethostname()}) could not meet the others at "
        f"{address}:{port} (MASTER_ADDR and MASTER_PORT) within parallel.timeout_s={timeout_s:g}"
    )
