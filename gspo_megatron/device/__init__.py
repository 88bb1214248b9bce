"""The device of a run: device type, collective backend and number formats. Nothing else names them.

device = open_device("auto", "bf16", fp8="blockwise")  # before Megatron and Transformer Engine are imported
device.start_processes(timeout_s=600)                # torchrun's environment, or one process without it
"""

from __future__ import annotations

import base64
import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.device import cpu, cuda, processes
from gspo_megatron.device.machine import Needs, problems
from gspo_megatron.device.own import this_process

TORCHRUN = {
    "world_size": ("WORLD_SIZE", "1"),
    "rank": ("RANK", "0"),
    "restarts": ("TORCHELASTIC_RESTART_COUNT", "0"),
    "max_restarts": ("TORCHELASTIC_MAX_RESTARTS", "0"),
    "nodes": ("GROUP_WORLD_SIZE", "1"),
}
"""What torchrun sets: fields of Device, the variable of each and its value without torchrun."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Device:
    """One process's device and formats. `dtype` is that of parameters and activations."""

    torch_device: torch.device
    backend: str
    dtype: torch.dtype
    world_size: int
    rank: int
    restarts: int = 0
    """How often torchrun has restarted this node's processes."""
    max_restarts: int = 0
    nodes: int = 1
    warnings: tuple[str, ...] = ()
    """Variables of the environment that a run would rather have otherwise."""

    @property
    def on_cpu(self) -> bool:
        return self.torch_device.type == "cpu"

    def start_processes(self, timeout_s: float) -> None:
        """Joins torch.distributed: through torchrun's environment, or alone when this process was started by hand.

        Raises:
            StartError: the processes do not find each other.
        """
        processes.start(self.backend, self.torch_device, attempt=self.restarts, timeout_s=timeout_s)

    def notes(self) -> torch.distributed.Store:
        """A store that all processes share, through a connection that nothing else waits for. Call it after
        `start_processes`."""
        if "RANK" not in os.environ:
            return torch.distributed.HashStore()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return torch.distributed.PrefixStore(f"notes_{self.restarts}", store)

    def random_state(self) -> dict[str, Any]:
        """The state of every random number generator of this process, as JSON. The package draws nothing from them;
        a user's own rewards may."""
        version, numbers, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        states = {"torch": torch.get_rng_state()} | ({} if self.on_cpu else {"device": torch.cuda.get_rng_state()})
        packed = {key: base64.b64encode(state.numpy().tobytes()).decode() for key, state in states.items()}
        return {"python": [version, list(numbers), gauss], "numpy": [name, np.asarray(keys).tolist(), *rest], **packed}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Restores what `random_state` returned."""
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        for key, put_back in (("torch", torch.set_rng_state), ("device", torch.cuda.set_rng_state)):
            if key in state and not (key == "device" and self.on_cpu):
                put_back(torch.frombuffer(bytearray(base64.b64decode(state[key])), dtype=torch.uint8))

    def optimizer_scope(self) -> AbstractContextManager[None]:
        """For building and stepping Megatron's optimizers, which look at the names of tensors' device types."""
        return cpu.tensors_named_as_on_device() if self.on_cpu else nullcontext()

    def synchronize(self) -> None:
        """Waits for all work queued on the device."""
        if not self.on_cpu:
            torch.cuda.synchronize()

    def cores_for_each(self, count: int) -> int:
        """Cores that each of `count` processes of the run, spread over its nodes, has for itself; at least 1."""
        return max(1, len(os.sched_getaffinity(0)) // -(-count // self.nodes))

    def memory_gib(self) -> float:
        """Memory in use in GiB: allocated on the device, or resident in this process on the CPU."""
        return cpu.resident_gib() if self.on_cpu else torch.cuda.memory_allocated() / 2**30

    def peak_memory_gib(self) -> float:
        """The largest `memory_gib` since the start of the process, or since `restart_peak_memory`."""
        return cpu.peak_resident_gib() if self.on_cpu else torch.cuda.max_memory_allocated() / 2**30

    def free_memory_gib(self) -> float | None:
        """Memory of the GPU that nothing uses, in GiB; None on the CPU, whose memory processes share."""
        return None if self.on_cpu else torch.cuda.mem_get_info()[0] / 2**30

    def restart_peak_memory(self) -> None:
        """Resets `peak_memory_gib`."""
        if self.on_cpu:
            cpu.restart_peak_resident()
        else:
            torch.cuda.reset_peak_memory_stats()

    @property
    def name(self) -> str:
        """As the driver has it, such as `NVIDIA H100 80GB HBM3`."""
        return "CPU" if self.on_cpu else torch.cuda.get_device_name()

    def describe(self) -> str:
        return f"{self.name}, {self.backend}, {str(self.dtype).removeprefix('torch.')}"


def open_device(device: str, dtype: str, *, fp8: str = "none", deterministic: bool = False) -> Device:
    """Chooses the device; on the CPU, puts stand-ins where Megatron-Core expects a GPU. Call before importing Megatron.

    Variables of the environment (device/cuda.py) are set before the first call to CUDA, which reads them.

    Raises:
        ConfigError: `device` is "cuda" and there is none, a GPU is to run in fp64, or the environment contradicts
            `deterministic`.
    """
    started: dict[str, Any] = {field: int(os.environ.get(*variable)) for field, variable in TORCHRUN.items()}
    if device == "auto" and not torch.backends.cuda.is_built():
        device = "cpu"
    warnings = []
    if device != "cpu":
        warnings = cuda.set_variables(cuda.variables_of(fp8, deterministic), os.environ)
    if deterministic:
        torch.use_deterministic_algorithms(True)
    if device == "cpu" or not torch.cuda.is_available():
        warnings = []  # of variables that no CPU run reads
        if device != "cpu":
            machine = this_process()
            why = next(problems(machine, Needs()))
            if device == "cuda":
                raise ConfigError(f"precision.device=cuda, but {why}")
            if machine.driver:
                warnings = [f"precision.device=auto takes the CPU, though there is an NVIDIA driver: {why}"]
        cpu.install()
        return Device(torch.device("cpu"), "gloo", DTYPES[dtype], **started, warnings=tuple(warnings))
    if dtype == "fp64":
        raise ConfigError("precision.dtype=fp64 runs on the CPU only; set precision.device=cpu")
    gpu = cuda.open_gpu(int(os.environ.get("LOCAL_RANK", 0)))
    return Device(gpu, "nccl", DTYPES[dtype], **started, warnings=tuple(warnings))
