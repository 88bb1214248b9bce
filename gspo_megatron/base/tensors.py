"""Moving tensors to a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple[Any, ...])


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x, which is on the host or on `device`, on `device`, through a non-blocking copy."""
    if x.device == device or device.type == "cpu":
        return x
    return (x.pin_memory() if torch.accelerator.is_available() else x).to(device, non_blocking=True)


def all_on_device(tensors: Tensors, device: torch.device) -> Tensors:
    """The same (nested) named tuple with every tensor on `device`, through one non-blocking copy.

    The tensors are on the host and keep their shapes and dtypes. The result shares no memory with them, not even on
    the CPU. Anything that is neither a tensor nor a tuple stays as it is.

    Raises:
        TypeError: a tensor's elements are not 8 bytes long. All are sent together as raw bits.
    """
    sent = _leaves(tensors)
    if wrong := {str(x.dtype) for x in sent if x.element_size() != 8}:
        raise TypeError(f"cannot send {', '.join(sorted(wrong))}: elements must be 8 bytes long; use int64 or float64")
    if not sent:
        return tensors
    joined = on_device(torch.cat([x.flatten().view(torch.int64) for x in sent]), device)
    pieces = joined.split_with_sizes([x.numel() for x in sent])
    # Most are flat int64, and the check costs less than two views.
    received = [
        piece if x.dtype == torch.int64 and x.dim() == 1 else piece.view(x.dtype).view(x.shape)
        for x, piece in zip(sent, pieces, strict=True)
    ]
    return _with_leaves(tensors, iter(received))


def _leaves(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [leaf for field in tensors for leaf in _leaves(field)] if isinstance(tensors, tuple) else []


def _with_leaves(like: Any, leaves: Iterator[Tensor]) -> Any:
    """`like` with its tensors replaced by `leaves`, in the order of `_leaves`."""
    if isinstance(like, Tensor):
        return next(leaves)
    if not isinstance(like, tuple):
        return like
    fields = [_with_leaves(field, leaves) for field in like]
    return type(like)._make(fields) if hasattr(like, "_make") else tuple(fields)
