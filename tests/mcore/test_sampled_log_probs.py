"""Log-probs of sampled tokens, of conversations, too: those that the trainer computes for the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from gspo_megatron.base.batches import Rollout, RolloutGroup
from gspo_megatron.data.packing import pack
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.environments.environment import Turn
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.rollout.conversation import ConversationSampler
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.sampled_experts import SampledExperts
from gspo_megatron.run.stages import sequences_of
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_sampler import EOS, PAD, PROMPTS, VOCAB_SIZE, open_sampler

REPLAY = ("algorithm.routing_replay=R3",)
MASK = ("rollout.top_p=0.8", "algorithm.sampling_mask=true")


class Answers:
    """Answers a turn that has ended itself with `ba`, twice in a rollout."""

    stop = ()

    def replies(self, rollouts: list[Rollout]) -> list[Turn]:
        return [Turn("ba", done=len(r.outside) == 2) for r in rollouts]

    def close(self) -> None:
        pass


class Sampled(NamedTuple):
    """Log-probs as they were sampled and as the trainer computes them, the tokens of conversations, and by layer the
    share of tokens that the trainer sends to other experts."""

    sampled: list[float]
    recomputed: list[float]
    conversations: list[list[int]]
    changed: list[float]


def sampled_and_recomputed(world_size: int, dtype: str, overrides: tuple[str, ...]) -> Sampled:
    """Of 40 responses and 15 conversations of up to three turns; data-parallel ranks have different ones of these."""
    policy, sampler = open_sampler(world_size, *overrides, dtype=dtype)
    drawn = sampler.generate(PROMPTS * 8, range(40))
    ranks, tokenizer = policy.groups, CharacterTokenizer("abcdefghijk")
    talking = ConversationSampler(sampler, ranks, Answers(), tokenizer, None, max_turns=8, max_new_tokens=11)
    sampler.as_in_training = sampler.as_in_training._replace(max_new_tokens=11)
    mine = range(ranks.dp_rank, 15, ranks.dp_size)
    own = talking.generate([PROMPTS[i % 5] for i in mine], [100 + i for i in mine])
    conversations = sorted(ranks.gather(own), key=lambda r: r.id)
    experts = {r.id: r.routed_experts for r in [*drawn, *own]}
    # Reporters alone have the kept ids. All of them have sampled the same 40 responses here.
    drawn = [*ranks.gather(drawn)[: len(drawn)], *conversations]
    for rollout in drawn:
        rollout.routed_experts = experts.get(rollout.id)
    groups = [RolloutGroup(r.prompt, [replace(r, reward=0.0)]) for r in drawn]
    sequences = sequences_of(groups, Algorithm.of(policy.config), vocab_size=VOCAB_SIZE, dtype=torch.float64)
    for sequence in sequences:
        sequence.columns = {name: column for name, column in sequence.columns.items() if name == "support"}
    if supports := [sequence.columns["support"] for sequence in sequences if sequence.columns]:
        assert 1 < sum(len(s.ids_E) for s in supports) / sum(map(len, supports)) < 10
    if policy.config.algorithm.routing_replay == "R3":
        found = SampledExperts.of(drawn, policy.config.model.shape, ranks, needed=True)
        assert found is not None
        found.deliver([[list(range(len(drawn)))]], range(len(drawn)), sequences)
    micro_batches = pack(sequences, pad_id=PAD, max_tokens=64, rules=packing_rules(policy.config))
    recomputed = {}
    for m, log_probs in zip(micro_batches, policy.log_probs(micro_batches, as_old=True), strict=True):
        recomputed.update(zip(m.index, (part.tolist() for part in log_probs.split(m.trained_lengths)), strict=True))
    return Sampled(
        [x for r in drawn for x in r.log_probs],
        [x for i in range(len(drawn)) for x in recomputed[i]],
        [r.tokens for r in conversations],
        [metric.total / metric.weight for metric in policy.routing.metrics().values()],
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5), ("bf16", 0.1)])
def test_log_probs_are_those_that_the_trainer_recomputes(dtype: str, tolerance: float) -> None:
    """One token at a time from the cache, or whole sequences packed: the same numbers, to the precision of the
    format."""
    mask = MASK if dtype != "bf16" else ()  # in bf16 renormalising is no rounding of its own
    [found] = run_distributed(sampled_and_recomputed, 1, 1, dtype, (*mask, *REPLAY))
    sampled, recomputed, conversations, changed = found
    assert len(changed) == 2 and (dtype == "bf16" or changed == [0, 0])
    assert len(sampled) > 200
    assert [tokens.count(EOS) for tokens in conversations].count(3) > 1 and max(map(len, conversations)) == 11
    assert sampled == pytest.approx(recomputed, rel=0, abs=tolerance)


@pytest.fixture(scope="module")
def conversations() -> list[list[int]]:
    [alone] = run_distributed(sampled_and_recomputed, 1, 1, "fp64", ())
    return alone.conversations


@pytest.mark.parametrize(
    "axes",
    [
        ("parallel.tp=2",),
        ("parallel.tp=2", *MASK, *REPLAY),
        ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", *MASK, *REPLAY),
        ("parallel.pp=2", "parallel.first_stage_layers=1", "model.num_layers=3"),
        ("parallel.ep=2", "parallel.token_dispatcher=allgather"),
    ],
)
def test_log_probs_are_those_that_the_trainer_recomputes_on_two_processes(
    axes: tuple[str, ...], conversations: list[list[int]]
) -> None:
    for sampled, recomputed, found, changed in run_distributed(sampled_and_recomputed, 2, 2, "fp64", axes):
        assert found == conversations or "num_layers" in "".join(axes) or "rollout.top_p" in "".join(axes)
        assert sampled == pytest.approx(recomputed, rel=0, abs=1e-12)
        assert changed == [0] * (0 if REPLAY[0] not in axes else 4 if "model.num_layers=4" in axes else 2)
