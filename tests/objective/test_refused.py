"""Variants and terms that are refused, and what is warned of."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, resolve_variant
from gspo_megatron.objective.advantage import GroupMean
from gspo_megatron.objective.aggregates import TokenMean
from gspo_megatron.objective.clips import PpoClip
from gspo_megatron.objective.dials import Tokens
from gspo_megatron.objective.levels import TokenLevel
from tests.objective.test_objective import ROWS
from tests.support import oracles as oracles


def test_overrides():
    row = resolve_variant("gspo", clip_low=3e-2, clip_high=None, baseline="mean")
    assert (row.clip_low, row.clip_high, row.baseline, row.name) == (3e-2, 4e-4, GroupMean(), "gspo")
    assert row.clip == PpoClip(low=3e-2, high=4e-4) and row.clip.reach == (3e-2 + 4e-4) / 2
    assert VARIANTS["gspo"].clip_low == 3e-4
    assert PolicyObjective(row, kl_coef=0.5).variant.kl_coef == 0.5
    assert resolve_variant("gspo") == VARIANTS["gspo"]


def test_the_long_form_and_dials_as_objects_are_the_same():
    short = resolve_variant("dapo", clip_low=0.1, clip_high=0.3, level="token", baseline="mean", kl_coef=0.5)
    assert resolve_variant("dapo", dials={"clip.low": 0.1, "clip.high": 0.3}, baseline="mean", kl_coef=0.5) == short
    assert resolve_variant("dapo", dials={"clip.low": 0.1}, clip_high=0.3, baseline="mean", kl_coef=0.5) == short
    objects = {"clip": PpoClip(0.1, 0.3), "level": TokenLevel(), "baseline": GroupMean()}
    assert resolve_variant("dapo", **objects, kl_coef=0.5) == short
    assert resolve_variant("dapo", clip=PpoClip(0.1, 0.2), clip_high=0.3, baseline="mean", kl_coef=0.5) == short
    assert resolve_variant("gspo", clip="ppo", clip_high=1).clip == PpoClip(3e-4, 1)  # the rest stays the row's


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("gsop", {}, "did you mean 'gspo'"),
        ("GSPO-token", {}, "did you mean 'gspo_token'"),
        ("gspo", {"clip_lo": 0.1}, "did you mean 'clip_low'"),
        ("gspo", {"name": "mine"}, "'name' is unknown"),
        ("gspo", {"level": "sequence"}, "level 'sequence' is unknown"),
        ("gspo", {"baseline": "median"}, "baseline 'median' is unknown; did you mean 'mean'"),
        (
            "gspo",
            {"aggregate": "token_mean"},
            "length of the response, as the row 'luspo' does on purpose; set aggregate='seq",
        ),
        ("dapo", {"level": "sequence_sum"}, "by the length of the response"),
        ("grpo", {"clip_low": 1.0}, r"clip_low=1.0.*set it in \[0, 1\)"),
        ("grpo", {"clip_low": -0.1}, "clip_low=-0.1"),
        ("grpo", {"clip_low": math.nan}, "clip_low=nan"),
        ("grpo", {"clip_high": -0.1}, "clip_high=-0.1"),
        ("grpo", {"clip_high": math.nan}, "clip_high=nan"),
        ("grpo", {"kl_coef": -0.1}, "kl_coef=-0.1"),
        ("grpo", {"dials": {"clip.low": 1.0}}, "clip_low=1.0"),
        ("grpo", {"dials": {"clip.lo": 0.1}}, r"clip.lo=0.1: clip 'ppo' has no parameter 'lo'; did you mean 'low'"),
        ("grpo", {"dials": {"clip.tau": 1.0}}, r"clip 'ppo' has no parameter 'tau'. It has: clip.low, clip.high"),
        ("grpo", {"dials": {"clp.low": 1.0}}, r"'clp' is not one of the dials level, clip.*did you mean 'clip.low'"),
        ("grpo", {"dials": {"low": 1.0}}, r"did you mean 'clip.low'\? Their parameters here: clip.low, clip.high"),
        ("grpo", {"dials": {"aggregate.length": 8}}, r"'sequence_mean' has no parameter 'length'. It has: none"),
        ("grpo", {"dials": {"clip.low": "0.1"}}, r"clip.low='0.1': a parameter of a dial is a number"),
        ("grpo", {"dials": {"clip.low": 0.1}, "clip_low": 0.2}, "clip_low=0.2 and clip.low=0.1 set the same parameter"),
        ("grpo", {"clip": TokenMean()}, r"clip=TokenMean\(\) of variant 'grpo' is not a clip; use one of: PpoClip"),
    ],
)
def test_refused_variants(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve_variant(name, **overrides)


def test_refused_terms():
    with pytest.raises(ConfigError, match="kl_estimator 'k4' is unknown"):
        PolicyObjective(VARIANTS["gspo"], kl_estimator="k4")
    with pytest.raises(ConfigError, match="entropy_coef=nan"):
        PolicyObjective(VARIANTS["gspo"], entropy_coef=math.nan)
    one_R, one_S, segments = torch.zeros(1), torch.ones(1), Segments.from_lengths([1])
    with pytest.raises(ConfigError, match=r"kl/ref has weight 0.01: pass ref_log_probs_T"):
        PolicyObjective(VARIANTS["gspo_sum"])(one_R, one_R, one_S, segments)
    with pytest.raises(ConfigError, match=r"entropy has weight 0.1"):
        PolicyObjective(VARIANTS["gspo"], entropy_coef=0.1)(one_R, one_R, one_S, segments)


def test_a_gspo_token_loss_may_count_tokens():
    assert resolve_variant("gspo_token", aggregate="token_mean").aggregate == TokenMean()


def test_warnings():
    for name in ROWS:
        assert VARIANTS[name].warnings() == []
    assert resolve_variant("gspo", clip_low=3e-2, clip_high=4e-2).warnings() == []
    for name in ("gspo", "gspo_token"):
        (warning,) = resolve_variant(name, clip_low=0.2, clip_high=0.2).warnings()
        assert "clip_low=0.2, clip_high=0.2" in warning and "clip_low=3e-4, clip_high=4e-4" in warning


@pytest.mark.parametrize("bound", [1 - 0.03, 1 + 0.04])
def test_near_a_bound_a_gradient_is_whole_or_none(bound: float) -> None:
    """Within an ulp or two of a bound both products of min() may round to one number, on the open side too. There
    torch.minimum would halve the gradient."""
    # The steps of a logarithm are finer than those of its ratio, which so takes every value around the bound.
    log_R = (math.log(bound) + torch.arange(-60, 61, dtype=torch.float64) * 2e-8).float().requires_grad_()
    for advantage in (sign * (0.5 + i / 64) for sign in (1, -1) for i in range(64)):
        tokens = Tokens(log_R, torch.zeros_like(log_R), torch.full_like(log_R, advantage))
        surrogate = PpoClip(low=0.03, high=0.04).surrogate(tokens, lambda x: x)
        (gradient_R,) = torch.autograd.grad(surrogate.terms_R.sum(), log_R)
        clipped_R = surrogate.clipped_low_R | surrogate.clipped_high_R
        assert len(set(surrogate.ratio_R.tolist())) >= 8
        expected_R = torch.where(clipped_R, 0.0, surrogate.ratio_R.detach() * advantage)
        assert torch.allclose(gradient_R, expected_R, rtol=1e-6, atol=0), advantage
        bounded_R = surrogate.ratio_R.clamp(1 - 0.03, 1 + 0.04)
        assert torch.equal(surrogate.terms_R, torch.minimum(surrogate.ratio_R * advantage, bounded_R * advantage))
