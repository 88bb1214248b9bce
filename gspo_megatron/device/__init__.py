"""The lane a run drives in: which device, which collective backend, which number formats. Nothing else names them.

lane = open_lane(device="auto", dtype="bf16")      # before Megatron is imported
lane.start_processes(timeout_s=600)                # torchrun's environment, or one process without it
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch

from gspo_megatron.device import cpu
from gspo_megatron.types import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Lane:
    """One process's device and formats. `dtype` is that of parameters and activations."""

    device: torch.device
    backend: str
    dtype: torch.dtype
    world_size: int
    rank: int

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def start_processes(self, timeout_s: float) -> None:
        """Joins torch.distributed: through torchrun's environment, or alone when this process was started by hand."""
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            torch.distributed.init_process_group(self.backend, timeout=timeout)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(self.backend, store=store, rank=0, world_size=1, timeout=timeout)

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """Around building and stepping Megatron's optimizers, which ask tensors for the names of device types."""
        return cpu.tensors_named_as_on_device() if self.on_cpu else nullcontext()

    def peak_memory_gib(self) -> float:
        """Largest memory so far in GiB: allocated on the device, or resident in this process on the CPU."""
        return cpu.peak_resident_gib() if self.on_cpu else torch.cuda.max_memory_allocated() / 2**30

    def describe(self) -> str:
        name = "CPU" if self.on_cpu else torch.cuda.get_device_name()
        return f"{name}, {self.backend}, {str(self.dtype).removeprefix('torch.')}"


def open_lane(device: str, dtype: str) -> Lane:
    """Chooses the lane; on the CPU, puts stand-ins where Megatron-Core expects a GPU. Call before Megatron is imported.

    Raises ConfigError when `device` is "cuda" and there is none, or fp64 is asked of a GPU.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu.install()
        return Lane(torch.device("cpu"), "gloo", DTYPES[dtype], world_size, rank)
    if not torch.cuda.is_available():
        raise ConfigError("precision.device=cuda but torch sees no GPU; set precision.device=cpu or auto")
    if dtype == "fp64":
        raise ConfigError("precision.dtype=fp64 runs on the CPU only; set precision.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local_rank)
    # Sequence parallel overlaps communication with matmuls only when kernels start in the order they were queued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return Lane(torch.device("cuda", local_rank), "nccl", DTYPES[dtype], world_size, rank)


def transformer_engine_available() -> bool:
    """True where Transformer Engine can be imported (it needs a GPU build of torch)."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
