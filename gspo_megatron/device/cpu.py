"""Stand-ins for torch.cuda and NCCL when Megatron-Core runs on the CPU. One entry for each, with a call that needs it.

The calls are in megatron-core 0.16.1 and 0.19.2. tests/device/test_cpu.py looks each one up in the installed version
and fails when it is gone, so that the stand-in can be removed too.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device

STAND_INS: dict[str, tuple[str, str]] = {
    # name of the stand-in: (file below megatron/core, text that needs it)
    "torch.cuda.current_device": ("tensor_parallel/mappings.py", "device=torch.cuda.current_device()"),
    "torch.cuda.Stream": ("transformer/moe/token_dispatcher.py", "torch.cuda.Stream()"),
    "torch.cuda.current_stream": ("transformer/moe/token_dispatcher.py", "torch.cuda.current_stream() != "),
    "torch.cuda.stream": ("transformer/moe/token_dispatcher.py", "with torch.cuda.stream(self.cuda_dtoh_stream)"),
    "torch.cuda.synchronize": ("pipeline_parallel/p2p_communication.py", "torch.cuda.synchronize()"),
    "torch.cuda.random.get_rng_state": ("tensor_parallel/random.py", "torch.cuda.random.get_rng_state(device=device)"),
    "torch.zeros": ("pipeline_parallel/schedules.py", 'torch.zeros([], dtype=torch.int, device="cuda")'),
    "torch.tensor": ("optimizer/clip_grads.py", "torch.tensor([float(total_norm)], dtype=torch.float, device='cuda')"),
    "torch.distributed.all_gather": (
        "tensor_parallel/mappings.py",
        "torch.distributed.all_gather(output_tensor_list, input_, group=group)",
    ),
    "torch.distributed.all_gather_into_tensor": (
        "distributed/param_and_grad_buffer.py",
        "dist_all_gather_func = torch.distributed.all_gather_into_tensor",
    ),
    "torch.distributed.reduce_scatter_tensor": (
        "distributed/param_and_grad_buffer.py",
        "dist_reduce_scatter_func = torch.distributed.reduce_scatter_tensor",
    ),
    "torch.Tensor.cuda": ("models/common/language_module/language_module.py", "weight.data = weight.data.cuda()"),
    "torch.Tensor.type": ("optimizer/distrib_optimizer.py", "model_param.type() == 'torch.cuda.FloatTensor'"),
}


class _Stream:
    """A stream without a device: all work is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


_THE_STREAM = _Stream()


def install() -> None:
    """Installs the stand-ins, once. Compiled functions run eagerly: compilation costs more than tiny models gain."""
    if getattr(torch.cuda.current_device, "stands_in", False):
        return
    _hide_packages_for_gpus()
    here = torch.device("cpu")
    _stand_in(torch.cuda, "current_device", lambda: here)
    _stand_in(torch.cuda, "Stream", _Stream)
    _stand_in(torch.cuda, "current_stream", lambda device=None: _THE_STREAM)
    _stand_in(torch.cuda, "stream", lambda stream: nullcontext())
    _stand_in(torch.cuda, "synchronize", lambda device=None: None)
    # The forward draws no random numbers (no dropout), so activation recompute has no device state to save.
    _stand_in(torch.cuda.random, "get_rng_state", lambda device=None: torch.empty(0, dtype=torch.uint8))
    # torch lists once, by identity, the functions that `with torch.device(...)` affects. The list must hold torch's
    # own: with a stand-in in it, tensors that a library creates under the meta device would be real, and what it loads
    # into them would be lost (transformers' from_pretrained: rotary frequencies of uninitialised memory).
    _device._device_constructors()
    for factory in ("zeros", "tensor"):
        _stand_in(torch, factory, _placed_here(getattr(torch, factory)))
    _stand_in(dist, "all_gather", _of_any_lengths(dist.all_gather))
    for collective in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        _stand_in(dist, collective, _copied_here_when_alone(getattr(dist, collective)))
    _stand_in(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
    torch.compiler.set_stance("force_eager")


def _hide_packages_for_gpus() -> None:
    """Makes Megatron-Core go without Transformer Engine and Apex, whose kernels for the router, the gradient norm and
    Adam it would use wherever it can import them: in a container for GPUs, every run on the CPU would fail. A package
    that was imported before stays."""
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _stand_in(owner: Any, name: str, replacement: Any) -> None:
    replacement.stands_in = True
    setattr(owner, name, replacement)


def _placed_here(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def place(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return place


def _of_any_lengths(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """all_gather for tensors whose first dimensions differ between ranks, which NCCL accepts and gloo rejects: padded
    to the longest. Equal shapes go to torch's own."""

    @functools.wraps(all_gather)
    def gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, *args, **kwargs)
        longest = max(part.size(0) for part in tensor_list)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.size(0)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        work = all_gather(gathered, padded, *args, **kwargs)
        assert work is None, "an asynchronous gather would not be complete yet"
        for part, rows in zip(tensor_list, gathered, strict=True):
            part.copy_(rows[: part.size(0)])
        return None

    return gather


def _copied_here_when_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A gather or a reduction of large tensors in a group of one is a copy, made in the calling thread.

    gloo would copy in a thread of its own, with a second set of OpenMP threads. With more of these than cores they no
    longer spin while waiting for work: on two threads a step of a small model took about twice as long.
    """
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        group, async_op = given.arguments["group"], given.arguments["async_op"]
        if dist.get_world_size(group) > 1:
            return collective(*args, **kwargs)
        output, input_ = given.args[:2]
        if output.data_ptr() != input_.data_ptr():
            output.copy_(input_.detach().reshape(output.shape))
        # Callers wait on a handle, and torch coalesces several calls into one: both need a collective.
        return dist.all_reduce(output.new_zeros(1), group=group, async_op=async_op)

    return call


@contextmanager
def tensors_named_as_on_device() -> Iterator[None]:
    """Inside, `tensor.type()` returns the name of the device type that Megatron's optimizers look for.

    float64 is named float32: the optimizers have no float64 branch, and the one for float32 does not cast.
    """
    own = torch.Tensor.type

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return own(tensor, *args, **kwargs)
        return own(tensor).replace("torch.", "torch.cuda.").replace("DoubleTensor", "FloatTensor")

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = own  # type: ignore[method-assign]


def resident_gib() -> float:
    """Resident set of this process in GiB (Linux counts it in pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def peak_resident_gib() -> float:
    """Largest resident set of this process so far, or since `restart_peak_resident`, in GiB (Linux counts it in
    KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def restart_peak_resident() -> None:
    """Memory that was freed but is still held by the C library is returned first: it would hide later growth. A process
    that was started from a larger one keeps that one's peak; a forked one does not."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
