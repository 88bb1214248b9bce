from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.objective import BASELINES, group_advantages
from tests.support import oracles as oracles


def loop(rewards, groups, baseline):
    equation = oracles.find(oracles.BASELINES, baseline)
    pairs = list(zip(rewards, groups, strict=True))
    by_group = {group: [r for r, g in pairs if g == group] for group in groups}
    return [equation(reward, by_group[group], list(by_group.values())) for reward, group in pairs]


@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_in_any_order_and_of_any_size(baseline):
    rewards = [1.0, 0.0, 0.25, 1.0, 2.0 if baseline == "mean_normalised" else -1.0, 0.5, 0.0]
    groups = [7, 3, 7, 3, 3, 7, 7]
    advantages_S = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), baseline)
    assert advantages_S.dtype == torch.float64
    assert advantages_S.tolist() == pytest.approx(loop(rewards, groups, baseline), rel=1e-14)
    dial = BASELINES[baseline]()
    assert torch.equal(group_advantages(torch.tensor(rewards).double(), torch.tensor(groups), dial), advantages_S)


def test_one_right_answer_of_four():
    # mean 1/4, variance (9 + 1 + 1 + 1) / 16 / 3 = 1/4
    assert group_advantages([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]).tolist() == [1.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize("baseline", [name for name, dial in BASELINES.items() if dial.scope == "group"])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.1] * 7,
        [0.1 + 0.2, 0.3, 0.3],  # equal but for the last bit
        [0.0, 0.0],
        [5.0],
    ],
)
def test_equal_rewards_teach_exactly_nothing(rewards, baseline):
    both = torch.tensor([*rewards, 1.0, 3.0], dtype=torch.float64)
    advantages_S = group_advantages(both, torch.tensor([0] * len(rewards) + [1, 1]), baseline)
    assert advantages_S[:-2].tolist() == [0.0] * len(rewards)
    if baseline != "mean_batch_std":  # whose std is of the whole batch
        assert advantages_S[-2:].tolist() == pytest.approx(loop([1.0, 3.0], [1, 1], baseline))


def test_what_equal_rewards_teach_beyond_the_group():
    """A batch is flat as a whole or not at all; a reward without a baseline is what it is."""
    one_group_flat = ([1.0, 1.0, 0.0, 3.0], [0, 0, 1, 1])
    assert group_advantages(*one_group_flat, "batch_mean_std").tolist() == pytest.approx(
        loop(*one_group_flat, "batch_mean_std"), rel=1e-6
    )
    assert group_advantages([0.1 + 0.2, 0.3], [0, 1], "batch_mean_std").tolist() == [0, 0]
    assert group_advantages([1.0, 1.0], [0, 0], "none").tolist() == [1, 1]
    assert group_advantages([1.0], [0], "none").tolist() == [1]


def test_rewards_that_are_divided_by_their_mean_are_not_negative():
    with pytest.raises(DataError, match=r"reward -1: advantage mean_normalised divides.*must be 0 or more"):
        group_advantages([1.0, -1.0], [0, 0], "mean_normalised")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match=r"reward of sequence 2 is (nan|inf)"):
        group_advantages(torch.tensor([0.0, 1.0, bad]), torch.tensor([0, 0, 1]))


def test_an_unknown_baseline_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mean_std'"):
        group_advantages([0.0, 1.0], [0, 0], "meanstd")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=12))
def test_shift_and_scale_of_the_rewards_change_nothing(pairs):
    rewards_S = torch.tensor([float(reward) for reward, _ in pairs], dtype=torch.float64)
    groups_S = torch.tensor([group for _, group in pairs])
    advantages_S = group_advantages(rewards_S, groups_S)
    assert torch.isfinite(advantages_S).all()
    torch.testing.assert_close(group_advantages(3 * rewards_S + 2, groups_S), advantages_S)
    for group in groups_S.unique():
        assert advantages_S[groups_S == group].sum().item() == pytest.approx(0, abs=1e-12)
