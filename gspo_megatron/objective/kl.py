"""Estimates of KL(pi || ref) from tokens that pi drew (joschu.net/blog/kl-approx.html).

R  response tokens of all sequences
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gspo_megatron.objective.ratios import capped

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """log pi - log ref. Unbiased, of either sign, noisy.

    As a loss its gradient is that of log pi, whose mean over pi is zero: it does not pull towards ref. For monitoring
    only.
    """
    return log_probs_R - ref_log_probs_R


def k2(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2. Never negative, slightly biased.

    As a loss its gradient, (log pi - log ref) grad log pi, has the gradient of KL(pi || ref) as its mean over pi.
    """
    return (log_probs_R - ref_log_probs_R).square() / 2


def k3(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi). Unbiased, never negative                                    (2402.03300 Eq. 4).

    As a loss its gradient, (1 - ref / pi) grad log pi, has the gradient of KL(ref || pi), the other direction, as its
    mean over pi. A token with ref / pi above e^20 is pulled like one at e^20 (see `capped`).
    """
    log_ratio_R = ref_log_probs_R - log_probs_R
    # exp(x) - 1 in float32 would lose x^2 / 2, the whole of the result, where x is small.
    return capped(log_ratio_R).expm1() - log_ratio_R


def k1_plus(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """The value of k1, the gradient of k2: as a loss it pulls towards ref, as KL(pi || ref) does."""
    return _with_gradient_of_k2(k1, log_probs_R, ref_log_probs_R)


def k3_plus(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """The value of k3, the gradient of k2."""
    return _with_gradient_of_k2(k3, log_probs_R, ref_log_probs_R)


def _with_gradient_of_k2(estimator: Estimator, log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    pull_R = k2(log_probs_R, ref_log_probs_R)
    return estimator(log_probs_R.detach(), ref_log_probs_R) + (pull_R - pull_R.detach())


KL_ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3, "k1+": k1_plus, "k3+": k3_plus}
