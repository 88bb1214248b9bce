"""A new dial is a class and a line of a table: the dials here have parameters that the package does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config
from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, Variant, group_advantages, resolve_variant
from gspo_megatron.objective.advantage import BASELINES, GroupMean
from gspo_megatron.objective.aggregates import AGGREGATES, SequenceMean, TokenMean
from gspo_megatron.objective.clips import CLIPS, PpoClip
from gspo_megatron.objective.dials import Aggregate, Baseline, Clip, Groups, Surrogate, Tokens
from gspo_megatron.objective.levels import SequenceMeanLevel, TokenLevel
from gspo_megatron.run.algorithm import Algorithm


@dataclass(frozen=True)
class FixedLength(Aggregate):
    """(1 / num_sequences) sum_y (1 / length) sum_t terms_t"""

    name = "fixed_length"
    units = ("token",)
    unit_reason = "would weight it by the length of the response"
    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length < math.inf:
            raise ConfigError(f"aggregate.length={self.length}: a sum is divided by it; set it above 0")

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return terms_R.sum(dtype=torch.float64) / (num_sequences * self.length)


@dataclass(frozen=True)
class Gate(Clip):
    """(4 / tau) sigmoid(tau (s - 1)) A"""

    name = "gate"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name, tau in self.parameters().items():
            if not 0 < tau < math.inf:
                raise ConfigError(f"clip.{name}={tau}: a temperature is finite; set it above 0")

    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        ratio_R, advantages_R = level(tokens.weighed_log_ratio_R).exp(), tokens.advantages_R
        tau_R = torch.full_like(advantages_R, self.tau_neg).masked_fill(advantages_R > 0, self.tau_pos)
        never_R = torch.zeros_like(ratio_R, dtype=torch.bool)
        return Surrogate(4 / tau_R * torch.sigmoid(tau_R * (ratio_R - 1)) * advantages_R, ratio_R, never_R, never_R)


@dataclass(frozen=True)
class Shifted(Baseline):
    name = "shifted"
    by: float = 0.0

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        return rewards_S - groups.mean(rewards_S) - self.by


ROW = Variant(
    name="mine",
    level=TokenLevel(),
    clip=Gate(),
    aggregate=FixedLength(length=16),
    baseline=Shifted(),
    kl_coef=0.0,
    source="this file",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATES, "fixed_length", FixedLength)
    monkeypatch.setitem(CLIPS, "gate", Gate)
    monkeypatch.setitem(BASELINES, "shifted", Shifted)
    monkeypatch.setitem(VARIANTS, "mine", ROW)


def test_its_parameters_are_set_by_name():
    row = resolve_variant("mine", dials={"aggregate.length": 8, "clip.tau_neg": 2.0, "baseline.by": 0.5}, kl_coef=0.1)
    expected = replace(ROW, clip=Gate(1.0, 2.0), aggregate=FixedLength(8), baseline=Shifted(0.5), kl_coef=0.1)
    assert row == expected
    assert resolve_variant("mine") == ROW
    assert row.clip.reach > 0 and row.warnings() == []  # what tools and the trainer ask every row for


def test_its_parameters_are_settings():
    overrides = ["algorithm.variant=mine", "algorithm.dials.aggregate.length=8", "algorithm.dials.clip.tau_neg=2"]
    row = Algorithm.of(load_config(None, overrides)).variant
    assert (row.aggregate, row.clip) == (FixedLength(8), Gate(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"clip_low=0.1: clip 'gate' has no parameter 'low'. It has: clip.tau_pos"):
        Algorithm.of(load_config(None, [*overrides, "algorithm.clip_low=0.1"]))


def test_a_row_that_exists_can_choose_it():
    row = resolve_variant("grpo", aggregate="fixed_length", clip="gate", dials={"aggregate.length": 8})
    assert (row.aggregate, row.clip, row.level) == (FixedLength(8), Gate(), TokenLevel())
    back = resolve_variant("mine", clip="ppo", clip_low=0.1, clip_high=0.2, aggregate="token_mean", baseline="mean")
    assert (back.clip, back.aggregate, back.baseline) == (PpoClip(0.1, 0.2), TokenMean(), GroupMean())


def test_its_loss_and_gradient_are_those_of_its_equation():
    lengths, rewards = [3, 0, 2, 1], [1.0, 5.0, 0.0, 0.5]
    row = resolve_variant("mine", dials={"aggregate.length": 8, "clip.tau_neg": 1.05, "baseline.by": 0.1})
    advantages_S = group_advantages(torch.tensor(rewards).double(), [0, 1, 0, 0], row.baseline)
    assert advantages_S.tolist() == pytest.approx([0.4, 0.0, -0.6, -0.1])
    new_R = torch.tensor([0.1, -0.2, 0.3, 0.4, -0.5, 0.6], dtype=torch.float64, requires_grad=True)
    objective = PolicyObjective(row)
    loss, metrics = objective(new_R, 0 * new_R, advantages_S, Segments.from_lengths(lengths))

    expected, owner = 0.0, [0, 0, 0, 2, 2, 3]
    for log_ratio, sequence in zip(new_R, owner, strict=True):
        advantage = advantages_S[sequence].item()
        tau = 1.0 if advantage > 0 else 1.05
        expected = expected - 4 / tau / (1 + torch.exp(-tau * (torch.exp(log_ratio) - 1))) * advantage / (3 * 8)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, new_R)[0] for x in (loss, expected)), rtol=1e-12, atol=0)
    assert metrics["clip_fraction"].total == 0 and metrics["ratio/mean"].weight == 6


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("mine", {"dials": {"aggregate.length": 0}}, r"aggregate.length=0: a sum is divided by it; set it above 0"),
        ("mine", {"dials": {"aggregate.length": math.nan}}, r"aggregate.length=nan"),
        ("mine", {"dials": {"clip.tau_neg": -1.0}}, r"clip.tau_neg=-1.0: a temperature is finite"),
        ("mine", {"dials": {"aggregate.lenght": 8}}, r"no parameter 'lenght'; did you mean 'length'.*aggregate.length"),
        ("mine", {"dials": {"length": 8}}, r"did you mean 'aggregate.length'.*: clip.tau_pos, clip.tau_neg, aggregate"),
        ("mine", {"clip_high": 0.1}, r"clip_high=0.1: clip 'gate' has no parameter 'high'. It has: clip.tau_pos, clip"),
        ("sapo", {"clip_low": 0.03}, r"has no parameter 'low'. It has: .*tau_neg; set algorithm.clip_low=null$"),
        (
            "rloo",
            {"clip_low": 0.03, "clip_high": 0.04},
            r"none; set algorithm.clip_low=null and algorithm.clip_high=null",
        ),
        ("rloo", {"dials": {"clip.low": 0.03}}, r"has no parameter 'low'. It has: none$"),
        ("mine", {"level": "sequence_mean"}, r"by the length of the response; set aggregate='sequence_mean'"),
        (
            "mine",
            {"clip": "ppo", "clip_low": 0.1},
            r"clip 'ppo' needs clip.high: no default; set algorithm.dials.clip.high$",
        ),
        ("mine", {"clip": "gat"}, r"clip 'gat' is unknown; did you mean 'gate'\? Known: ppo, .*gate"),
        ("grpo", {"aggregate": "fixed_length"}, r"aggregate 'fixed_length' needs aggregate.length: no default"),
        ("gspo", {"aggregate": "token_mean"}, r"would weight it by the length .* as the row 'luspo' does on purpose"),
        ("gspo", {"dials": {"correction.cap": 2}}, r"It has: none; algorithm.correction chooses .* it: token_tis, seq"),
        ("gspo", {"dials": {"aggregate.length": 8}}, r"aggregate 'sequence_mean' has no parameter 'length'"),
    ],
)
def test_what_is_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve_variant(name, **overrides)


def test_the_dials_of_another_row_are_named():
    [note] = resolve_variant("gspo", aggregate="sequence_sum").warnings()
    assert note == "gspo with aggregate=sequence_sum has the dials of 'luspo'; that row has its own parameters"
    assert [n for row in VARIANTS for n in resolve_variant(row).warnings()] == []
    assert resolve_variant("gspo", baseline="mean", correction="token_tis").warnings() == []


@pytest.mark.parametrize("name", ["grpo", "dapo", "maxrl", "reinforce_pp", "gmpo", "gspo_sum"])
def test_a_band_for_a_mean_that_bounds_something_else_is_a_warning(name):
    [note] = resolve_variant(name, clip_low=0.03, clip_high=0.04).warnings()
    own = VARIANTS[name]
    assert note.startswith(f"clip_low=0.03, clip_high=0.04: {name!r} has {own.clip_low:g} and {own.clip_high:g}; ")
    assert note.endswith("set algorithm.clip_low=null and algorithm.clip_high=null to take the row's")


def test_a_narrow_band_that_suits_its_level_is_none():
    for name, low, high in (
        ("gspo", 3e-5, 4e-5),
        ("gspo_token", 3e-5, 4e-5),
        ("luspo", 3e-4, 4e-4),
        ("grpo", 0.1, 0.05),
    ):
        assert resolve_variant(name, clip_low=low, clip_high=high).warnings() == []
    [high] = resolve_variant("grpo", clip_high=0.04).warnings()
    assert high.startswith("clip_high=0.04: 'grpo' has 0.2;") and "clip_low" not in high
    [of_low, of_high] = resolve_variant("cispo", clip_low=0.03, clip_high=0.04).warnings()
    assert of_low.startswith("clip_low=0.03: CISPO") and of_high.startswith("clip_high=0.04: 'cispo' has 4;")


def test_a_clip_without_bounds_has_no_clip_low():
    with pytest.raises(ConfigError, match=r"clip_low: clip 'gate' has no parameter 'low'. It has: clip.tau_pos"):
        _ = ROW.clip_low


def test_a_row_of_the_wrong_dials_is_refused():
    with pytest.raises(ConfigError, match=r"level='token' of variant 'mine' is not a level; use one of: TokenLevel"):
        replace(ROW, level="token")
    with pytest.raises(
        ConfigError, match=r"set aggregate='sequence_mean' or 'sequence_sum', or level='token' or 'sequence_token'"
    ):
        replace(ROW, level=SequenceMeanLevel())
    assert replace(ROW, level=SequenceMeanLevel(), aggregate=SequenceMean()).level.unit == "sequence"


PARAMETERS = [
    (row.name, kind, parameter)
    for row in VARIANTS.values()
    for kind, dial in row.dials.items()
    for parameter in dial.parameter_names()
]


def loss_of(variant: Variant) -> float:
    """On log-ratios far beyond any clip, both signs of advantage among them."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 5, 1, 4, 30, 50, 10, 40]
    new_R = 1.5 * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    new_R[3:8] += 1.5  # a response with A < 0 that has become likelier
    advantages_S = torch.tensor([1.0, -2.0, 0.5, -0.25] * 2)
    segments = Segments.from_lengths(lengths)
    old_R = torch.full_like(new_R, -1.0)
    return float(PolicyObjective(replace(variant, kl_coef=0.0))(new_R + old_R, old_R, advantages_S, segments).loss)


@pytest.mark.parametrize(("name", "kind", "parameter"), PARAMETERS)
def test_every_parameter_of_a_dial_acts_and_has_a_range(name: str, kind: str, parameter: str) -> None:
    """The oracles know only the values that the rows have: another value must change the loss, and NaN be refused."""
    row = VARIANTS[name]
    value = float(getattr(row.dials[kind], parameter))
    other = 1.5 if value == math.inf else value / 2 or 0.5
    changed = resolve_variant(name, dials={f"{kind}.{parameter}": other})
    assert loss_of(changed) != loss_of(row)
    with pytest.raises(ConfigError):
        resolve_variant(name, dials={f"{kind}.{parameter}": math.nan})
