"""Matrix products of the log-probs: accumulated in a wide format, whichever library computes them."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.device import open_device
from gspo_megatron.log_probs import linear_log_probs, products
from gspo_megatron.testing.local_ranks import run_distributed

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
    if request.param == "oneDNN":
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this build of torch has no oneDNN")
        monkeypatch.setattr(products, "_has_operator", lambda: True)
    monkeypatch.setattr(products, "ONEDNN_FROM", 1 if request.param == "oneDNN" else 1 << 60)
    return str(request.param)


def factors(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[ROWS, H] and [H, COLUMNS], by rows in memory or by columns, or (capital letter) part of a larger matrix."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(ROWS, H, generator=rng), torch.randn(H, COLUMNS, generator=rng)
    a, b = a.to(dtype), b.to(dtype)
    if "a" in layout:
        a = a.T.contiguous().T
    if "b" in layout:
        b = b.T.contiguous().T
    if "A" in layout:
        a = torch.cat([a, a], 1)[:, :H]
    if "B" in layout:
        b = torch.cat([b, b], 1)[:, :COLUMNS]
    return a, b


@pytest.mark.parametrize("layout", ["", "a", "b", "ab", "A", "B"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_and_sums_of_products(library: str, layout: str, dtype: torch.dtype) -> None:
    a, b = factors(layout, dtype)
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


def test_a_factor_with_gaps_is_not_left_to_the_reference_kernel(library: str) -> None:
    """oneDNN multiplies any strides, but takes about a thousand times as long for some."""
    a, b = torch.randn(64, 512), torch.randn(512, 2048)[:, 3:1027]
    best = []
    for factor in (b, b.contiguous()):
        products.product(a, factor)
        times = []
        for _ in range(5):  # another process may take the core in any of them
            start = time.perf_counter()
            products.product(a, factor)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    assert best[0] < 30 * best[1]


def test_large_products_are_onednns_unless_it_is_off() -> None:
    if not products._has_onednn():
        pytest.skip("no AVX-512 here")
    a, b = torch.ones(512, 512), torch.ones(512, 512)
    with Operators() as on:
        products.product(a, b)
    torch.backends.mkldnn.set_flags(False)
    try:
        with Operators() as off:
            products.product(a, b)
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert (on.seen["_linear_pointwise"], off.seen["_linear_pointwise"]) == (1, 0)


def grown_mib(row_counts: list[int]) -> float:
    """What a process takes after the first fifty calls with these row counts."""
    weight_VH = torch.randn(1408, 256).requires_grad_()
    device = open_device("cpu", "fp32")
    for number, rows in enumerate(row_counts):
        if number == 50:
            before_gib = device.memory_gib()
        hidden_NH = torch.randn(rows, 256).requires_grad_()
        log_probs_N, _ = linear_log_probs(hidden_NH, weight_VH, torch.zeros(rows, dtype=torch.int64), validate=False)
        log_probs_N.sum().backward()
    return (device.memory_gib() - before_gib) * 1024


def test_ragged_micro_batches_do_not_fill_the_memory_with_kernels() -> None:
    """Without rounding rows up these took 230 MiB, with it 6."""
    rng = torch.Generator().manual_seed(0)
    [mib] = run_distributed(grown_mib, 1, torch.randint(300, 1024, (130,), generator=rng).tolist())
    assert mib < 60


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
