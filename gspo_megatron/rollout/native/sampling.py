"""Drawing the next token: random numbers that do not depend on the rank, and the distribution to draw from.

Shapes: B rollouts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNIT = 2.0**-50
"""Of cumulative probabilities. Three bits above the last of u, so that u < 1 times the total stays below the total."""


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195): every input bit affects
    every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, rollout_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """u[b] in [0, 1), a pure function of (seed, rollout id, response position): the same on every layout and after a
    resume.

    53 random bits a number, by chained SplitMix64 mixing of the three integers.
    """
    x = np.full(rollout_ids.shape, seed, dtype=np.int64).astype(np.uint64)
    for part in (rollout_ids, positions):
        x = _mix(x * _GOLDEN + part.astype(np.uint64) + _GOLDEN)
    return (_mix(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen. top_k = 0 and top_p = 1 leave the distribution unchanged; greedy ignores the rest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


def next_tokens(logits_BV: Tensor, uniforms_B: Tensor, how: Decoding) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, log-probs [B] float64), drawn by `draw` from `distribution`."""
    return draw(distribution(logits_BV, how), uniforms_B, how)


def distribution(logits_BV: Tensor, how: Decoding) -> Tensor:
    """Natural logarithms of the probabilities with which tokens are drawn, float64: after temperature, top-k and top-p
    (renormalised), -inf where these leave a token out. Greedy: of softmax(logits / temperature)."""
    # In float64 throughout: a float32 log_softmax over 152k ids is off by 8e-5, a quarter of GSPO's clip band.
    log_probs_BV = torch.log_softmax(logits_BV.double() / how.temperature, dim=-1)
    return log_probs_BV if how.greedy else _truncate(log_probs_BV, how)


def draw(log_probs_BV: Tensor, uniforms_B: Tensor, how: Decoding) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, their log-probs [B]) by inverting the cumulative distribution at u. Greedy takes the most
    likely token, the lowest id among equals."""
    if how.greedy:
        tokens_B = log_probs_BV.argmax(dim=-1)
    else:
        cumulative_BV = _cumulative(log_probs_BV.exp())
        thresholds_B1 = (uniforms_B.double() * cumulative_BV[:, -1]).long()[:, None]
        # The first token whose cumulative mass exceeds the threshold; a token of probability 0 never does it first.
        tokens_B = (
            torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1).clamp_(max=log_probs_BV.size(1) - 1)
        )
    return tokens_B, log_probs_BV.gather(1, tokens_B[:, None]).squeeze(1)


def _cumulative(probabilities_BV: Tensor) -> Tensor:
    """Their cumulative sums in units of _UNIT, int64. Whole numbers add up to the same in any order: a GPU has no scan
    of floating-point numbers that gives the same bits twice (torch.use_deterministic_algorithms refuses it)."""
    return (probabilities_BV / _UNIT).long().cumsum(dim=-1)


def _truncate(log_probs_BV: Tensor, how: Decoding) -> Tensor:
    """Keeps the top_k most likely tokens, then the fewest whose mass reaches top_p (always one), and renormalises."""
    size = log_probs_BV.size(1)
    if not (0 < how.top_k < size) and how.top_p >= 1.0:
        return log_probs_BV
    ordered, order = log_probs_BV.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if 0 < how.top_k < size:
        keep[:, how.top_k :] = False
    kept = torch.where(keep, ordered, -torch.inf).log_softmax(dim=-1).exp()
    if how.top_p < 1.0:
        keep &= _cumulative(kept).double() * _UNIT - kept < how.top_p
    kept_in_place = torch.zeros_like(keep).scatter(1, order, keep)
    return torch.where(kept_in_place, log_probs_BV, -torch.inf).log_softmax(dim=-1)
