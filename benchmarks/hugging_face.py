"""How long a Hugging Face folder takes in and out, and how much memory beyond the model's own.

    python -m benchmarks.hugging_face --output benchmarks/results/hugging_face.json

A random Qwen3-MoE model of 128 experts in bf16, of about --gib, on one process and on two that share the experts.
Beside each time is that of the plain way: loading, to read the bytes with `safetensors` and copy them; exporting, to
write as many bytes and sync them. Extra memory is the peak of anonymous memory while loading or exporting, less what
the model holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed

if TYPE_CHECKING:
    from gspo_megatron.mcore.policy import MegatronModel

SIZES = (
    "hidden_size=1024",
    "num_attention_heads=16",
    "num_query_groups=4",
    "head_dim=64",
    "num_experts=128",
    "experts_per_token=8",
    "expert_ffn_size=512",
    "vocab_size=32000",
    "max_sequence_length=64",
)
POLL_S = 0.002


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the folder (default: 2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where folders go (default: the system's temporary one)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        folder = Path(temporary) / "model"
        [about] = run_distributed(write_model, 1, folder, options.gib)
        rows = []
        for world_size in (1, 2):
            arguments = (world_size, folder, Path(temporary) / f"out{world_size}", options.repeats)
            per_rank = run_distributed(measure, world_size, *arguments)
            rows.append({"processes": world_size, **{key: max(r[key] for r in per_rank) for key in per_rank[0]}})
            print(json.dumps(rows[-1]))
    machine = {"cpus": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    result = {"machine": machine, **about, "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def write_model(folder: Path, gib: float) -> dict[str, Any]:
    """Random weights, in as many layers as come closest to the size."""
    from gspo_megatron.mcore.hugging_face import save_folder

    def settings(num_layers: int) -> list[str]:
        return [f"model.{each}" for each in (*SIZES, f"num_layers={num_layers}")]

    def distance(num_layers: int) -> float:
        return abs(count_parameters(load_config(None, settings(num_layers)).model.shape).total * 2 - gib * (1 << 30))

    model = open_model(1, *settings(min(range(1, 60), key=distance)))
    shape, rules = model.config.model.shape, family_of(model.config.model.shape).rules
    content = FolderFiles.of(family_of(shape).hf_config(shape), (1,), 0).content(torch.bfloat16)
    save_folder(model, folder, torch.bfloat16, content)
    largest = max(torch.Size(size.shape).numel() for size in model.weight_sizes(rules).values())
    return {"parameters": count_parameters(shape).total, "largest_tensor_mib": largest * 2 / (1 << 20)}


def open_model(world_size: int, *settings: str) -> MegatronModel:
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronModel

    config = load_config(None, ["precision.device=cpu", "precision.dtype=bf16", *settings])
    device = open_device("cpu", "bf16")
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronModel(config, groups, device, False, Algorithm.of(config).scoring)


def measure(world_size: int, folder: Path, out: Path, repeats: int) -> dict[str, float]:
    """The best of `repeats` on this rank, ours and the plain way by turns."""
    from gspo_megatron.mcore.hugging_face import load_folder, save_folder

    model = open_model(world_size, f"model.hf={folder}", f"parallel.ep={world_size}")
    groups, content = model.groups, FolderFiles.like(folder).content(torch.bfloat16)
    share = list(model.weight_sizes(family_of(model.config.model.shape).rules))[groups.dp_rank :: world_size]
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        with extra_memory() as extra:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        found[f"{name}_s"] = min(found.get(f"{name}_s", seconds), seconds)
        found[f"{name}_extra_mib"] = max(found.get(f"{name}_extra_mib", 0.0), extra[0])

    for _ in range(repeats):
        timed("load_plain", lambda: read_and_copy(folder, share))
        timed("load", lambda: load_folder(model, folder))
        timed("export_plain", lambda: groups.on_main(lambda: write_plain(folder, out.with_suffix(".plain"))))
        timed("export", lambda: save_folder(model, out, torch.bfloat16, content))
    found["load_ratio"] = found["load_s"] / found["load_plain_s"]
    found["export_ratio"] = found["export_s"] / found["export_plain_s"]
    return found


def read_and_copy(folder: Path, names: Sequence[str]) -> None:
    """Each tensor read by the library and copied to memory that is there already."""
    room = torch.empty(0, dtype=torch.bfloat16)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in names:
            tensor = file.get_tensor(name)
            if room.numel() < tensor.numel():
                room = torch.empty(tensor.numel(), dtype=tensor.dtype)
            room[: tensor.numel()].view_as(tensor).copy_(tensor)


def write_plain(folder: Path, out: Path) -> None:
    """As many bytes as the folder's weights, from memory, and waits until they are on the disk."""
    block = memoryview(bytes(16 << 20))
    left = (folder / "model.safetensors").stat().st_size
    with out.open("wb") as file:
        while left:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())
    out.unlink()


@contextmanager
def extra_memory() -> Iterator[list[float]]:
    """[MiB]: by how much this process's anonymous memory rises at most."""
    extra, done = [0.0], threading.Event()
    before = anonymous_mib()

    def watch() -> None:
        while not done.wait(POLL_S):
            extra[0] = max(extra[0], anonymous_mib() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield extra
    finally:
        done.set()
        thread.join()


def anonymous_mib() -> float:
    fields: dict[str, Any] = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
