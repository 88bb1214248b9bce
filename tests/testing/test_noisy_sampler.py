"""A sampler with noise: what it samples with, and that nothing else has it."""

from __future__ import annotations

import torch

from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.noisy_sampler import NoisySampler
from tests.mcore.test_sampler import PROMPTS, open_sampler
from tests.mcore.test_spans import named_parameters_of


def sampled() -> None:
    policy, sampler = open_sampler(1, dtype="fp32")
    before = [parameter.clone() for _, parameter in named_parameters_of(policy)]
    ids = range(len(PROMPTS))
    exact = sampler.generate(PROMPTS, ids)
    noisy = NoisySampler(sampler, policy, router=0.5, bf16=False)
    drawn = noisy.generate(PROMPTS, ids)
    assert [r.log_probs for r in drawn] != [r.log_probs for r in exact]
    assert [r.log_probs for r in noisy.generate(PROMPTS, ids)] == [r.log_probs for r in drawn]
    rounded = NoisySampler(sampler, policy, router=0.0, bf16=True)
    assert (
        0
        < max(abs(a - b) for a, b in zip(rounded.generate(PROMPTS, ids)[1].log_probs, exact[1].log_probs, strict=False))
        < 0.1
    )
    # Evaluation is the policy's.
    assert noisy.generate(PROMPTS, ids, greedy=True) == sampler.generate(PROMPTS, ids, greedy=True)
    policy.version += 1
    assert [r.log_probs for r in noisy.generate(PROMPTS, ids)] != [r.log_probs for r in drawn]
    after = [parameter for _, parameter in named_parameters_of(policy)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_only_training_rollouts_have_noise() -> None:
    run_distributed(sampled, 1)
