"""Does the Triton kernel compile with this Triton, and is it right on this machine's device?

    python -m gspo_megatron.log_probs.try_kernels BACKEND ARCHITECTURE      prints JSON

Where torch sees a device, log-probs and gradients of the Triton kernels are compared with those of the torch kernels.
Elsewhere the kernel is compiled for the architecture named, such as 90 for Hopper, and not run.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from gspo_megatron.log_probs.backends import TESTED_TRITON

ROWS, HIDDEN, VOCABULARY = 130, 512, 5000


class _Compiled:
    """In the place of a kernel: compiles what would be launched, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def compile_only(backend: str, architecture: int) -> None:
    """Compiles the fused forward in bf16 as a run would, for a device that need not exist."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernels: Any = importlib.import_module("gspo_megatron.log_probs.triton_kernels")
    nowhere: Any = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget(backend, architecture, 32),
    )
    triton.runtime.driver.set_active(nowhere)
    kernels._linear_statistics = _Compiled(kernels._linear_statistics)
    hidden_nH, weight_vH = (torch.empty(n, HIDDEN, dtype=torch.bfloat16) for n in (ROWS, VOCABULARY))
    kernels.linear_statistics(hidden_nH, weight_vH, torch.zeros(ROWS).long(), 1.0, with_entropy=False)


def compare(device: torch.device) -> float:
    """The largest difference between the Triton and the torch kernels: of log-probs, absolute; of gradients, relative
    to the largest."""
    from gspo_megatron.log_probs import linear_log_probs

    torch.manual_seed(0)
    hidden_NH = torch.randn(ROWS, HIDDEN, device=device).bfloat16()
    weight_VH = (torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5).bfloat16()
    targets_N = torch.randint(VOCABULARY, (ROWS,))
    found = []
    for backend in ("torch", "triton"):
        hidden, weight = (x.clone().requires_grad_() for x in (hidden_NH, weight_VH))
        log_probs_N, _ = linear_log_probs(hidden, weight, targets_N, backend=backend)
        log_probs_N.sum().backward()
        found.append([log_probs_N.detach(), *(x.grad.float() for x in (hidden, weight) if x.grad is not None)])
    (wanted, *of_wanted), (got, *of_got) = found
    relative = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(of_wanted, of_got, strict=True)]
    return max(float((got - wanted).abs().max()), *relative)


def look(backend: str, architecture: int) -> dict[str, Any]:
    started = time.perf_counter()
    answer: dict[str, Any] = {"architecture": architecture, "ran": False, "tested": TESTED_TRITON}
    try:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if device is not None:
            answer |= {"ran": True, "architecture": None, "largest_error": compare(device)}
            triton = importlib.import_module("triton")
            answer["architecture"] = triton.runtime.driver.active.get_current_target().arch
        else:
            compile_only(backend, architecture)
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
        answer["error"] = f"{type(error).__name__}: {lines[-1].strip()}"
    return answer | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1], int(sys.argv[2]))))
