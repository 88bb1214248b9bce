"""Warnings of steps that teach little: the first of a row of them, and every twentieth."""

from __future__ import annotations

import math
from typing import Any

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.concerns import Concerns
from gspo_megatron.testing.fakes import Notebook, OneRank, TablePolicy, TableSampler, config_of, trainer_of

PROMPT = Prompt(0, "", (1,), "")
GROUPS = [RolloutGroup(PROMPT, [Rollout(0, PROMPT, [1], [0.0], False, 0, reward=0.5)])]


def said(clip_fractions: list[float], flat: float = 0.0) -> list[str]:
    concerns = Concerns(Algorithm.of(config_of()))
    rest = {"groups/zero_variance_fraction": flat, "ratio/first_update_noise": -math.inf}
    return [
        text
        for step, clipped in enumerate(clip_fractions, start=1)
        for text in concerns.of({"step": step, "clip_fraction": clipped, **rest}, GROUPS)
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
    assert "step 1: within each group all rewards are equal (in the first of 1: 0.5), so" in first
    assert "step 20" in second


class RoundingSampler(TableSampler):
    """Its log-probs are off by `error`, as those of a sampler that rounds differently."""

    error = 0.02

    def generate(self, *args: Any, **kwargs: Any) -> list[Rollout]:
        rollouts = super().generate(*args, **kwargs)
        for rollout in rollouts:
            rollout.log_probs = [log_prob - self.error for log_prob in rollout.log_probs]
        return rollouts


def test_the_noise_of_the_samplers_log_probs_is_compared_with_the_clip_band() -> None:
    def warned(sampler: type[TableSampler], *overrides: str) -> list[str]:
        config, notebook = config_of("algorithm.old_log_probs=rollout", *overrides), Notebook()
        policy = TablePolicy(OneRank())
        trainer_of(config, OneRank(), policy, sampler=sampler(policy, config), console=notebook).run()
        return [text for text in notebook.warnings if "ratios differ" in text]

    [text] = warned(RoundingSampler, "algorithm.clip_low=3e-4", "algorithm.clip_high=4e-4")
    assert "step 1: before its first update, ratios differ from 1 by up to 2.0e-02, 58 times the clip range" in text
    assert "(low 0.0003, high 0.0004" in text and "old_log_probs=rollout takes the old log-probs from" in text
    assert warned(RoundingSampler, "algorithm.clip_low=0.2", "algorithm.clip_high=0.2") == []
    assert warned(TableSampler, "algorithm.clip_low=3e-4", "algorithm.clip_high=4e-4") == []
    assert warned(RoundingSampler, "algorithm.old_log_probs=auto", "algorithm.clip_low=3e-4") == []
