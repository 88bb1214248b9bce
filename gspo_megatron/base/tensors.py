"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x, of the host or of `device`, on `device`, by a copy that nothing waits for."""
    if x.device == device or device.type == "cpu":
        return x
    return (x.pin_memory() if torch.accelerator.is_available() else x).to(device, non_blocking=True)
