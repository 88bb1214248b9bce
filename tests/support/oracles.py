"""An independent version of the equations, as plain loops over sequences and tokens. Shares no code with the package.

Every function takes lists with one float64 tensor (of its tokens) or one number per sequence. A new row of VARIANTS
gets a row of ORACLES; a new baseline a row of BASELINES.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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


class At(NamedTuple):
    """What a clip sees at a token: the ratio of its level, the advantage, and its log-probs. Tensors or numbers."""

    ratio: Any
    advantage: float
    new: Any
    old: Any


@dataclass(frozen=True)
class Clip:
    """A clip says its term, of tensors or plain numbers; its slope, the term's derivative by the log of the ratio, or
    if it weighs log-probs by the token's own; which bound acts, "low", "high" or None; and `low` and `high`, the
    distances from 1 around which tests place ratios. `bound` acts on a token's log-ratio ahead of the level."""

    low: float
    high: float
    is_weight = False

    def bound(self, log_ratio, advantage: float):
        return log_ratio

    def term(self, at: At):
        raise NotImplementedError

    def slope(self, at: At) -> float:
        return 0.0 if self.held(at) else at.ratio * at.advantage

    def held(self, at: At) -> str | None:
        return None


@dataclass(frozen=True)
class PpoClip(Clip):
    ceiling: float = math.inf

    def term(self, at: At):
        clipped = min(max(at.ratio, 1 - self.low), 1 + self.high)
        smaller = min(at.ratio * at.advantage, clipped * at.advantage)
        return max(smaller, self.ceiling * at.advantage) if at.advantage < 0 else smaller

    def held(self, at: At) -> str | None:
        if at.advantage > 0:
            return "high" if at.ratio > 1 + self.high else None
        if at.advantage < 0:
            return "low" if at.ratio < 1 - self.low else "high" if at.ratio > self.ceiling else None
        return None


@dataclass(frozen=True)
class LogClip(Clip):
    def bound(self, log_ratio, advantage: float):
        sign = (advantage > 0) - (advantage < 0)
        clamped = min(max(log_ratio, -self.low), self.high)
        return min(sign * log_ratio, sign * clamped) * sign if sign else log_ratio

    def term(self, at: At):
        return at.ratio * at.advantage

    def held(self, at: At) -> str | None:
        if at.advantage > 0 and at.new - at.old > self.high:
            return "high"
        return "low" if at.advantage < 0 and at.new - at.old < -self.low else None


@dataclass(frozen=True)
class SoftGate(Clip):
    tau_pos: float
    tau_neg: float

    def gate(self, at: At):
        tau = self.tau_pos if at.advantage > 0 else self.tau_neg
        x = tau * (at.ratio - 1)
        return tau, 1 / (1 + (torch.exp(-x) if isinstance(x, Tensor) else math.exp(-x)))

    def term(self, at: At):
        tau, gate = self.gate(at)
        return 4 / tau * gate * at.advantage

    def slope(self, at: At) -> float:
        _, gate = self.gate(at)
        return 4 * gate * (1 - gate) * at.ratio * at.advantage


@dataclass(frozen=True)
class Weight(Clip):
    """weight * A * log pi(y_t), the weight a plain number."""

    is_weight = True

    def weight(self, at: At) -> float:
        return 1.0

    def term(self, at: At):
        return self.weight(at._replace(ratio=float(at.ratio))) * at.advantage * at.new

    def slope(self, at: At) -> float:
        return self.weight(at) * at.advantage


@dataclass(frozen=True)
class CappedWeight(Weight):
    def weight(self, at: At) -> float:
        return min(max(at.ratio, 1 - self.low), 1 + self.high)

    def held(self, at: At) -> str | None:
        return "high" if at.ratio > 1 + self.high else "low" if at.ratio < 1 - self.low else None


@dataclass(frozen=True)
class GammaWeight(Weight):
    positive: tuple[float, float]
    negative: tuple[float, float]

    def weight(self, at: At) -> float:
        k, strength = self.positive if at.advantage >= 0 else self.negative
        ratio = max(at.ratio, 1e-8)
        return math.exp(strength + k * math.log(ratio) - strength * ratio)


@dataclass(frozen=True)
class ProbabilityMask(Weight):
    divergence: Callable[[float, float], float]
    width: float
    cap: float

    def held(self, at: At) -> str | None:
        new, old = (min(math.exp(min(float(x), 0.0)), 1 - 1e-7) for x in (at.new, at.old))
        if self.divergence(new, old) <= self.width:
            return None
        # Not by the probabilities: two log-probs may differ where these have rounded to one number.
        moved = float(at.new) - float(at.old)
        return "high" if moved > 0 and at.advantage > 0 else "low" if moved < 0 and at.advantage < 0 else None

    def weight(self, at: At) -> float:
        return 0.0 if self.held(at) else min(at.ratio, self.cap)


def total_variation(new: float, old: float) -> float:
    return abs(new - old)


def binary_kl(new: float, old: float) -> float:
    if new == 0:
        return math.inf
    return old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new))


# --- aggregates: what the term of one token counts for, from (|y|, num_sequences, num_tokens) ---


def sequence_mean(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / length / num_sequences


def token_mean(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / num_tokens


def sequence_sum(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / num_sequences


def constant_length(length: int, num_sequences: int, num_tokens: int) -> float:
    return 1 / num_sequences / 3000


# --- rows ---


class Oracle(NamedTuple):
    level: Level
    clip: Clip
    share: Callable[[int, int, int], float]


ORACLES = {
    "gspo": Oracle(MEAN, PpoClip(3e-4, 4e-4), sequence_mean),  # 2507.18071 Eq. 5
    "gspo_token": Oracle(MEAN_TOKEN, PpoClip(3e-4, 4e-4), sequence_mean),  # 2507.18071 Eq. 13
    "gspo_sum": Oracle(SUM, PpoClip(0.2, 0.2), sequence_mean),
    "grpo": Oracle(TOKEN, PpoClip(0.2, 0.2), sequence_mean),  # 2507.18071 Eq. 2
    "dapo": Oracle(TOKEN, PpoClip(0.2, 0.28), token_mean),  # 2503.14476 Eq. 8
    "luspo": Oracle(MEAN, PpoClip(2e-3, 2.5e-3), sequence_sum),  # 2602.05261
    "gmpo": Oracle(MEAN, LogClip(0.4, 0.4), sequence_mean),  # 2507.20673
    "vespo": Oracle(SUM, GammaWeight(0.5, 0.5, (2, 3), (3, 2)), token_mean),  # 2602.10693
    "dr_grpo": Oracle(TOKEN, PpoClip(0.2, 0.2), constant_length),  # 2503.20783
    "cispo": Oracle(TOKEN, CappedWeight(1.0, 4.0), token_mean),  # 2506.13585 Eq. 4-5
    "sapo": Oracle(TOKEN, SoftGate(0.2, 0.2, 1.0, 1.05), sequence_mean),  # 2511.20347
    "dppo_tv": Oracle(TOKEN, ProbabilityMask(0.4, 0.4, total_variation, 0.15, 20), token_mean),  # 2602.04879
    "dppo_kl": Oracle(TOKEN, ProbabilityMask(0.4, 0.4, binary_kl, 0.05, 20), token_mean),
    "maxrl": Oracle(TOKEN, PpoClip(0.2, 0.2), sequence_mean),  # 2602.02710
    "rloo": Oracle(TOKEN, Weight(0.2, 0.2), sequence_sum),  # 2402.14740
    "reinforce_pp": Oracle(TOKEN, PpoClip(0.2, 0.2), sequence_mean),  # 2501.03262
    "reinforce_pp_baseline": Oracle(TOKEN, PpoClip(0.2, 0.2), sequence_mean),
}

Group = list[float]
BASELINES: dict[str, Callable[[float, Group, list[Group]], float]] = {
    "mean_std": lambda reward, group, batch: (reward - statistics.mean(group)) / statistics.stdev(group),
    "mean": lambda reward, group, batch: reward - statistics.mean(group),
    "leave_one_out": lambda reward, group, batch: reward - (sum(group) - reward) / (len(group) - 1),
    "mean_normalised": lambda reward, group, batch: (reward - statistics.mean(group)) / statistics.mean(group),
    "batch_mean_std": lambda reward, group, batch: (
        (reward - statistics.mean(x for g in batch for x in g)) / statistics.stdev(x for g in batch for x in g)
    ),
    "mean_batch_std": lambda reward, group, batch: (
        (reward - statistics.mean(group)) / statistics.stdev([x - statistics.mean(g) for g in batch for x in g])
    ),
    "none": lambda reward, group, batch: reward,
}
"""(reward, all rewards of its group, all groups) -> advantage."""


def truncated(power: Callable[[int], float], cap: float):
    return lambda rhos, t, *_: min(math.prod(rhos) ** power(len(rhos)) if power else rhos[t], cap)


def between(power: Callable[[int], float], floor: float, cap: float, weight: Callable[[float], float] = float):
    def kept(rhos: list[float], t: int, *_: Any) -> float:
        rho = math.prod(rhos) ** power(len(rhos)) if power else rhos[t]
        return weight(rho) if floor <= rho <= cap else 0.0

    return kept


def off_policy(rhos: list[float], t: int, moved: list[float], advantage: float) -> float:
    """`moved`: log pi - log pi_old of each token."""
    gone = -sum(math.log(rho) + x for rho, x in zip(rhos, moved, strict=True)) / len(rhos)
    return 0.0 if advantage < 0 and gone > 0.0 else 1.0


def root(length: int) -> float:
    return 1 / length


def whole(length: int) -> float:
    return 1.0


CORRECTIONS: dict[str, tuple[dict[str, float], Callable[..., float]]] = {
    "none": ({}, lambda *_: 1.0),
    "token_tis": ({"cap": 1.2}, truncated(None, 1.2)),
    "sequence_tis": ({"cap": 1.2}, truncated(root, 1.2)),
    "sequence_sum_tis": ({"cap": 1.2}, truncated(whole, 1.2)),
    "token_mis": ({"floor": 0.7, "cap": 1.4}, between(None, 0.7, 1.4)),
    "sequence_mis": ({"floor": 0.9, "cap": 1.2}, between(root, 0.9, 1.2)),
    "sequence_sum_mis": ({"floor": 0.5, "cap": 2.0}, between(whole, 0.5, 2.0)),
    "icepop": ({"floor": 0.5, "cap": 5.0}, between(None, 0.5, 5.0)),
    "geometric_mask": ({"low": 0.9, "high": 1.1}, between(root, 0.9, 1.1, lambda rho: 1.0)),
    "off_policy_mask": ({"delta": 0.0}, off_policy),
}
"""Parameters, and (ratios to the sampler of a response, which token, its log-ratios to old, advantage) -> weight."""

Row = TypeVar("Row")


def find(table: Mapping[str, Row], name: str) -> Row:
    """The oracle `name`, or what is to be done about its absence."""
    assert name in table, (
        f"{name!r} has no oracle. A new row of VARIANTS needs one in tests/support/oracles.py, ORACLES: "
        f"{name!r}: Oracle(level, clip, share), its equation as plain loops that share no code with the package. "
        "level, clip and share of other rows can be used again; a new dial needs one of its own (Level: ratio of each "
        "token and its derivative; a class like PpoClip: term, slope, held; share: what a token counts for). A new "
        "baseline needs (reward, rewards of its group, all groups) -> advantage in BASELINES."
    )
    return table[name]


def policy_loss(name: str, new: list[Tensor], old: list[Tensor], advantages: list[float]):
    """-J, the sum over responses and their tokens."""
    oracle = find(ORACLES, name)
    num_sequences, num_tokens = sum(len(y) > 0 for y in new), sum(len(y) for y in new)
    objective = 0.0
    for y_new, y_old, advantage in zip(new, old, advantages, strict=True):
        if len(y_new) > 0:
            terms = sum(oracle.clip.term(at) for at in seen(oracle, y_new, y_old, advantage))
            objective += oracle.share(len(y_new), num_sequences, num_tokens) * terms
    return -objective


def seen(oracle: Oracle, y_new: Tensor, y_old: Tensor, advantage: float) -> list[At]:
    """What the clip sees at each token of a response."""
    own = [oracle.clip.bound(y_new[t] - y_old[t], advantage) for t in range(len(y_new))]
    bounded = y_new if oracle.clip.bound is Clip.bound else torch.stack([y_old[t] + own[t] for t in range(len(own))])
    ratios = oracle.level.ratios(bounded, y_old)
    return [At(ratios[t], advantage, y_new[t], y_old[t]) for t in range(len(y_new))]


def value_and_gradient(name: str, log_ratios: list[list[float]], advantages: list[float], old: float):
    """`policy_loss`, and its gradient by the log-prob of each token, derived by hand: plain numbers, of any size. A
    ratio beyond e^20 has the value and the slope that it has there. `old` is every old log-prob."""
    oracle = find(ORACLES, name)
    num_sequences, num_tokens = sum(map(bool, log_ratios)), sum(map(len, log_ratios))
    loss, gradient = 0.0, []
    for y, advantage in zip(log_ratios, advantages, strict=True):
        bounded = [oracle.clip.bound(x, advantage) for x in y]
        moves = 1 if oracle.clip.is_weight else oracle.level.moves(len(y))
        for t in range(len(y)):
            ratio = math.exp(min(oracle.level.log_ratio(bounded, t), 20.0))
            share, at = oracle.share(len(y), num_sequences, num_tokens), At(ratio, advantage, old + y[t], old)
            loss -= share * oracle.clip.term(at)
            gradient.append(-share * oracle.clip.slope(at) * moves)
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
        if estimator.endswith("+"):
            value, pull = kl(estimator[:-1], [y_new], [y_ref])[0], kl("k2", [y_new], [y_ref])[0]
            result.append([value[t].detach() + pull[t] - pull[t].detach() for t in range(len(p))])
        elif estimator == "k1":
            result.append([torch.log(p[t] / q[t]) for t in range(len(p))])
        elif estimator == "k2":
            result.append([torch.log(p[t] / q[t]) ** 2 / 2 for t in range(len(p))])
        else:
            result.append([q[t] / p[t] - 1 - torch.log(q[t] / p[t]) for t in range(len(p))])
    return result
