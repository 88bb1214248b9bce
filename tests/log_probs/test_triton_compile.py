"""The machine code of every Triton kernel for Hopper GPUs, from the compiler and assembler that come with Triton.

`make test-triton` runs this file with each version in backends.TESTED_TRITON, without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from gspo_megatron.log_probs import triton_kernels  # noqa: E402
from gspo_megatron.log_probs.backends import TRITON_DTYPES  # noqa: E402
from gspo_megatron.log_probs.triton_kernels import (  # noqa: E402
    gradients_of_kept,
    linear_statistics,
    logit_gradients,
    row_statistics,
)

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may use on Hopper."""

Compile = Callable[..., list[Any]]


class Compiled:
    """In the place of a kernel: compiles what is to be launched, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.compile, grid)

    def compile(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.kernel.device_caches.clear()  # of another device with number 0, and of this one afterwards
        self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))
        self.kernel.device_caches.clear()


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Compile:
    """A function that calls another one, and returns each kernel that this would have launched. The parameter is the
    compute capability, 90 without one."""
    capability = getattr(request, "param", 90)
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def of(function: Any, *args: Any, **options: Any) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            kernels = []
            for name in ("_row_statistics", "_row_gradients", "_linear_statistics"):
                kernels.append(Compiled(getattr(triton_kernels, name)))
                patch.setattr(triton_kernels, name, kernels[-1])
            function(*args, **options)
        return [compiled for kernel in kernels for compiled in kernel.compiled]

    return of


def code_in_registers(kernel: Any) -> str:
    """Its machine code, in which no register is spilled to memory."""
    code: str = kernel.asm["sass"]
    assert "EXIT" in code and not re.search(r"\b(LDL|STL)\b", code)
    assert kernel.metadata.shared <= SHARED_MEMORY
    return code


def linear(compiled: Compile, dtype: torch.dtype, with_entropy: bool) -> Any:
    hidden_nH, weight_vH = torch.empty(130, 512, dtype=dtype), torch.empty(5000, 512, dtype=dtype)
    columns_n = torch.zeros(130, dtype=torch.int64)
    (kernel,) = compiled(linear_statistics, hidden_nH, weight_vH, columns_n, 0.7, with_entropy=with_entropy)
    return kernel


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_linear_statistics(compiled: Compile, dtype: torch.dtype, with_entropy: bool) -> None:
    code = code_in_registers(linear(compiled, dtype, with_entropy))
    assert "UTMALDG" in code  # tiles come by the engine for copies of tensors
    products = set(re.findall(r"\bH[GM]MMA\S*", code))
    if dtype == torch.float32:
        assert not products and "FFMA" in code
        return
    assert products == {"HGMMA.64x256x16.F32" + (".BF16" if dtype == torch.bfloat16 else "")}
    # A step's products, one for each 16 of its 64 hidden numbers, wait for each other only at its end, and there for
    # those of the step before.
    assert ["gsb0" in line for line in code.splitlines() if "HGMMA" in line] == [False, False, False, True]
    assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", code)


@pytest.mark.parametrize("compiled", [100], indirect=True)
def test_linear_statistics_on_blackwell(compiled: Compile) -> None:
    """It compiles to that generation's tensor instructions. Its registers have not been looked after."""
    kernel = linear(compiled, torch.bfloat16, True)
    assert "tcgen05.mma" in kernel.asm["ptx"] and kernel.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("dtype", "width"), [*((dtype, 8192) for dtype in TRITON_DTYPES), (torch.bfloat16, 1001)], ids=str
)
def test_kernels_of_a_block(compiled: Compile, dtype: torch.dtype, width: int) -> None:
    z_bc, columns_b, per_row_b = torch.empty(8, width), torch.zeros(8, dtype=torch.int64), torch.empty(8)
    kept_bc = torch.empty(8, width, dtype=dtype)
    kernels = [
        *compiled(row_statistics, z_bc, columns_b, with_entropy=False),
        *compiled(row_statistics, z_bc, columns_b, with_entropy=True, kept_bc=kept_bc),
        *compiled(logit_gradients, z_bc, columns_b, per_row_b, per_row_b, out_bc=kept_bc),
        *compiled(logit_gradients, z_bc, columns_b, per_row_b, per_row_b, (per_row_b,) * 2, out_bc=z_bc),
        *compiled(gradients_of_kept, kept_bc, columns_b, per_row_b, per_row_b),
    ]
    assert len(kernels) == 5
    for kernel in kernels:
        code = code_in_registers(kernel)
        if width % 16 == 0:
            assert re.search(r"\bLDG\.E\.128\b", code)  # 16 bytes at a time
