"""What linear_log_probs may cache, skip, and add to Megatron's buffers: the results stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.log_probs import blocks, linear_log_probs
from gspo_megatron.log_probs.products import accumulator
from tests.log_probs.test_log_probs import TARGETS, VOCAB, Case, H, assert_near, make_case

ALL = 1 << 20
"""Bytes enough for every block."""


@pytest.fixture(autouse=True)
def odd_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", (3, 4))


class Flops(TorchDispatchMode):
    """2 n m k of every matrix product, and the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            *_, a, b = args
            self.count += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def gradients(case: Case, *, weight: Tensor | None = None, entropy: bool = False, **options: Any) -> list[Tensor]:
    """[log-probs, gradient of hidden, gradient of weight]."""
    hidden_NH = case.hidden_NH.clone().requires_grad_()
    weight_VH = case.weight_VH.clone().requires_grad_() if weight is None else weight
    log_probs_N, entropy_N = linear_log_probs(hidden_NH, weight_VH, case.targets_N, with_entropy=entropy, **options)
    loss = log_probs_N @ case.d_log_probs_N.to(log_probs_N.dtype)
    if entropy_N is not None:
        loss = loss + entropy_N @ case.d_entropy_N.to(log_probs_N.dtype)
    loss.backward()
    return [log_probs_N.detach(), hidden_NH.grad, weight_VH.grad]


@pytest.mark.parametrize("store_bytes", [0, 96, 500, 1000, ALL])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_kept_changes_nothing(store_bytes: int, temperature: float) -> None:
    case = make_case(TARGETS["mixed"])
    case.d_log_probs_N[3] = 0
    got = gradients(case, temperature=temperature, store_bytes=store_bytes)
    for x, wanted in zip(got, (lambda o: (o[0], o[2], o[3]))(case.oracle(temperature, False)), strict=True):
        assert_near(x, wanted)


def test_keeping_saves_the_second_matmul_and_no_more_bytes_than_allowed() -> None:
    case = make_case(TARGETS["all"])
    one = 2 * 12 * VOCAB * H  # a product of all rows with all columns
    counted = []
    for store_bytes in (0, 12 * VOCAB * 8 // 2, ALL):
        with Flops() as flops:
            gradients(case, store_bytes=store_bytes)
        counted.append(flops.count / one)
    assert counted[0] == 4 and counted[2] == 3 and 3.5 <= counted[1] < 3.7
    store = blocks.Store(130, [12], VOCAB, case.hidden_NH)  # 16 numbers
    assert [store.take(3, columns) is not None for columns in (4, 2, 1, 1)] == [True, False, True, False]
    with torch.no_grad(), Flops() as flops:
        linear_log_probs(case.hidden_NH, case.weight_VH, case.targets_N, store_bytes=ALL, validate=False)
    assert flops.count == one and flops.largest < 12 * VOCAB


def test_kept_exponentials_of_bf16_take_two_bytes_on_an_accelerator() -> None:
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    store = blocks.Store(3 * 4 * 2 + 1, [60, 40], 100, like)
    kept = store.take(3, 4)
    assert kept is not None and kept.dtype == torch.bfloat16 and store.take(1, 1) is None
    assert blocks.Store(1 << 40, [3], 4, like).take(3, 5) is None  # no more than can be used


def test_a_second_backward_computes_again_what_the_first_used_up() -> None:
    case = make_case(TARGETS["mixed"])
    weight_VH = case.weight_VH.requires_grad_()
    log_probs_N, _ = linear_log_probs(case.hidden_NH, weight_VH, case.targets_N, store_bytes=ALL)
    first, second = (torch.autograd.grad(log_probs_N.sum(), weight_VH, retain_graph=True)[0] for _ in range(2))
    assert_near(second, first)


def test_the_gradient_of_an_entropy_does_not_come_from_rounded_exponentials() -> None:
    case = make_case(TARGETS["mixed"])
    for x, wanted in zip(
        gradients(case, entropy=True, store_bytes=ALL),
        (lambda o: (o[0], o[2], o[3]))(case.oracle(1.0, True)),
        strict=True,
    ):
        assert_near(x, wanted)


@pytest.mark.parametrize("dead", [[], [0], [3, 4, 5], [0, 5, 11], list(range(12))])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("store_bytes", [0, 700, ALL])
def test_rows_without_gradient_leave_the_backward(dead: list[int], entropy: bool, store_bytes: int) -> None:
    case = make_case(TARGETS["all"])
    case.d_log_probs_N[dead] = 0
    if entropy:
        case.d_entropy_N[dead[:1]] = 0  # the others stay, by their entropy
    counted = {}
    results = {}
    for skip in (True, False):
        with Flops() as flops:
            results[skip] = gradients(
                case, entropy=entropy, store_bytes=store_bytes, skip_zero_rows=skip, validate=False
            )
        counted[skip] = flops.count
    for on, off in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(on, off, rtol=1e-14, atol=1e-15)
    num_dead = len(dead[:1]) if entropy else len(dead)
    # Of a row without gradient at least d_hidden and d_weight are saved, and the logits where they are not kept.
    assert counted[False] - counted[True] >= num_dead * 2 * (2 * VOCAB * H)
    assert (results[True][1][dead[:num_dead]] == 0).all()


def test_a_gradient_that_is_not_a_number_does_not_leave() -> None:
    case = make_case(TARGETS["all"])
    case.d_log_probs_N[3] = torch.nan
    assert gradients(case)[1][3].isnan().all()


# ------------------------------------------------------------------------------------------ Megatron's gradient buffers


def megatron_weight(case: Case, dtype: torch.dtype) -> Any:
    """A weight as DistributedDataParallel leaves it: a place in a buffer, and whether the gradient is in it."""
    weight_VH: Any = torch.nn.Parameter(case.weight_VH.to(dtype))
    weight_VH.main_grad = torch.ones(weight_VH.shape, dtype=accumulator(weight_VH))
    weight_VH.grad_added_to_main_grad = False
    return weight_VH


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_weight_gradient_goes_into_the_buffer(dtype: torch.dtype) -> None:
    """Twice, as of two micro-batches: not rounded in between, and the weights stay what they are."""
    case = make_case(TARGETS["mixed"], dtype)
    weight_VH = megatron_weight(case, dtype)
    exact = case.oracle(1.0, False)[3]
    for micro_batch in (1, 2):
        assert gradients(case, weight=weight_VH)[2].data_ptr() == weight_VH.data_ptr()  # what the hook drops unread
        assert weight_VH.grad_added_to_main_grad
        weight_VH.grad = None
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            weight_VH.main_grad.double() - 1, micro_batch * exact, rtol=tolerance, atol=tolerance
        )
    assert torch.equal(weight_VH, case.weight_VH)


def test_a_gradient_that_lies_there_is_not_added_to() -> None:
    """Without the hook that drops what set it off, a second backward must not write into the weights."""
    case = make_case(TARGETS["mixed"])
    weight_VH = megatron_weight(case, torch.float64)
    for _ in range(3):
        gradients(case, weight=weight_VH)
    assert torch.equal(weight_VH, case.weight_VH)
    assert_near(weight_VH.main_grad - 1, 3 * case.oracle(1.0, False)[3])


def test_the_gradient_of_a_tied_embedding_arrives() -> None:
    """`zero_out_wgrad`: Megatron's hook adds `grad` to the buffer, so it must be that of the embedding alone."""
    case = make_case(TARGETS["mixed"])
    weight_VH = megatron_weight(case, torch.float64)
    weight_VH.zero_out_wgrad = True
    log_probs_N, _ = linear_log_probs(case.hidden_NH, weight_VH, case.targets_N)
    ids = torch.tensor([1, 2, 2])
    (log_probs_N @ case.d_log_probs_N + torch.nn.functional.embedding(ids, weight_VH).sum()).backward()
    assert_near(weight_VH.main_grad - 1, case.oracle(1.0, False)[3])
    assert torch.equal(weight_VH.grad[:, 0], torch.bincount(ids, minlength=VOCAB).double())
    assert torch.equal(weight_VH, case.weight_VH)


def test_a_frozen_matrix_costs_no_gradient() -> None:
    case = make_case(TARGETS["all"])
    hidden_NH, weight_VH = case.hidden_NH.requires_grad_(), megatron_weight(case, torch.float64).requires_grad_(False)
    with Flops() as flops:
        log_probs_N, _ = linear_log_probs(hidden_NH, weight_VH, case.targets_N, validate=False)
        (log_probs_N @ case.d_log_probs_N).backward()
    assert flops.count == 3 * 2 * 12 * VOCAB * H and (weight_VH.main_grad == 1).all() and weight_VH.grad is None
    assert_near(hidden_NH.grad, case.oracle(1.0, False)[2])


def test_without_scored_rows_the_buffer_stays_as_it_is() -> None:
    case = make_case(TARGETS["none"])
    weight_VH = megatron_weight(case, torch.float64)
    gradients(case, weight=weight_VH)
    assert weight_VH.grad_added_to_main_grad and (weight_VH.main_grad == 1).all()
