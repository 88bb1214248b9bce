"""KL in the reward, against a loop over responses and tokens in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.checks import check_config, config_warnings
from gspo_megatron.config.loading import load_config
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.fakes import OneRank, Replicas, Shelf, TablePolicy, config_of, trainer_of
from tests.run.test_trainer import Rows, without_times

KL = ("algorithm.kl_in=reward", "algorithm.kl_coef=0.3", "optimizer.lr=0.5")


def kl_of(tokens: list[int], prompt_length: int, old_VV: Tensor, ref_VV: Tensor, estimator: str) -> float:
    """Summed over the response."""
    total = 0.0
    for t in range(prompt_length, len(tokens)):
        old, ref = (float(x[tokens[t - 1]].log_softmax(0)[tokens[t]]) for x in (old_VV, ref_VV))
        d = old - ref
        total += {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
    return total


def expected(step: StepState, old_VV: Tensor, ref_VV: Tensor, estimator: str) -> list[float]:
    """Advantages (R' - mean) / std."""
    found = []
    for group in step.groups:
        rewards = [
            r.reward - 0.3 * kl_of([*r.prompt.tokens, *r.tokens], len(r.prompt.tokens), old_VV, ref_VV, estimator)
            for r in group.rollouts
        ]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        # Four times the same response.
        found += [(r - mean) / std if std > 1e-9 else 0.0 for r in rewards]
    return found


def expected_of_tokens(step: StepState, old_VV: Tensor, ref_VV: Tensor, estimator: str) -> list[list[float]]:
    """(G_t - mean(G)) / std(G) over all tokens of the step, G_t = R - 0.3 sum_{s >= t} KL_s."""
    returns = []
    for r in step.rollouts:
        tokens, first = [*r.prompt.tokens, *r.tokens], len(r.prompt.tokens)
        returns.append(
            [r.reward - 0.3 * kl_of(tokens, t, old_VV, ref_VV, estimator) for t in range(first, len(tokens))]
        )
    flat = [x for of_one in returns for x in of_one]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / std for x in of_one] for of_one in returns]


class PartsOfSequences:
    """Two context-parallel ranks in place of two replicas."""

    dp_rank, dp_size, cp_size, is_reporter = 0, 1, 2, True

    def __init__(self, replica: Any) -> None:
        self.cp_rank, self.is_main = replica.dp_rank, replica.is_main
        self.gather, self.any_rank, self.sum_over_parts = replica.gather, replica.any_rank, replica.sum_over_parts


def scored(ranks: Ranks, estimator: str, *settings: str) -> tuple[StepState, Tensor, Tensor]:
    """A step ahead of its first update, of a policy that has left the reference."""
    config = config_of(*KL, f"algorithm.kl_estimator={estimator}", f"parallel.cp={ranks.cp_size}", *settings)
    trainer = trainer_of(config, ranks, policy := TablePolicy(ranks))
    trainer.begin()
    policy.logits_VV += torch.randn(policy.logits_VV.shape, generator=torch.Generator().manual_seed(3)).double()
    groups = trainer.sample(1)
    step = StepState(1, groups, trainer.advantages(groups))
    trainer.pack(step)
    trainer.score(step)
    assert policy.reference_VV is not None
    return step, policy.logits_VV, policy.reference_VV


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_advantages_are_of_rewards_less_the_divergence(estimator: str) -> None:
    step, old_VV, ref_VV = scored(OneRank(), estimator)
    advantages = expected(step, old_VV, ref_VV, estimator)
    assert [s.advantage for s in step.sequences] == pytest.approx(advantages, abs=1e-9)
    # Groups of equal rewards have a gradient now.
    assert all(s.advantage for s in step.sequences)
    total = sum(
        kl_of([*r.prompt.tokens, *r.tokens], len(r.prompt.tokens), old_VV, ref_VV, estimator) for r in step.rollouts
    )
    assert step.noted["kl/penalty"] == pytest.approx(0.3 * total / len(step.rollouts))
    of_replicas = Replicas(2).run(lambda ranks: scored(ranks, estimator)[0])
    of_parts = Replicas(2).run(lambda ranks: scored(PartsOfSequences(ranks), estimator)[0])
    for other in (*of_replicas, *of_parts):
        assert [s.advantage for s in other.sequences] == pytest.approx(advantages, abs=1e-9)
        for mini_batch, batch in zip(other.mini_batches, other.batches, strict=True):
            for m in batch.micro_batches:
                own = [advantages[mini_batch[i]] for i in m.index]
                assert m.advantages_S.tolist() == pytest.approx(own, abs=1e-6)


def test_loss_and_gradient() -> None:
    """One update of a step: loss = -mean_i A_i exp(0), gradient -mean_i A_i mean_t grad log pi(y_t)."""
    config = config_of(*KL, "algorithm.kl_estimator=k1", "algorithm.updates_per_rollout=1")
    trainer = trainer_of(config, OneRank(), policy := TablePolicy(OneRank()))
    trainer.begin()
    policy.logits_VV = policy.logits_VV + torch.linspace(-1, 1, policy.logits_VV.numel()).double().view_as(
        policy.logits_VV
    )
    before_VV, ref_VV = policy.logits_VV.clone(), policy.reference_VV
    assert ref_VV is not None
    row = trainer.step(1)
    step = trainer.step_state
    assert step is not None and "log-probs" in policy.calls, "old log-probs are scored ahead of the update"
    table_VV = before_VV.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rollout, advantage in zip(step.rollouts, expected(step, before_VV, ref_VV, "k1"), strict=True):
        tokens, first = [*rollout.prompt.tokens, *rollout.tokens], len(rollout.prompt.tokens)
        log_probs = [table_VV[tokens[t - 1]].log_softmax(0)[tokens[t]] for t in range(first, len(tokens))]
        mean = sum(log_probs, torch.zeros(())) / len(log_probs)
        loss = loss - advantage * (mean - mean.detach()).exp() / len(step.rollouts)
    loss.backward()
    assert table_VV.grad is not None
    torch.testing.assert_close(policy.logits_VV, before_VV - 0.5 * table_VV.grad, rtol=1e-6, atol=1e-7)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-7) and row["kl/ref"] and row["kl/penalty"]


def test_tokens_have_advantages_of_their_returns() -> None:
    """On one rank, on two replicas, and on two ranks with a part of every sequence each."""
    pp = "algorithm.variant=reinforce_pp"
    step, old_VV, ref_VV = scored(OneRank(), "k1", pp)
    wanted = expected_of_tokens(step, old_VV, ref_VV, "k1")
    assert max(len(set(of_one)) for of_one in wanted) > 1, "tokens of a response differ"
    of_replicas = Replicas(2).run(lambda ranks: scored(ranks, "k1", pp)[0])
    of_parts = Replicas(2).run(lambda ranks: scored(PartsOfSequences(ranks), "k1", pp)[0])
    for steps in ([step], of_replicas, of_parts):
        found_L = torch.full((sum(len(s) for s in step.sequences),), torch.nan, dtype=torch.float64)
        for each in steps:
            places, values = each.column_values()["return_advantages"]
            assert found_L[places].isnan().all(), "every token once"
            found_L[places] = values
            assert [s.advantage for s in each.sequences] == pytest.approx([sum(x) / len(x) for x in wanted], abs=1e-12)
        found = [
            x[s.trained] for x, s in zip(found_L.split([len(s) for s in step.sequences]), step.sequences, strict=True)
        ]
        assert torch.cat(found).tolist() == pytest.approx([x for of_one in wanted for x in of_one], abs=1e-12)
    by_response, *_ = scored(OneRank(), "k1", "algorithm.variant=gspo", "algorithm.advantage=batch_mean_std")
    assert "return_advantages" not in by_response.column_values(), "a sequence has one ratio, and one advantage"


def test_loss_and_gradient_of_returns() -> None:
    """loss = -1/n sum_i 1/|y_i| sum_t A_it w_it at w = 1."""
    config = config_of(
        *KL, "algorithm.variant=reinforce_pp", "algorithm.kl_estimator=k1", "algorithm.updates_per_rollout=1"
    )
    trainer = trainer_of(config, OneRank(), policy := TablePolicy(OneRank()))
    trainer.begin()
    size = policy.logits_VV.numel()
    policy.logits_VV = policy.logits_VV + torch.linspace(-1, 1, size).double().view_as(policy.logits_VV)
    before_VV, ref_VV = policy.logits_VV.clone(), policy.reference_VV
    assert ref_VV is not None
    row = trainer.step(1)
    step = trainer.step_state
    assert step is not None
    table_VV = before_VV.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rollout, advantages in zip(step.rollouts, expected_of_tokens(step, before_VV, ref_VV, "k1"), strict=True):
        tokens, first = [*rollout.prompt.tokens, *rollout.tokens], len(rollout.prompt.tokens)
        for t, advantage in zip(range(first, len(tokens)), advantages, strict=True):
            log_prob = table_VV[tokens[t - 1]].log_softmax(0)[tokens[t]]
            ratio = (log_prob - log_prob.detach()).exp()
            loss = loss - advantage * ratio / len(advantages) / len(step.rollouts)
    loss.backward()
    assert table_VV.grad is not None
    torch.testing.assert_close(policy.logits_VV, before_VV - 0.5 * table_VV.grad, rtol=1e-11, atol=1e-12)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-12)
    penalties = [
        0.3 * kl_of([*r.prompt.tokens, *r.tokens], len(r.prompt.tokens), before_VV, ref_VV, "k1") for r in step.rollouts
    ]
    assert row["kl/penalty"] == pytest.approx(sum(penalties) / len(penalties))


@pytest.mark.parametrize("variant", ["gspo", "reinforce_pp"])
def test_a_run_that_stops_between_two_updates_keeps_its_advantages(variant: str) -> None:
    def run(stop_at: int = 0, policy: TablePolicy | None = None, state: Any = None) -> tuple[Rows, Shelf, TablePolicy]:
        policy, rows, shelf, asked = policy or TablePolicy(OneRank()), Rows(), Shelf(), iter(range(1, 99))
        config = config_of(*KL, "algorithm.kl_estimator=k1", "checkpoint.load=latest", f"algorithm.variant={variant}")
        parts: dict[str, Any] = {"writer": rows, "checkpoints": shelf, "state": state}
        trainer_of(config, OneRank(), policy, **parts, stop=lambda: next(asked) == stop_at).run()
        return rows, shelf, policy

    whole, _, policy = run()
    table_VV = policy.logits_VV
    first, shelf, policy = run(4)
    [(position, state), *_] = shelf.saved
    assert position.updates == 1
    second, _, policy = run(policy=policy, state=state)
    assert without_times([*first.rows, *second.rows]) == without_times(whole.rows)
    assert torch.equal(policy.logits_VV, table_VV)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.kl_coef=0"], "algorithm.kl_in=reward has no effect with algorithm.kl_coef=0"),
        (["algorithm.kl_estimator=k3+"], "a reward has none: with algorithm.kl_in=reward use k3"),
        (["algorithm.drop_truncated=true"], "truncated responses are not scored"),
        (["algorithm.variant=maxrl"], "may be negative, and this baseline divides by the mean"),
    ],
)
def test_what_it_does_not_go_with(settings: list[str], message: str) -> None:
    given = ["precision.device=cpu", "model.vocab_size=13", "algorithm.kl_in=reward", "algorithm.kl_coef=0.1"]
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, [*given, *settings]), 1)
    assert message in str(caught.value)
    config = load_config(None, given)
    assert any("k1 has it" in note for note in config_warnings(config, Algorithm.of(config)))
    assert str(Algorithm.of(config)).endswith("KL k3 to the reference with weight 0.1 in the reward")
