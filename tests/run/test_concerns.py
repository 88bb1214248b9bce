"""Warnings of steps that teach little: the first of a row of them, and every twentieth."""

from __future__ import annotations

import math

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup
from gspo_megatron.run.concerns import Concerns

PROMPT = Prompt(0, "", (1,), "")
GROUPS = [RolloutGroup(PROMPT, [Rollout(0, PROMPT, [1], [0.0], False, 0, reward=0.5)])]


def said(clip_fractions: list[float], flat: float = 0.0) -> list[str]:
    concerns = Concerns()
    return [
        text
        for step, clipped in enumerate(clip_fractions, start=1)
        for text in concerns.of({"step": step, "clip_fraction": clipped, "groups/zero_variance_fraction": flat}, GROUPS)
    ]


def test_a_clip_band_that_is_too_narrow() -> None:
    assert said([0.0, 0.33, math.nan]) == []
    first, second, again = said([0.4] * 25 + [0.1, 0.5])
    assert "step 1: the clip removes the gradient of 40% of the tokens: the band is too narrow" in first
    assert "algorithm.clip_low and algorithm.clip_high" in first
    assert "step 20" in second and "as in the 19 steps before" in second
    assert "step 27: the clip removes the gradient of 50%" in again


def test_groups_without_a_gradient() -> None:
    (first, second) = said([math.nan] * 20, flat=1.0)
    assert "step 1: within each of the 1 groups all rewards are equal (in the first group 0.5), so" in first
    assert "step 20" in second
