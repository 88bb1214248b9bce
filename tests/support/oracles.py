"""An independent version of the equations, as plain loops over sequences and tokens. Shares no code with the package.

Every function takes lists with one float64 tensor (of its tokens) or one number per sequence. A new row of VARIANTS
gets a row of ORACLES; a new baseline a row of BASELINES.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# --- levels ---


class Level(NamedTuple):
    """`unit` has one ratio of its own. `ratios(y_new, y_old)`: the ratio that each token of a response sees.
    `log_ratio(y, t)`: its log at token t, from the response's log-ratios as plain numbers. `moves(|y|)`: by how much
    the log-prob of one token moves the log-ratios of all tokens of its response, added up."""

    unit: str
    ratios: Callable[[Tensor, Tensor], list[Tensor]]
    log_ratio: Callable[[list[float], int], float]
    moves: Callable[[int], int]


def token_ratios(y_new: Tensor, y_old: Tensor) -> list[Tensor]:
    return [torch.exp(y_new[t] - y_old[t]) for t in range(len(y_new))]


def mean_ratios(y_new: Tensor, y_old: Tensor) -> list[Tensor]:
    length = len(y_new)
    return [torch.exp(sum(y_new[t] - y_old[t] for t in range(length)) / length)] * length


def sum_ratios(y_new: Tensor, y_old: Tensor) -> list[Tensor]:
    length = len(y_new)
    return [torch.exp(sum(y_new[t] - y_old[t] for t in range(length)))] * length


def stopped_ratios(y_new: Tensor, y_old: Tensor) -> list[Tensor]:
    length = len(y_new)
    product = math.prod(math.exp((y_new[t] - y_old[t]).item()) for t in range(length))
    p = [torch.exp(x) for x in y_new]
    return [product ** (1 / length) * p[t] / p[t].detach() for t in range(length)]


TOKEN = Level("token", token_ratios, lambda y, t: y[t], lambda length: 1)
# A token moves log s by 1 / |y| in each of |y| terms.
MEAN = Level("sequence", mean_ratios, lambda y, t: math.fsum(y) / len(y), lambda length: 1)
SUM = Level("sequence", sum_ratios, lambda y, t: math.fsum(y), lambda length: length)
MEAN_TOKEN = Level("token", stopped_ratios, MEAN.log_ratio, lambda length: 1)


# --- clips ---


class PpoClip(NamedTuple):
    """A clip says its term, of a ratio that is a tensor or a plain number; its slope, the term's derivative by the log
    of the ratio; which bound holds it, "low", "high" or None; and `low` and `high`, the distances from 1 around which
    tests place ratios."""

    low: float
    high: float

    def term(self, ratio, advantage):
        clipped = min(max(ratio, 1 - self.low), 1 + self.high)
        return min(ratio * advantage, clipped * advantage)

    def slope(self, ratio: float, advantage: float) -> float:
        return 0.0 if self.held(ratio, advantage) else ratio * advantage

    def held(self, ratio: float, advantage: float) -> str | None:
        if ratio > 1 + self.high and advantage > 0:
            return "high"
        return "low" if ratio < 1 - self.low and advantage < 0 else None


# --- aggregates: what the term of one token counts for, from (|y|, num_sequences, num_tokens) ---


def sequence_mean(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / length / num_sequences


def token_mean(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / num_tokens


# --- rows ---


class Oracle(NamedTuple):
    level: Level
    clip: PpoClip
    share: Callable[[int, int, int], float]


ORACLES = {
    "gspo": Oracle(MEAN, PpoClip(3e-4, 4e-4), sequence_mean),  # 2507.18071 Eq. 5
    "gspo_token": Oracle(MEAN_TOKEN, PpoClip(3e-4, 4e-4), sequence_mean),  # 2507.18071 Eq. 13
    "gspo_sum": Oracle(SUM, PpoClip(0.2, 0.2), sequence_mean),
    "grpo": Oracle(TOKEN, PpoClip(0.2, 0.2), sequence_mean),  # 2507.18071 Eq. 2
    "dapo": Oracle(TOKEN, PpoClip(0.2, 0.28), token_mean),  # 2503.14476 Eq. 8
}

BASELINES: dict[str, Callable[[float, list[float]], float]] = {
    "mean_std": lambda reward, group: (reward - statistics.mean(group)) / statistics.stdev(group),
    "mean": lambda reward, group: reward - statistics.mean(group),
}
"""(reward, all rewards of its group) -> advantage."""

Row = TypeVar("Row")


def find(table: Mapping[str, Row], name: str) -> Row:
    """The oracle `name`, or what is to be done about its absence."""
    assert name in table, (
        f"{name!r} has no oracle. A new row of VARIANTS needs one in tests/support/oracles.py, ORACLES: "
        f"{name!r}: Oracle(level, clip, share), its equation as plain loops that share no code with the package. "
        "level, clip and share of other rows can be used again; a new dial needs one of its own (Level: ratio of each "
        "token and its derivative; a class like PpoClip: term, slope, held; share: what a token counts for). A new "
        "baseline needs (reward, rewards of its group) -> advantage in BASELINES."
    )
    return table[name]


def policy_loss(name: str, new: list[Tensor], old: list[Tensor], advantages: list[float]):
    """-J, the sum over responses and their tokens."""
    oracle = find(ORACLES, name)
    num_sequences, num_tokens = sum(len(y) > 0 for y in new), sum(len(y) for y in new)
    objective = 0.0
    for y_new, y_old, advantage in zip(new, old, advantages, strict=True):
        if len(y_new) > 0:
            terms = sum(oracle.clip.term(ratio, advantage) for ratio in oracle.level.ratios(y_new, y_old))
            objective += oracle.share(len(y_new), num_sequences, num_tokens) * terms
    return -objective


def value_and_gradient(name: str, log_ratios: list[list[float]], advantages: list[float]):
    """`policy_loss`, and its gradient by the log-prob of each token, derived by hand: plain numbers, of any size. A
    ratio beyond e^20 has the value and the slope that it has there."""
    oracle = find(ORACLES, name)
    num_sequences, num_tokens = sum(map(bool, log_ratios)), sum(map(len, log_ratios))
    loss, gradient = 0.0, []
    for y, advantage in zip(log_ratios, advantages, strict=True):
        for t in range(len(y)):
            ratio = math.exp(min(oracle.level.log_ratio(y, t), 20.0))
            share = oracle.share(len(y), num_sequences, num_tokens)
            loss -= share * oracle.clip.term(ratio, advantage)
            gradient.append(-share * oracle.clip.slope(ratio, advantage) * oracle.level.moves(len(y)))
    return loss, gradient


def aggregated(name: str, per_token: list[list]):
    """A per-token quantity, averaged as the algorithm averages its terms."""
    oracle, kept = find(ORACLES, name), [values for values in per_token if len(values)]
    num_tokens = sum(len(values) for values in kept)
    return sum(oracle.share(len(values), len(kept), num_tokens) * sum(values) for values in kept)


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
