"""Tensors on their way to a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gspo_megatron.base.tensors import all_on_device

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


class Inner(NamedTuple):
    length: int
    at: Tensor


class Outer(NamedTuple):
    numbers: Tensor
    inner: tuple[Inner, ...]
    grid: tuple[int, int]
    label: str
    empty: Tensor


def outer() -> Outer:
    """Values that a number of another format could not hold, a tensor that is not contiguous, and empty ones."""
    numbers = torch.tensor([0.1, -0.0, torch.inf, 5e-324], dtype=torch.float64)
    grid = torch.arange(6).view(2, 3).T
    inner = Inner(3, torch.tensor([2**63 - 1, -(2**63)])), Inner(4, grid)
    return Outer(numbers, inner, (5, 6), "kept", torch.empty(0, 2, dtype=torch.float64))


class Copies(TorchFunctionMode):
    """Counts how often tensors are sent to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in ("to", "cuda", "copy_")
        return function(*args, **(kwargs or {}))


def test_every_field_arrives_as_it_was() -> None:
    sent = outer()
    received = all_on_device(sent, CPU)
    assert type(received) is Outer and [type(x) for x in received.inner] == [Inner, Inner]
    assert (received.grid, received.label) == (sent.grid, sent.label)
    assert [x.length for x in received.inner] == [3, 4]
    for ours, theirs in zip(
        (received.numbers, received.empty, *(x.at for x in received.inner)),
        (sent.numbers, sent.empty, *(x.at for x in sent.inner)),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.view(torch.int64).equal(theirs.contiguous().view(torch.int64))


def test_no_memory_is_shared() -> None:
    """The host goes on writing into its arrays, whatever the device."""
    sent = outer()
    received = all_on_device(sent, CPU)
    sent.numbers.zero_()
    assert received.numbers[0] == 0.1


def test_all_fields_travel_in_one_copy() -> None:
    with Copies() as copies:
        received = all_on_device(outer(), ELSEWHERE)
    assert copies.count == 1
    tensors = (received.numbers, received.empty, *(x.at for x in received.inner))
    assert all(x.device == ELSEWHERE for x in tensors)
    assert [tuple(x.shape) for x in tensors] == [(4,), (0, 2), (2,), (3, 2)]


def test_nothing_to_send() -> None:
    assert all_on_device((1, ("a", ())), CPU) == (1, ("a", ()))


def test_other_formats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"cannot send torch.bool, torch.float32: .* use int64 or float64"):
        all_on_device((torch.zeros(1), torch.ones(2, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)), CPU)
