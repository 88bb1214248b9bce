"""Matrix products, accumulated and returned in a wide format: float64 for float64 factors, float32 for all else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ONEDNN_FROM = 2**26
"""CPU products of at least this many multiplications go to oneDNN, which compiles a kernel per shape in about 1 ms."""
ONEDNN_ROWS = 64
"""There, rows are padded to a multiple of this: micro-batches vary in size, and the kernel of every shape is cached."""


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are accumulated and returned: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def factor_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which factors enter a product. Accelerators multiply bf16 into float32 (torch >= 2.8); a CPU, or an
    older torch, rounds such a product to bf16, so there the factors are widened first."""
    return x.dtype if _multiplies_wide(x.device, x.dtype) else accumulator(x)


def padded_rows(rows: int, like: Tensor, columns: int) -> int:
    """How many rows [rows, H] should have to be multiplied by [H, columns]; `like` has H columns."""
    is_large = like.device.type == "cpu" and accumulator(like) == torch.float32 and _has_onednn()
    if not (is_large and rows * like.shape[1] * columns >= ONEDNN_FROM):
        return rows
    return -(-rows // ONEDNN_ROWS) * ONEDNN_ROWS


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in the accumulator's dtype: bf16 factors give logits that were never bf16. It is in `out`, or, if oneDNN
    computed it, in new memory."""
    dtype, factor = accumulator(a), factor_dtype(a)
    if factor != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    a, b = a.to(dtype), b.to(dtype)
    return _onednn_product(a, b) if _suits_onednn(a, b) else torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, without rounding a b where total is wider than the factors."""
    if _suits_onednn(a, b):
        total.add_(_onednn_product(a, b))
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _adds_wide(total.device, total.dtype, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(a, b))


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    """torch multiplies float32 on a CPU through MKL, which leaves half of AVX-512 unused on AMD processors: there
    oneDNN, also part of torch, takes half the time. Decided by shapes and the processor, never by timing."""
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and len(a) * a.shape[1] * b.shape[1] >= ONEDNN_FROM
        and _has_onednn()
    )


def _has_onednn() -> bool:
    """`torch.backends.mkldnn.set_flags(False)` turns it off."""
    return bool(torch.backends.mkldnn.enabled) and _has_operator()


@functools.cache
def _has_operator() -> bool:
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operator and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a b through the operator that torch.compile calls for a linear layer, x W^T. It copies an x that is not dense,
    and has no fast kernel for a W that is not."""
    if not (b.is_contiguous() or b.T.is_contiguous()):
        b = b.contiguous()
    ab: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return ab


@functools.cache
def _multiplies_wide(device: torch.device, factor: torch.dtype) -> bool:
    """Whether mm can return a float32 product of narrow factors here: not on a CPU, nor in older versions of torch."""
    if device.type == "cpu" or factor in (torch.float32, torch.float64):
        return False
    x = torch.ones(16, 16, device=device, dtype=factor)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


@functools.cache
def _adds_wide(device: torch.device, total: torch.dtype, factor: torch.dtype) -> bool:
    """Whether addmm can add a product of narrow factors to a wide total here: some versions of torch require a narrow
    total."""
    x = torch.ones(16, 16, device=device)
    try:
        torch.addmm(x.to(total), x.to(factor), x.to(factor), out_dtype=total, out=x.to(total))
    except (RuntimeError, TypeError):
        return False
    return True
