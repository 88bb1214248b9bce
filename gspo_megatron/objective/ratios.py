"""Keeping exp(log-ratio) finite."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest argument of exp(): e^20 = 4.9e8 is far beyond any useful ratio and far within float32."""


def capped(log_ratio: Tensor) -> Tensor:
    """min(log_ratio, MAX_LOG_RATIO) with the gradient of log_ratio.

    Without the cap a runaway response gives inf, and inf * 0 = NaN for the whole batch. A plain clamp is finite too but
    has no gradient, so the response that most needs correcting (A < 0 and a huge ratio, where min() takes the unclipped
    branch) would get none. Here it gets the gradient of a response at the cap. There is no lower cap: exp() goes to 0
    there, and its gradient with it.
    """
    return log_ratio - (log_ratio - MAX_LOG_RATIO).clamp(min=0).detach()
