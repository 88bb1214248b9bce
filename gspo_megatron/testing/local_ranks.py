"""Runs a function on several processes of this machine, as ranks of one gloo group, or as torchrun would start them.

def worker(scale):                      # at module level: the processes find it by its name
    x = scale * torch.ones(1)
    torch.distributed.all_reduce(x)
    return x

first, second = run_distributed(worker, 2, 3.0)

The processes are forked from one that has everything imported: a fork takes milliseconds and shares its memory, so 64
ranks fit where 64 interpreters would not. With `fresh` each is an interpreter of its own, as ranks on GPUs have to be:
a library that was imported before the fork may have read its variables, or started CUDA.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.testing.time_limits import time_factor

# A server process imports torch once, and every rank is forked from it in milliseconds. A fork of the test process
# itself would be as quick, but could inherit a lock that one of its threads holds; the server never computes.
_context = multiprocessing.get_context("forkserver")
_fresh = multiprocessing.get_context("spawn")


class RankError(RuntimeError):
    """A rank raised (its traceback is in the message), died, or did not finish in time."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    like_torchrun: bool = False,
    fresh: bool = False,
) -> list[Any]:
    """fn(*args) on each of `world_size` ranks; returns what the ranks returned, in rank order.

    The default process group exists when fn starts; with `like_torchrun` only the environment variables do, for fn to
    make it. A collective that waits longer than `timeout_s` raises in its rank; a rank that is stuck elsewhere is
    killed soon after. Both limits are for a quiet machine, and time_factor() multiplies them. No process outlives the
    call. fn, its arguments and its results are pickled.
    """
    # What the ranks would import one by one: assert_close and dispatch modes load the two torch modules at their first
    # use, the tests in hand have loaded the rest. The server reads the list when it starts, at the first call.
    context = _fresh if fresh else _context
    in_hand = [name for name in sys.modules if name.startswith(("gspo_megatron", "megatron.core"))]
    _context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", *in_hand])
    with tempfile.TemporaryDirectory() as folder:
        store = None if like_torchrun else Path(folder, "store")
        processes, readers, port = [], [], _free_port()
        # As bytes: multiprocessing would open a file for each of their tensors, and a few hundred are too many.
        packed = pickle.dumps(args)
        collective_s = timeout_s * time_factor()
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
                environment = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                process = context.Process(target=_run_rank, args=(fn, packed, environment, store, collective_s, writer))
                process.start()
                writer.close()
                processes.append(process)
                readers.append(reader)
            results = _collect(readers, timeout_s + 10)
            for process in processes:
                # Left to itself a rank ends what it started, such as the helper process of Megatron's checkpoint
                # writer.
                process.join(10 * time_factor())
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _free_port() -> int:
    """Below those that the system hands out (from 32768 on Linux): another process may get one of them meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _run_rank(
    fn: Callable[..., Any],
    packed: bytes,
    environment: dict[str, Any],
    store: Path | None,
    timeout_s: float,
    out: Connection,
) -> None:
    torch.set_num_threads(1)
    try:
        if store is None:
            os.environ.update({name: str(value) for name, value in environment.items()})
        else:
            rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
            place = {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
            dist.init_process_group("gloo", **place, timeout=timedelta(seconds=timeout_s))
        report = (True, fn(*pickle.loads(packed)))
        if dist.is_initialized():
            # Nobody leaves while another rank still reads from its sockets.
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        report = (False, traceback.format_exc())
    out.send_bytes(pickle.dumps(report))


def _collect(readers: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    started, limit_s = time.monotonic(), 0.0
    while len(results) < len(readers):
        missing = [rank for rank in range(len(readers)) if rank not in results]
        ready: list[Any] = []
        while not ready:
            limit_s = max(limit_s, timeout_s * time_factor())
            left_s = started + limit_s - time.monotonic()
            if left_s < 0:
                raise RankError(f"ranks {missing} of {len(readers)} did not finish within {limit_s:.0f} s")
            ready = wait([readers[rank] for rank in missing], left_s)
        errors = []
        for rank in (rank for rank in missing if readers[rank] in ready):
            try:
                succeeded, results[rank] = pickle.loads(readers[rank].recv_bytes())
            except EOFError:
                succeeded, results[rank] = False, "the process died without a word (killed, or out of memory?)"
            if not succeeded:
                errors.append(f"rank {rank} of {len(readers)}: {results[rank]}")
        if errors:
            raise RankError("\n".join(errors))
    return [results[rank] for rank in range(len(readers))]
