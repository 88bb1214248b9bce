"""Loading and writing a Hugging Face folder, compared with moving the same bytes and doing nothing else.

    python -m benchmarks.hugging_face --output benchmarks/results/hugging_face.json --markdown docs/models.md
                                                                                         (part of `make bench`)

A Qwen3-MoE folder of random bf16 weights: layers of Qwen3-30B-A3B, with their 128 experts, and a vocabulary that makes
up the rest of --gb. It is read into a bf16 model of that shape on one process, and on two that share the experts.

    load     the slices that a rank holds. Compared: for each tensor of which the rank needs anything,
             safetensors' get_tensor and a copy into memory of its size
    export   one rank writes, the others send it what they hold. Compared: that rank writes as many bytes, tensor by
             tensor, and syncs the file

The two take turns. A ratio is the median over the turns; seconds are medians of the slowest rank. The folder is in the
page cache: what is compared is the work, not the disk. Memory is the largest growth of anonymous memory in a load or an
export, of any rank, in units of the largest tensor; pages of files belong to the system, which drops them when it needs
memory. No optimizer is built, so that a small machine has room.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from benchmarks.reports import machine, median_ratio, table, versions, write_between_marks
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.export import Export, FolderFiles, Stored
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.inspection import check_folder
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.models.names import Sliceable
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.models.tensors import hub_tensors
from gspo_megatron.testing.local_ranks import run_distributed

SETTINGS = (
    *("model.preset=qwen3_30b_a3b", "model.max_sequence_length=1024"),
    *("precision.device=cpu", "precision.dtype=bf16", "data.tokenizer=characters"),
)
SMALLEST_VOCABULARY = 16_000
FILE_BYTES = 500_000_000
"""Of weights in a file of the folder, so that there are several."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the folder (default: 2)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--directory", type=Path, help="where folders are written (default: the system's temporary one)"
    )
    parser.add_argument("--markdown", type=Path, help="page whose table between the marks `hugging_face` is written")
    options = parser.parse_args(argv)
    device = open_device("cpu", "bf16")
    settings = sized(options.gb)
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        folder = Path(temporary) / "model"
        write_random(folder, load_config(None, settings).model.shape)
        rows = []
        for processes in options.processes:
            ranks = run_distributed(of_rank, processes, settings, folder, options.turns, timeout_s=1800.0)
            rows.append(summary(processes, ranks))
    found = {
        "gb": rows[0]["gb"],
        "rows": [{key: value for key, value in row.items() if key != "gb"} for row in rows],
        "machine": machine(device, 1),
        "versions": versions(("torch", "safetensors", "megatron-core")),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if options.markdown:
        write_between_marks(options.markdown, "hugging_face", markdown(found))
    return 0


def sized(gb: float) -> list[str]:
    """Settings of the model with `gb` in bf16: as many layers as fit, at least one, and the vocabulary that is left."""
    one, two = (
        count_parameters(
            load_config(None, [*SETTINGS, f"model.num_layers={n}", "model.vocab_size=1"]).model.shape
        ).total
        for n in (1, 2)
    )
    a_row = 2 * load_config(None, SETTINGS).model.hidden_size
    wanted = gb * 1e9 / 2
    layers = max(1, int((wanted - (2 * one - two) - SMALLEST_VOCABULARY * a_row) // (two - one)))
    left = wanted - (2 * one - two) - layers * (two - one)
    return [*SETTINGS, f"model.num_layers={layers}", f"model.vocab_size={max(SMALLEST_VOCABULARY, int(left / a_row))}"]


def write_random(folder: Path, shape: ModelShape) -> None:
    """A folder in bf16, of the names and sizes of the family's rules."""
    family = family_of(shape)
    generator = torch.Generator().manual_seed(1)
    tensors = hub_tensors(family.rules, shape)
    export = Export(folder, file_bytes=FILE_BYTES)
    export.begin({name: Stored(size, torch.bfloat16) for name, size in tensors.items()})
    for name, size in tensors.items():
        export.write(name, torch.randn(size, generator=generator, dtype=torch.bfloat16) * 0.02)
    export.commit(FolderFiles.of(family.hf_config(shape), (1,), 0).content(torch.bfloat16))


def of_rank(settings: list[str], folder: Path, turns: int) -> dict[str, Any]:
    """The measurements of this rank."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    config = load_config(None, [*settings, f"parallel.ep={dist.get_world_size()}"])
    device = open_device("cpu", "bf16")
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.model import build_model
    from gspo_megatron.mcore.weights import load_weights, whole_sizes, whole_weights

    groups = Groups(check_config(config, dist.get_world_size()), device.torch_device)
    compat.apply_patches(on_cpu=True)
    shape, chunks = config.model.shape, build_model(config, groups, device, use_te=False)
    rules = family_of(shape).rules
    sizes = whole_sizes(chunks, shape, groups, rules)
    written = {name: Stored(size.shape, torch.bfloat16) for name, size in sizes.items()}
    target, plain = folder.with_name("exported"), folder.with_name("plain")

    def load() -> set[str]:
        opened = HuggingFaceFolder(folder)
        check_folder(opened, shape)
        names: set[str] = set()

        def read(name: str) -> Sliceable:
            names.add(name)
            return opened.read(name)

        load_weights(chunks, shape, groups, rules, read)
        return names

    def export() -> None:
        writer = Export(target, file_bytes=FILE_BYTES)
        groups.on_main(lambda: writer.begin(written))
        for name, tensor in whole_weights(chunks, shape, groups, rules, only_to=0):
            writer.write(name, tensor)
        groups.on_main(lambda: writer.commit({}))

    def write_plain() -> None:
        if groups.is_main:
            write_bytes(plain, [stored.num_bytes for stored in written.values()])

    names = load()
    into = torch.empty(sum(written[name].num_bytes for name in names), dtype=torch.uint8)

    def copy_plain() -> None:
        copy_tensors(folder, names, into)

    copy_plain()
    seconds: dict[str, list[float]] = {"load": [], "copy": [], "export": [], "write": []}
    growth = {"load": 0, "export": 0}
    for _ in range(turns):
        for name, work in (("load", load), ("copy", copy_plain), ("export", export), ("write", write_plain)):
            with PeakMemory() as memory:
                seconds[name].append(timed(work))
            if name in growth:
                growth[name] = max(growth[name], memory.growth)
    groups.close()
    largest = max(stored.num_bytes for stored in written.values())
    total = sum(stored.num_bytes for stored in written.values())
    return {"seconds": seconds, "growth": growth, "largest": largest, "total": total}


def copy_tensors(folder: Path, names: set[str], into: torch.Tensor) -> None:
    """Reads whole tensors and copies them, one after the other, into the bytes of `into`."""
    end = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(names & set(opened.keys())):
                numbers = opened.get_tensor(name).view(-1).view(torch.uint8)
                start, end = end, end + len(numbers)
                into[start:end] = numbers
    assert end == len(into), "every tensor that the model read is in a file"


def write_bytes(path: Path, sizes: Sequence[int]) -> None:
    """A file of blocks of these sizes, synced."""
    block = memoryview(os.urandom(max(sizes)))
    with path.open("wb") as file:
        for size in sizes:
            file.write(block[:size])
        file.flush()
        os.fsync(file.fileno())


def timed(work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all are done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


class PeakMemory:
    """Growth of this process's anonymous memory inside the `with`, looked at every millisecond."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    @property
    def growth(self) -> int:
        return self.peak - self.before


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "this benchmark needs Linux"
    return int(found[1]) << 10


def summary(processes: int, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Times include a barrier at both ends, so those of one rank are those of all."""
    seconds = ranks[0]["seconds"]
    largest = ranks[0]["largest"]
    return {
        "gb": ranks[0]["total"] / 1e9,
        "processes": processes,
        "load_s": statistics.median(seconds["load"]),
        "load_to_copying": median_ratio(seconds["load"], seconds["copy"]),
        "export_s": statistics.median(seconds["export"]),
        "export_to_writing": median_ratio(seconds["export"], seconds["write"]),
        "load_memory_to_largest_tensor": max(rank["growth"]["load"] for rank in ranks) / largest,
        "export_memory_to_largest_tensor": max(rank["growth"]["export"] for rank in ranks) / largest,
        "seconds": seconds,
    }


def markdown(found: dict[str, Any]) -> str:
    head = ["processes", "load", "/ reading and copying", "memory", "export", "/ writing", "memory"]
    rows = [
        [
            str(row["processes"]),
            f"{row['load_s']:.2f} s",
            f"{row['load_to_copying']:.2f}",
            f"{row['load_memory_to_largest_tensor']:.2f}",
            f"{row['export_s']:.2f} s",
            f"{row['export_to_writing']:.2f}",
            f"{row['export_memory_to_largest_tensor']:.2f}",
        ]
        for row in found["rows"]
    ]
    about = f"{found['gb']:.2f} GB on {found['machine']}; memory in units of the largest tensor.\n\n"
    return about + table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
