"""The Triton kernels against float64, in Triton's interpreter on a CPU. `make gpu` runs the same checks compiled.

Triton decides when it is imported whether its kernels are interpreted, and Megatron-Core imports it into this process.
So what runs kernels, every `check_...` here, is collected by a pytest in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402

from gspo_megatron.base.batches import IGNORED  # noqa: E402
from gspo_megatron.log_probs import backends, blocks, linear_log_probs, triton_kernels  # noqa: E402
from gspo_megatron.log_probs.backends import TRITON_DTYPES  # noqa: E402
from gspo_megatron.log_probs.triton_kernels import (  # noqa: E402
    gradients_of_kept,
    linear_statistics,
    logit_gradients,
    row_statistics,
)

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of a number that was rounded once."""


@pytest.mark.parametrize("where", ["interpreter", pytest.param("device", marks=pytest.mark.gpu)])
def test_kernels(where: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    run = subprocess.run(
        [*command, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1" if where == "interpreter" else "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=INTERPRETED)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bf16 as integers, and cuts bf16 off where a device rounds it. That of
    Triton 3.5 also wants rows that start at multiples of 16 elements, where a device wants 16 bytes."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorDescHandle, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def widened(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def rounding_cast(self: Any, x: Any, to: Any) -> Any:
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy().reshape(x.data.shape), tl.bfloat16)

    def widening_dot(self: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        product = np.matmul(widened(a), widened(b), dtype=total.data.dtype)
        return TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(TensorDescHandle, "validate", lambda self: None)  # TensorDescriptor checks the bytes
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widening_dot)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def targets_of(num_rows: int, num_columns: int) -> Tensor:
    """The first and the last column, targets on both sides of the block, near and far, and others inside."""
    fixed = [num_columns - 1, 0, -1, num_columns, -num_columns, 1 << 40, IGNORED]
    rng = torch.Generator().manual_seed(1)
    inside = torch.randint(num_columns, (num_rows,), generator=rng)
    inside[: len(fixed)] = torch.tensor(fixed)[:num_rows]
    return inside.to(DEVICE)


def of_position(x_bc: Tensor, columns_b: Tensor, elsewhere: float) -> Tensor:
    is_inside_b = (columns_b >= 0) & (columns_b < x_bc.shape[1])
    return torch.where(is_inside_b, x_bc.gather(1, columns_b.where(is_inside_b, 0)[:, None])[:, 0], elsewhere)


def is_target(columns_b: Tensor, num_columns: int) -> Tensor:
    return (torch.arange(num_columns, device=DEVICE) == columns_b[:, None]).double()


def statistics_oracle(z_bc: Tensor, columns_b: Tensor) -> Tensor:
    """[lse, log p(y) or -inf, entropy] of float64 logits."""
    log_p_bc = torch.log_softmax(z_bc, 1)
    entropy_b = -(log_p_bc.exp() * log_p_bc.clamp(min=-1e6)).sum(1)
    return torch.stack([z_bc.logsumexp(1), of_position(log_p_bc, columns_b, -torch.inf), entropy_b])


def assert_near(got: Tensor, wanted: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol)


LOGITS = {
    "normal": lambda b, c: 5 * normal(b, c),
    "extreme": lambda b, c: 1e4 * normal(b, c).sign(),
    "shifted": lambda b, c: normal(b, c) - 1e4,
    "equal": lambda b, c: torch.full((b, c), 3.25, device=DEVICE),
}
SHAPES = [(1, 1), (3, 1), (8, 5), (3, 127), (3, 257), (8, 1000), (2, 4096), (3, 9001)]
"""The last one takes three chunks of columns."""


def strided(x_bc: Tensor) -> Tensor:
    """The same numbers as a view with rows far apart and an odd start, in a sea of NaN."""
    base = x_bc.new_full((x_bc.shape[0], x_bc.shape[1] + 14), torch.nan)
    view_bc = base[:, 3:-11]
    view_bc.copy_(x_bc)
    return view_bc


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(
    ("with_entropy", "kept_dtype"), [(False, None), (True, None), (False, torch.float32), (True, torch.bfloat16)]
)
def check_row_statistics(logits: str, with_entropy: bool, kept_dtype: torch.dtype | None) -> None:
    for (num_rows, num_columns), layout in zip(SHAPES, [torch.clone, strided] * 4, strict=True):
        z_bc, columns_b = layout(LOGITS[logits](num_rows, num_columns)), targets_of(num_rows, num_columns)
        wanted = statistics_oracle(z_bc.double(), columns_b)
        max_z_b, exp_bc = z_bc.amax(1), (z_bc.double() - z_bc.double().amax(1, keepdim=True)).exp()
        kept_bc = None if kept_dtype is None else layout(torch.full_like(z_bc, torch.nan, dtype=kept_dtype))
        stats_Kb, max_b = row_statistics(z_bc, columns_b, with_entropy=with_entropy, kept_bc=kept_bc)
        assert stats_Kb.dtype == max_b.dtype == torch.float32
        assert torch.equal(max_b, max_z_b)
        assert_near(stats_Kb, wanted[: 2 + with_entropy], rtol=1e-6, atol=2e-6)
        if kept_bc is not None:
            # Below e^-40 nothing is left of a bf16 gradient; what e^x loses is |x| half units of x.
            assert_near(kept_bc, exp_bc, rtol=HALF_UNIT[kept_dtype] + 1e-5, atol=1e-17)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def check_logit_gradients(logits: str, with_entropy: bool, out_dtype: torch.dtype) -> None:
    for (num_rows, num_columns), layout in zip(SHAPES, [torch.clone, strided] * 4, strict=True):
        z_bc, columns_b = layout(LOGITS[logits](num_rows, num_columns)), targets_of(num_rows, num_columns)
        # Of a vocabulary that has more columns than these.
        lse_b, entropy_b = z_bc.logsumexp(1) + 0.25, statistics_oracle(z_bc.double(), columns_b)[2].float() + 0.5
        d_log_probs_b, d_entropy_b = normal(num_rows, seed=2), normal(num_rows, seed=3)
        log_p_bc = z_bc.double() - lse_b.double()[:, None]
        wanted = d_log_probs_b[:, None] * (is_target(columns_b, num_columns) - log_p_bc.exp())
        if with_entropy:
            wanted -= d_entropy_b[:, None] * log_p_bc.exp() * (log_p_bc + entropy_b.double()[:, None])
        out_bc = z_bc if out_dtype == torch.float32 else layout(torch.full_like(z_bc, torch.nan, dtype=out_dtype))
        of_entropy = (entropy_b, d_entropy_b) if with_entropy else None
        logit_gradients(z_bc, columns_b, lse_b, d_log_probs_b, of_entropy, out_bc=out_bc)
        assert_near(out_bc, wanted, rtol=HALF_UNIT[out_dtype] + 2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_gradients_of_kept(dtype: torch.dtype) -> None:
    for (num_rows, num_columns), layout in zip(SHAPES, [torch.clone, strided] * 4, strict=True):
        z_bc, columns_b = 5 * normal(num_rows, num_columns), targets_of(num_rows, num_columns)
        kept_bc = layout((z_bc - z_bc.amax(1, keepdim=True)).exp().to(dtype))
        log_scale_b, d_log_probs_b = -normal(num_rows, seed=4).abs(), normal(num_rows, seed=2)
        p_bc = kept_bc.double() * log_scale_b.double().exp()[:, None]
        gradients_of_kept(kept_bc, columns_b, log_scale_b, d_log_probs_b)
        wanted = d_log_probs_b.double()[:, None] * (is_target(columns_b, num_columns) - p_bc)
        assert_near(kept_bc, wanted, rtol=HALF_UNIT[dtype] + 1e-6, atol=1e-6)


LINEAR_SHAPES = [(1, 1, 1), (3, 5, 17), (3, 257, 64), (130, 127, 17), (130, 1000, 96), (5, 4500, 64)]
"""Rows, columns, hidden size. The last one takes three parts of columns."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inverse_temperature", "with_entropy"), [(1.0, False), (1 / 0.7, True)])
def check_linear_statistics(dtype: torch.dtype, inverse_temperature: float, with_entropy: bool) -> None:
    for number, (num_rows, num_columns, width) in enumerate(LINEAR_SHAPES):
        # Logits of 30 and more; beyond the last row and column, NaN.
        hidden_nH = torch.cat([3 * normal(num_rows, width, dtype=dtype), hidden_of_nan(width, dtype)])[:num_rows]
        weight_vH = torch.cat([normal(num_columns, width, seed=1, dtype=dtype), hidden_of_nan(width, dtype)])
        weight_vH = weight_vH[:num_columns]
        if number % 2:  # neither their starts nor their rows are multiples of 16 bytes apart
            hidden_nH, weight_vH = strided(hidden_nH), strided(weight_vH)
        columns_n = targets_of(num_rows, num_columns)
        stats_Kn = linear_statistics(hidden_nH, weight_vH, columns_n, inverse_temperature, with_entropy=with_entropy)
        z_nv = hidden_nH.double() @ weight_vH.double().T * inverse_temperature
        wanted = statistics_oracle(z_nv, columns_n)[: 2 + with_entropy]
        assert stats_Kn.dtype == torch.float32
        # A float32 sum of up to 96 products with logits up to 150: some units of 8e-6.
        assert_near(stats_Kn, wanted, rtol=1e-6, atol=3e-5)


def check_many_row_tiles_and_parts() -> None:
    """Row tiles in more than one group, each with all parts of the columns."""
    hidden_nH, weight_vH, columns_n = normal(1100, 8), normal(1100, 8, seed=1), targets_of(1100, 1100)
    wanted = statistics_oracle(hidden_nH.double() @ weight_vH.double().T, columns_n)
    assert triton.cdiv(1100, triton_kernels.FLOAT32_TILE.rows) > triton_kernels.ROW_TILES_TOGETHER.value
    assert_near(
        linear_statistics(hidden_nH, weight_vH, columns_n, 1.0, with_entropy=True), wanted, rtol=1e-6, atol=1e-5
    )


def hidden_of_nan(width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((3, width), torch.nan, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("value", [1e4, -1e4])
def check_linear_statistics_of_extreme_and_equal_logits(value: float) -> None:
    """All logits are equal but that of column 2, in a block with 1000 - 3 * 256 columns in its last tile."""
    weight_vH = torch.full((1000, 1), value, device=DEVICE)
    columns_n = torch.tensor([2, 999, 1000], device=DEVICE)
    got = linear_statistics(torch.ones(3, 1, device=DEVICE), weight_vH, columns_n, 1.0, with_entropy=True)
    log_v = torch.tensor(1000.0).log().item()
    wanted = torch.tensor([[value + log_v] * 3, [-log_v, -log_v, -torch.inf], [log_v] * 3], device=DEVICE)
    assert_near(got, wanted, rtol=0, atol=1e-3)  # the lse of a part has steps of 1e-3 at 1e4
    weight_vH[2] += 2e4
    got = linear_statistics(torch.ones(3, 1, device=DEVICE), weight_vH, columns_n, 1.0, with_entropy=True)
    wanted = torch.tensor([[value + 2e4] * 3, [0.0, -2e4, -torch.inf], [0.0] * 3], device=DEVICE)
    assert_near(got, wanted, rtol=1e-6, atol=0)


def check_an_almost_certain_token_keeps_its_digits() -> None:
    """z_y - lse would be a multiple of 1.2e-4 at logits near 1500: rounded to 0 here."""
    z_bc = torch.full((1, 17), 1500.0, device=DEVICE)
    z_bc[0, 6] = 1512.0
    columns_b = torch.tensor([6], device=DEVICE)
    wanted = statistics_oracle(z_bc.double(), columns_b)[1:]
    for stats_Kb in (
        linear_statistics(torch.ones(1, 1, device=DEVICE), z_bc.T, columns_b, 1.0, with_entropy=True),
        row_statistics(z_bc, columns_b, with_entropy=True)[0],
    ):
        assert_near(stats_Kb[1:], wanted, rtol=1e-3, atol=0)


def check_rows_do_not_touch_each_other() -> None:
    """A row's numbers are the same bits whatever rows are beside it, and a row that is not finite shows in its own."""
    hidden_nH, weight_vH = normal(130, 64, dtype=torch.bfloat16), normal(1000, 64, seed=1, dtype=torch.bfloat16)
    columns_n = targets_of(130, 1000)
    z_nv = hidden_nH.float() @ weight_vH.float().T
    alone = linear_statistics(hidden_nH[7:9], weight_vH, columns_n[7:9], 1.0, with_entropy=True)
    z_alone = row_statistics(z_nv[7:9].clone(), columns_n[7:9], with_entropy=True)[0]
    hidden_nH[129, 3], z_nv[129, 999] = torch.inf, torch.nan
    for stats_Kn, of_two in (
        (linear_statistics(hidden_nH, weight_vH, columns_n, 1.0, with_entropy=True), alone),
        (row_statistics(z_nv, columns_n, with_entropy=True)[0], z_alone),
    ):
        assert torch.equal(stats_Kn[:, 7:9], of_two)
        assert stats_Kn[0].isfinite().tolist() == [True] * 129 + [False]


def check_nothing_in_nothing_out() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device=DEVICE, dtype=dtype)

    for num_rows, num_columns in [(0, 5), (2, 0), (0, 0)]:
        z_bc, columns_b = empty(num_rows, num_columns), empty(num_rows, dtype=torch.int64).fill_(1)
        wanted = torch.tensor([-torch.inf, -torch.inf, 0.0], device=DEVICE)[:, None].expand(3, num_rows)
        stats_Kb, max_b = row_statistics(z_bc, columns_b, with_entropy=True, kept_bc=z_bc.bfloat16())
        assert torch.equal(stats_Kb, wanted) and torch.equal(max_b, wanted[0])
        hidden_nH, weight_vH = empty(num_rows, 8), empty(num_columns, 8)
        for with_entropy in (False, True):
            got = linear_statistics(hidden_nH, weight_vH, columns_b, 1.0, with_entropy=with_entropy)
            assert torch.equal(got, wanted[: 2 + with_entropy])
        per_row_b = empty(num_rows)
        logit_gradients(z_bc, columns_b, per_row_b, per_row_b, (per_row_b, per_row_b), out_bc=z_bc)
        gradients_of_kept(z_bc, columns_b, per_row_b, per_row_b)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("store_bytes", [0, 300, 1 << 20])
def check_linear_log_probs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_entropy: bool, store_bytes: int
) -> None:
    """Blocks that divide neither rows nor columns, rows without target or gradient, padding, some blocks kept."""
    monkeypatch.setattr(blocks, "CPU_BLOCK", (5, 7))
    monkeypatch.setattr(blocks, "ACCELERATOR_BLOCK", (5, 7))
    num_rows, vocab_size, width = 12, 17, 24
    targets_N = torch.tensor([3, IGNORED, 0, 16, IGNORED, 5, 8, 9, IGNORED, 12, 16, 1])
    hidden_NH = normal(num_rows, width, dtype=dtype).requires_grad_()
    weight_VpH = torch.cat([normal(vocab_size, width, seed=1, dtype=dtype), hidden_of_nan(width, dtype)])
    weight_VpH.requires_grad_()
    d_log_probs_N, d_entropy_N = normal(num_rows, seed=2), normal(num_rows, seed=3)
    d_log_probs_N[[0, 7]], d_entropy_N[[0, 7]] = 0.0, 0.0

    log_probs_N, entropy_N = linear_log_probs(
        hidden_NH,
        weight_VpH,
        targets_N,
        temperature=0.7,
        with_entropy=with_entropy,
        vocab_size=vocab_size,
        backend="triton",
        store_bytes=store_bytes,
    )
    loss = log_probs_N @ d_log_probs_N
    if entropy_N is not None:
        loss = loss + entropy_N @ d_entropy_N
    loss.backward()

    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden_NH, weight_VpH[:vocab_size]))
    log_p_NV = torch.log_softmax(hidden @ weight.T / 0.7, 1)
    is_scored_N = (targets_N != IGNORED).to(DEVICE)
    wanted_N = of_position(log_p_NV, targets_N.to(DEVICE), 0.0).where(is_scored_N, 0.0)
    wanted_entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1).where(is_scored_N, 0.0)
    loss = wanted_N @ d_log_probs_N.double() + (wanted_entropy_N @ d_entropy_N.double() if with_entropy else 0.0)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))

    assert_near(log_probs_N, wanted_N, rtol=1e-6, atol=1e-5)
    if entropy_N is not None:
        assert_near(entropy_N, wanted_entropy_N, rtol=1e-6, atol=1e-5)
    # On a CPU bf16 factors are widened, and D is not rounded; a device rounds D and, where kept, the exponentials.
    rtol, atol = (1e-5, 2e-5) if dtype == torch.float32 else (HALF_UNIT[dtype] + 1e-5, 2e-5 if INTERPRETED else 0.05)
    assert_near(hidden_NH.grad, d_hidden, rtol, atol)
    assert_near(weight_VpH.grad[:vocab_size], d_weight, rtol, atol)
    assert (weight_VpH.grad[vocab_size:] == 0).all()


@pytest.mark.parametrize("targets", [[], [IGNORED, IGNORED], [IGNORED, 11, IGNORED]])
def check_linear_log_probs_of_one_row_and_none(targets: list[int]) -> None:
    inputs = [normal(n, 8, seed=n, dtype=torch.bfloat16).requires_grad_() for n in (len(targets), 17)]
    log_probs_N, entropy_N = linear_log_probs(
        *inputs, torch.tensor(targets, dtype=torch.int64), with_entropy=True, backend="triton"
    )
    assert entropy_N is not None and len(log_probs_N) == len(entropy_N) == len(targets)
    hidden_NH, weight_VH = (x.detach().double().requires_grad_() for x in inputs)
    log_p_NV = torch.log_softmax(hidden_NH @ weight_VH.T, 1)
    scored = [row for row, target in enumerate(targets) if target != IGNORED]
    wanted = sum((log_p_NV[row, targets[row]] for row in scored), 0.0 * log_p_NV.sum())
    assert_near(log_probs_N.sum(), wanted, rtol=1e-6, atol=1e-5)
    log_probs_N.sum().backward()
    wanted.backward()
    for x, reference in zip(inputs, (hidden_NH, weight_VH), strict=True):
        # A device rounds D to bf16.
        assert_near(x.grad, reference.grad, rtol=2.0**-8, atol=1e-5 if INTERPRETED else 0.01)


def far_apart(x_bc: Tensor) -> Tensor:
    """The same numbers with the third row more than 2^31 elements behind the first. What is between them is never
    touched, and a CPU gives it no memory."""
    base = torch.empty((len(x_bc) - 1) * FAR + x_bc.shape[1], device=DEVICE, dtype=x_bc.dtype)
    return base.as_strided(x_bc.shape, (FAR, 1)).copy_(x_bc)


FAR = (1 << 30) + 16
"""Fits 32 bits, unlike its double."""


def check_rows_far_apart() -> None:
    """Places that 32 bits do not hold, in what is read and in what is written. On a device a stride that is no multiple
    of 16 gives another order of summation."""
    z_bc, columns_b, row_b = normal(3, 96), torch.tensor([3, 95, 7], device=DEVICE), normal(3, seed=4)
    far_bc, kept_bc, far_kept_bc = far_apart(z_bc), z_bc.bfloat16(), far_apart(z_bc.bfloat16())
    wanted, _ = row_statistics(z_bc, columns_b, with_entropy=True, kept_bc=kept_bc)
    got, _ = row_statistics(far_bc, columns_b, with_entropy=True, kept_bc=far_kept_bc)
    assert torch.equal(got, wanted) and torch.equal(far_kept_bc, kept_bc)
    for x_bc in (kept_bc, far_kept_bc):
        gradients_of_kept(x_bc, columns_b, row_b, row_b)
    assert torch.equal(far_kept_bc, kept_bc)
    for x_bc in (z_bc, far_bc):
        logit_gradients(x_bc, columns_b, row_b, row_b, out_bc=x_bc)
    assert torch.equal(far_bc, z_bc)
    del far_bc
    hidden_nH, weight_vH = normal(3, 64, dtype=torch.bfloat16), normal(3, 64, seed=1, dtype=torch.bfloat16)
    wanted = linear_statistics(hidden_nH, weight_vH, columns_b, 1.0, with_entropy=True)
    got = linear_statistics(far_apart(hidden_nH), far_apart(weight_vH), columns_b, 1.0, with_entropy=True)
    assert torch.equal(got, wanted)


ROWS, WIDTH, VOCABULARY = (40, 96, 1100) if INTERPRETED else (4096, 2048, 151936)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_against_torch(dtype: torch.dtype) -> None:
    """Log-probs, entropies and gradients of Triton's kernels against those of torch's, on a device at the size of
    Qwen3-30B-A3B's vocabulary matrix. There `auto` chooses Triton."""
    inputs = normal(ROWS, WIDTH, dtype=dtype), (normal(VOCABULARY, WIDTH, seed=1) * 2 / WIDTH**0.5).to(dtype)
    targets_N = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    d_log_probs_N, d_entropy_N = normal(ROWS, seed=3), normal(ROWS, seed=4)
    if not INTERPRETED:
        assert backends.choose("auto", inputs[0], None) is triton_kernels
    results = {}
    for backend in ("torch", "triton"):
        hidden_NH, weight_VH = (x.clone().requires_grad_() for x in inputs)
        log_probs_N, entropy_N = linear_log_probs(
            hidden_NH, weight_VH, targets_N, temperature=0.7, with_entropy=True, backend=backend
        )
        (log_probs_N @ d_log_probs_N + entropy_N @ d_entropy_N).backward()
        results[backend] = [x.detach().double() for x in (log_probs_N, entropy_N, hidden_NH.grad, weight_VH.grad)]
    # Tensor cores cut partial sums off, in an order of their own; D and the gradients are rounded to bf16.
    value, gradient = (1e-4, 1e-4) if dtype == torch.float32 else (3e-4, 5e-3)
    for number, (got, wanted) in enumerate(zip(results["triton"], results["torch"], strict=True)):
        if number < 2:
            assert_near(got, wanted, rtol=0, atol=value)
            assert (got - wanted).abs().mean() < value / 10
        else:
            assert (got - wanted).norm() < gradient * wanted.norm()
