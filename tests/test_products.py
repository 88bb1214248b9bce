"""Products of the log-probs: wide sums, whichever library multiplies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.log_probs import linear_log_probs, products

ROWS, COLUMNS, H = 13, 29, 17


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN" and not products._has_onednn():
        pytest.skip("no AVX-512 here")
    monkeypatch.setattr(products, "ONEDNN_FROM", 1 if request.param == "oneDNN" else 1 << 60)
    return str(request.param)


def factors(transposed: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[ROWS, H] and [H, COLUMNS], by rows in memory or by columns."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(ROWS, H, generator=rng), torch.randn(H, COLUMNS, generator=rng)
    a, b = a.to(dtype), b.to(dtype)
    if "a" in transposed:
        a = a.T.contiguous().T
    if "b" in transposed:
        b = b.T.contiguous().T
    return a, b


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_and_sums_of_products(library: str, transposed: str, dtype: torch.dtype) -> None:
    a, b = factors(transposed, dtype)
    exact = a.double() @ b.double()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    with Operators() as operators:
        ab = products.product(a, b, out=torch.full((ROWS, COLUMNS), torch.nan, dtype=products.accumulator(a)))
    assert ab.dtype == products.accumulator(a)
    assert (ab - exact).norm() < tolerance * exact.norm()
    assert operators.seen["_linear_pointwise"] == (library == "oneDNN" and dtype != torch.float64)

    total = torch.full((2 * ROWS, COLUMNS), 0.5, dtype=ab.dtype)[::2]
    wide = products.factor_dtype(a)
    with Operators() as operators:
        products.add_product(total, a.to(wide), b.to(wide))
    assert (total - 0.5 - exact).norm() < tolerance * exact.norm()
    assert operators.seen["_linear_pointwise"] == (library == "oneDNN" and dtype != torch.float64)


def test_small_products_compile_nothing() -> None:
    """oneDNN builds a kernel for every new shape, and micro-batches are ragged."""
    a, b = factors("", torch.float32)
    with Operators() as operators:
        products.product(a, b)
    assert not operators.seen["_linear_pointwise"]


def test_log_probs_agree_to_rounding(library: str) -> None:
    """Whole forward and backward, against float64 of the same inputs, some blocks kept."""
    rng = torch.Generator().manual_seed(1)
    hidden_NH, weight_VH = torch.randn(ROWS, H, generator=rng), torch.randn(COLUMNS, H, generator=rng)
    targets_N, d_log_probs_N = torch.arange(ROWS) * 2, torch.randn(ROWS, generator=rng)

    def run(dtype: torch.dtype, store_bytes: int) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (hidden_NH, weight_VH)]
        log_probs_N, _ = linear_log_probs(inputs[0], inputs[1], targets_N, store_bytes=store_bytes)
        return [log_probs_N, *torch.autograd.grad(log_probs_N, inputs, d_log_probs_N.to(dtype))]

    exact = run(torch.float64, 0)
    for store_bytes in (0, 1 << 20):
        for x, wanted in zip(run(torch.float32, store_bytes), exact, strict=True):
            assert (x - wanted).norm() < 1e-6 * wanted.norm()
