"""The equations once more, as plain loops over sequences and tokens. Shares no code with the package.

Every function takes lists with one float64 tensor (of its tokens) or one number per sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped_term(ratio, advantage, low, high):
    clipped = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, clipped * advantage)


def ratios(name: str, new: list[Tensor], old: list[Tensor]) -> list[list[Tensor]]:
    """The ratio that each token sees, per sequence."""
    result = []
    for y_new, y_old in zip(new, old, strict=True):
        length = len(y_new)
        if length == 0:
            result.append([])
            continue
        log_ratio = [y_new[t] - y_old[t] for t in range(length)]
        if name == "gspo":
            result.append([torch.exp(sum(log_ratio) / length)] * length)
        elif name == "gspo_sum":
            result.append([torch.exp(sum(log_ratio))] * length)
        elif name == "gspo_token":
            product = math.prod(math.exp(x.item()) for x in log_ratio)
            p = [torch.exp(x) for x in y_new]
            result.append([product ** (1 / length) * p[t] / p[t].detach() for t in range(length)])
        else:
            result.append([torch.exp(x) for x in log_ratio])
    return result


def policy_loss(name: str, new, old, advantages, low: float, high: float):
    """-J of 2507.18071 Eq. 5 (gspo, gspo_sum), Eq. 13 (gspo_token), Eq. 2 (grpo) and 2503.14476 Eq. 8 (dapo)."""
    objective, num_sequences, num_tokens = 0.0, 0, 0
    for ratio, advantage in zip(ratios(name, new, old), advantages, strict=True):
        length = len(ratio)
        if length == 0:
            continue
        num_sequences += 1
        num_tokens += length
        if name in ("gspo", "gspo_sum"):
            objective += clipped_term(ratio[0], advantage, low, high)
        elif name in ("gspo_token", "grpo"):
            objective += sum(clipped_term(w, advantage, low, high) for w in ratio) / length
        else:
            objective += sum(clipped_term(w, advantage, low, high) for w in ratio)
    return -objective / (num_tokens if name == "dapo" else num_sequences)


def value_and_gradient(name: str, log_ratios: list[list[float]], advantages: list[float], low: float, high: float):
    """`policy_loss`, and its gradient by the log-prob of each token, derived by hand: plain numbers, of any size. A
    ratio beyond e^20 has the value and the slope that it has there."""
    num_sequences, num_tokens = sum(map(bool, log_ratios)), sum(map(len, log_ratios))
    loss, gradient = 0.0, []
    for y, advantage in zip(log_ratios, advantages, strict=True):
        for x in y:
            total = math.fsum(y)
            log_s = {"gspo": total / len(y), "gspo_token": total / len(y), "gspo_sum": total}.get(name, x)
            s = math.exp(min(log_s, 20.0))
            held = s > 1 + high if advantage > 0 else s < 1 - low and advantage < 0
            share = 1 / num_tokens if name == "dapo" else 1 / len(y) / num_sequences
            loss -= share * clipped_term(s, advantage, low, high)
            # A token moves log s by 1 / |y| in each of |y| terms, in gspo_sum by 1, in the others by 1 in its own term.
            gradient.append(0.0 if held else -share * s * advantage * (len(y) if name == "gspo_sum" else 1))
    return loss, gradient


def aggregated(name: str, per_token: list[list]):
    """A per-token quantity, averaged as the algorithm averages its terms."""
    kept = [values for values in per_token if len(values)]
    if name == "dapo":
        return sum(sum(values) for values in kept) / sum(len(values) for values in kept)
    return sum(sum(values) / len(values) for values in kept) / len(kept)


def kl(estimator: str, new: list[Tensor], ref: list[Tensor]) -> list[list[Tensor]]:
    result = []
    for y_new, y_ref in zip(new, ref, strict=True):
        p, q = torch.exp(y_new), torch.exp(y_ref)
        if estimator == "k1":
            result.append([torch.log(p[t] / q[t]) for t in range(len(p))])
        elif estimator == "k2":
            result.append([torch.log(p[t] / q[t]) ** 2 / 2 for t in range(len(p))])
        else:
            result.append([q[t] / p[t] - 1 - torch.log(q[t] / p[t]) for t in range(len(p))])
    return result
