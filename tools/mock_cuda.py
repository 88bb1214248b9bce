"""A CUDA device that has a name and a number and no memory: what the construction of a model asks torch.cuda for.

Needs a CUDA build of torch, whose operators for fake CUDA tensors exist without a GPU. `install` comes before any
import of Transformer Engine or Megatron-Core, which ask when they are imported.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

from gspo_megatron.base.errors import ConfigError

DEVICE = torch.device("cuda", 0)
HOPPER = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    name="NVIDIA H100 80GB HBM3, mocked",
)


class Stream:
    """A stream or an event: all work is already done."""

    cuda_stream, device = 0, DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


THE_STREAM = Stream()
RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)

REPLACEMENTS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_lazy_call": lambda callable, **kwargs: None,
    "device_count": lambda: 8,
    "current_device": lambda: DEVICE,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (HOPPER.major, HOPPER.minor),
    "get_device_properties": lambda device=None: HOPPER,
    "get_device_name": lambda device=None: HOPPER.name,
    "mem_get_info": lambda device=None: (HOPPER.total_memory, HOPPER.total_memory),
    "synchronize": lambda device=None: None,
    "Stream": Stream,
    "Event": Stream,
    "current_stream": lambda device=None: THE_STREAM,
    "default_stream": lambda device=None: THE_STREAM,
    "stream": lambda stream: nullcontext(),
    "is_current_stream_capturing": lambda: False,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device="cuda": RANDOM_STATE,
    "set_rng_state": lambda state, device="cuda": None,
}


def install() -> None:
    """Puts the mocks into torch.cuda, for the rest of the process.

    Raises:
        ConfigError: torch is a build for CPUs.
    """
    if torch.version.cuda is None:
        raise ConfigError(f"torch {torch.__version__} is a build for CPUs; make venv-cuda installs one for CUDA")
    torch._C._ensureCUDADeviceGuardSet()
    for name, replacement in REPLACEMENTS.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, REPLACEMENTS[name])
    # Fake tensors would initialise the device, to learn its index and to have a context for indexing.
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda mode: True)  # type: ignore[assignment, method-assign]
    setattr(fake_tensor, "init_gpu_context", lambda device=None: None)  # noqa: B010  (missing in older versions)
