"""Rows against the loss functions of TRL 1.16 and verl 0.9.1, value and gradient (`make test-peers`).

Where a peer differs from the paper by a fault or a choice of its own, the test says which, and compares what is left.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, group_advantages, resolve_variant
from gspo_megatron.objective.kl import KL_ESTIMATORS
from tests.support import peers
from tests.support.peers import ActorConfig, Padded, padded

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: make venv-trl")
needs_verl = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed: make venv-trl")

LENGTHS = [5, 1, 7, 3, 4, 2]  # none empty: TRL averages over empty responses too
SPREAD = {"gspo": 4e-4, "gspo_token": 4e-4, "luspo": 3e-3}
"""Of the log-ratios, so that some ratios lie inside and some outside the band."""


def batch(name: str) -> tuple[torch.Tensor, ...]:
    """new, old, ref, sampler log-probs [R] and advantages [S]."""
    draw = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    size, spread = sum(LENGTHS), SPREAD.get(name, 0.4)
    old_R = -noise(size).abs() - 0.2
    new_R = (old_R + spread * (noise(size) + noise(6).repeat_interleave(torch.tensor(LENGTHS)))).requires_grad_()
    sampler_R = old_R + 0.5 * noise(size)
    return new_R, old_R, old_R + 0.3 * noise(size), sampler_R, torch.tensor([1.3, -0.9, 0.7, -1.1, 0.5, -0.4]).double()


def as_padded(new_R, old_R, ref_R, sampler_R, advantages_S) -> Padded:
    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.float64), LENGTHS)
    return Padded(*(padded(x_R, LENGTHS) for x_R in (new_R, old_R, ref_R, sampler_R)), mask, advantages_S)


def same(ours: torch.Tensor, theirs: torch.Tensor, new_R: torch.Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)
    gradients = [torch.autograd.grad(loss, new_R, retain_graph=True)[0] for loss in (ours, theirs)]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-14)


def loss_of(variant, new_R, old_R, ref_R, sampler_R, advantages_S, **settings) -> torch.Tensor:
    objective = PolicyObjective(variant, **settings)
    return objective(new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS), ref_log_probs_T=ref_R).loss


# --- TRL ---

SEQUENCE = {"importance_sampling_level": "sequence"}
OF_TRL = {
    "gspo": ("grpo", {**SEQUENCE, "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "luspo": ("luspo", {**SEQUENCE, "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}),
    "grpo": ("grpo", {}),
    "dapo": ("dapo", {"epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {}),
    # TRL's epsilon_high of CISPO is the cap itself, not its distance from 1.
    "cispo": ("cispo", {"epsilon_high": 5.0}),
    "sapo": ("sapo", {}),
    "vespo": ("vespo", {}),
}


@needs_trl
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", OF_TRL)
def test_rows_of_trl(name: str, beta: float) -> None:
    """TRL's temperatures of SAPO are float32, whatever the log-probs are: torch.where() of two Python numbers."""
    given = batch(name)
    loss_type, settings = OF_TRL[name]
    ours = loss_of(VARIANTS[name], *given, kl_coef=beta)
    same(
        ours,
        peers.trl_loss(as_padded(*given), loss_type, beta=beta, **settings),
        given[0],
        1e-6 if name == "sapo" else 1e-11,
    )


@needs_trl
def test_the_upper_bound_of_trl_is_a_dual_clip_within_its_reach() -> None:
    """TRL's `delta` caps the ratio of A > 0 as well, which changes nothing: the clip has acted before."""
    given = batch("grpo")
    ours = loss_of(resolve_variant("grpo", dials={"clip.ceiling": 1.5}), *given)
    same(ours, peers.trl_loss(as_padded(*given), "grpo", delta=1.5), given[0])


@needs_trl
def test_gmpo_of_trl() -> None:
    def trainer() -> type:
        from trl.experimental.gmpo import GMPOTrainer

        return GMPOTrainer

    given = batch("gmpo")
    settings = {"epsilon_low": 0.4, "epsilon_high": 0.4}
    theirs = peers.trl_loss(as_padded(*given), "grpo", trainer=trainer, **settings)
    same(loss_of(VARIANTS["gmpo"], *given), theirs, given[0])


@needs_trl
def test_rloo_of_trl() -> None:
    """TRL clips the ratio of whole responses; at the old policy its gradient is that of the paper, without a ratio."""

    def trainer() -> type:
        from trl import RLOOTrainer

        return RLOOTrainer

    given = batch("grpo")
    clipped = resolve_variant(
        "rloo", level="sequence_sum", clip="ppo", clip_low=0.2, clip_high=0.2, aggregate="sequence_mean"
    )
    same(loss_of(clipped, *given), peers.trl_loss(as_padded(*given), "", trainer=trainer), given[0])

    new_R, old_R = given[0], given[0].detach()
    ours = loss_of(VARIANTS["rloo"], new_R, old_R, *given[2:])
    theirs = peers.trl_loss(as_padded(new_R, old_R, *given[2:]), "", trainer=trainer)
    gradients = [torch.autograd.grad(loss, new_R, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


# --- verl ---

MEANS = {"sequence_mean": "seq-mean-token-mean", "token_mean": "token-mean", "sequence_sum": "seq-mean-token-sum"}
OF_VERL = {
    # verl clamps log s_t to 10 at most, with a gradient of 0 there; here nothing is near it.
    "gspo_token": ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "grpo": ("vanilla", {"clip_ratio_c": 1e9}),  # verl's dual clip, 3 by default, cannot be switched off
    "dapo": ("vanilla", {"clip_ratio_high": 0.28, "clip_ratio_c": 1e9}),
    "maxrl": ("vanilla", {"clip_ratio_c": 1e9}),
    "gmpo": ("geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
    "cispo": ("cispo", {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "dppo_tv": ("dppo_tv", {"clip_ratio": 0.15, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 20.0}),
    "dppo_kl": ("dppo_kl", {"clip_ratio": 0.05, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 20.0}),
}


def verl_loss(name: str, given, **changed) -> torch.Tensor:
    loss, settings = OF_VERL[name]
    config = ActorConfig(**{"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, **settings, **changed})
    them = as_padded(*given)
    # verl expects advantages for every token, and repeats them over the mask itself.
    advantages = them.advantages[:, None] * them.mask
    mode = MEANS[VARIANTS[name].aggregate.name]
    return peers.verl().losses[loss](them.old, them.new, advantages, them.mask, mode, config)[0]


@needs_verl
@pytest.mark.parametrize("name", OF_VERL)
def test_rows_of_verl(name: str) -> None:
    """GMPO and sequence means divide by |y| + 1e-8 in verl, which shows in the eighth digit."""
    given = batch(name)
    same(loss_of(VARIANTS[name], *given), verl_loss(name, given), given[0], rtol=2e-7)


@needs_verl
def test_the_dual_clip_of_verl() -> None:
    given = batch("grpo")
    ours = loss_of(resolve_variant("grpo", dials={"clip.ceiling": 1.5}), *given)
    same(ours, verl_loss("grpo", given, clip_ratio_c=1.5), given[0], rtol=2e-7)


@needs_verl
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimates_of_verl(estimator: str) -> None:
    """verl's k3+ has the value of k3 and the gradient of k2, as ours."""
    new_R, _, ref_R, _, _ = batch("grpo")
    theirs = peers.verl().kl_penalty(new_R, ref_R, estimator).sum()
    same(KL_ESTIMATORS[estimator](new_R, ref_R).sum(), theirs, new_R)


REWARDS = [1.0, 0.0, 0.25, 0.5, 2.0, 0.0]
GROUPS = [0, 0, 0, 1, 1, 1]


def verl_advantages(name: str, length: int = 1, **settings) -> list[float]:
    scores = torch.zeros(6, length, dtype=torch.float64)
    scores[:, -1] = torch.tensor(REWARDS)
    mask = torch.ones_like(scores)
    advantages, _ = peers.verl().advantages[name](scores, mask, index=np.array(GROUPS), **settings)
    return advantages[:, 0].tolist()


@needs_verl
def test_advantages_of_verl() -> None:
    """verl adds 1e-6 to the deviation of a group, and whitens a batch over tokens, where a long response counts more
    often; with responses of one length that is ours. It adds 1e-8 to the variance, which shows in the eighth digit."""
    ours = {name: group_advantages(REWARDS, GROUPS, name).tolist() for name in ("mean_std", "mean", "leave_one_out")}
    assert verl_advantages("grpo") == pytest.approx(ours["mean_std"], rel=1e-5)
    assert verl_advantages("grpo", norm_adv_by_std_in_grpo=False) == pytest.approx(ours["mean"], rel=1e-7)
    assert verl_advantages("rloo") == pytest.approx(ours["leave_one_out"], rel=1e-6, abs=1e-7)
    gamma = ActorConfig(gamma=1.0)
    for theirs, name in (("reinforce_plus_plus", "batch_mean_std"), ("reinforce_plus_plus_baseline", "mean_batch_std")):
        expected = group_advantages(torch.tensor(REWARDS).double(), GROUPS, name).tolist()
        assert verl_advantages(theirs, config=gamma) == pytest.approx(expected, rel=1e-6, abs=1e-6)
