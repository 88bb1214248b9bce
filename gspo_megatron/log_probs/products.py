"""Matrix products, added up and returned in a wide format: float64 of float64 factors, float32 of all else."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ONEDNN_FROM = 2**26
"""Multiplications from which a CPU product is oneDNN's. It compiles a kernel for each new shape, in about 1 ms."""
ONEDNN_ROWS = 64
"""Rows come in multiples of it there: the kernel of every shape stays in memory, and micro-batches are ragged."""


def accumulator(x: Tensor) -> torch.dtype:
    """What products of x are added up in, and results returned in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def factor_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which factors enter a product. Accelerators multiply bf16 into float32 (torch >= 2.8); a CPU, or an
    older torch, has only products whose result is rounded to bf16, so there the factors are widened first."""
    return x.dtype if _multiplies_wide(x.device, x.dtype) else accumulator(x)


def padded_rows(rows: int, like: Tensor, columns: int) -> int:
    """How many rows [rows, H] should have to be multiplied by [H, columns]; `like` has H columns."""
    is_large = like.device.type == "cpu" and accumulator(like) == torch.float32 and _has_onednn()
    if not (is_large and rows * like.shape[1] * columns >= ONEDNN_FROM):
        return rows
    return -(-rows // ONEDNN_ROWS) * ONEDNN_ROWS


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in the accumulator's dtype: bf16 factors give logits that were never bf16. It lies in `out`, or, where oneDNN
    made it, in memory of its own."""
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
    """torch multiplies float32 on a CPU through MKL, which on AMD's leaves half of AVX-512 unused: there oneDNN, which
    torch brings as well, takes half the time. Decided by shapes and the processor, never by a clock."""
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
    """a b through the operator that torch.compile calls for a linear layer, x W^T. It copies an x that is not dense;
    for such a W it has no fast kernel."""
    if not (b.is_contiguous() or b.T.is_contiguous()):
        b = b.contiguous()
    ab: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return ab


@functools.cache
def _multiplies_wide(device: torch.device, factor: torch.dtype) -> bool:
    """Whether mm gives a float32 product of narrow factors here: a CPU does not, nor do older versions of torch."""
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
    """Whether addmm adds a product of narrow factors to a wide total here: some versions of torch want the total
    narrow too."""
    x = torch.ones(16, 16, device=device)
    try:
        torch.addmm(x.to(total), x.to(factor), x.to(factor), out_dtype=total, out=x.to(total))
    except (RuntimeError, TypeError):
        return False
    return True
