"""What keeps exp(log-ratio) finite."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp() sees at most this (e^20 = 4.9e8), far beyond any ratio worth training on and far inside float32."""


def capped(log_ratio: Tensor) -> Tensor:
    """min(log_ratio, MAX_LOG_RATIO) with the gradient of log_ratio.

    Without the cap a runaway response gives inf, and inf * 0 = NaN for the whole batch. A plain clamp would be finite
    too, but has no gradient: the one response that most needs to be pushed back (A < 0, ratio grown out of all bounds,
    where min() takes the unclipped branch) would get no push. Here it gets the push of a response at the cap. There is
    no cap from below: exp() goes to 0 there, and its gradient with it.
    """
    return log_ratio - (log_ratio - MAX_LOG_RATIO).clamp(min=0).detach()
