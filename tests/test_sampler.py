"""Responses decoded by the training model itself, on real Megatron-Core."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_ranks import run_distributed
from small import SMALL

from gspo_megatron.checks import check_config
from gspo_megatron.config import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_lane
from gspo_megatron.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.attention import packed
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.types import Prompt, Rollout, Sequence

VOCAB_SIZE, PAD, EOS = 13, 0, 1
SETTINGS = (
    *SMALL,
    "model.max_sequence_length=24",
    "model.init_std=0.4",
    "rollout.temperature=0.8",
    "rollout.max_new_tokens=6",
)
PROMPTS = [
    Prompt(i, "", tokens, "") for i, tokens in enumerate([(3, 4, 5, 6, 7, 8, 9), (2,), (12, 11), (5, 5, 5, 5), (3, 4)])
]


def open_sampler(world_size: int, *overrides: str, dtype: str = "fp64") -> tuple[MegatronPolicy, MegatronSampler]:
    config = load_config(None, [*SETTINGS, f"precision.dtype={dtype}", *overrides])
    lane = open_lane("cpu", dtype)
    groups = Groups(check_config(config, world_size), lane.device)
    compat.mend(on_cpu=True)
    policy = MegatronPolicy(config, groups, lane, use_te=False)
    return policy, MegatronSampler(policy, eos_id=EOS, pad_id=PAD)


def generate(
    world_size: int,
    overrides: tuple[str, ...],
    prompts: list[Prompt],
    ids: list[int],
    owner: int | None = None,
    **how: Any,
) -> list[Rollout]:
    """What this rank's sampler answers; with `owner`, the other data-parallel ranks bring no prompts."""
    policy, sampler = open_sampler(world_size, *overrides)
    idle = owner is not None and policy.groups.dp_rank != owner
    return sampler.generate([] if idle else prompts, [] if idle else ids, **how)


def one_process(
    *overrides: str, prompts: list[Prompt] = PROMPTS, ids: list[int] | None = None, **how: Any
) -> list[Rollout]:
    ids = ids if ids is not None else [100 + i for i in range(len(prompts))]
    return run_distributed(_generate_alone, 1, overrides, prompts, ids, how)[0]


def _generate_alone(
    overrides: tuple[str, ...], prompts: list[Prompt], ids: list[int], how: dict[str, Any]
) -> list[Rollout]:
    return generate(1, overrides, prompts, ids, **how)


def assert_same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert replace(a, log_probs=[], reward=0.0) == replace(b, log_probs=[], reward=0.0)
        assert a.log_probs == pytest.approx(b.log_probs, rel=0, abs=1e-12)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    return one_process()


def test_a_response_ends_with_eos_or_at_the_limit(rollouts: list[Rollout]) -> None:
    assert [r.prompt for r in rollouts] == PROMPTS and [r.id for r in rollouts] == [100, 101, 102, 103, 104]
    for r in rollouts:
        assert len(r.log_probs) == len(r.tokens) <= 6 and all(x < 0 for x in r.log_probs)
        assert EOS not in r.tokens[:-1]
        assert r.truncated == (r.tokens[-1] != EOS)
        assert len(r.tokens) == 6 or not r.truncated
    assert len({len(r.tokens) for r in rollouts}) > 1, "the prompts were chosen so that some responses end early"


# --------------------------------------------------------------------------------------- the trainer's own log-probs


def sampled_and_recomputed(world_size: int, dtype: str, overrides: tuple[str, ...]) -> tuple[list[float], list[float]]:
    policy, sampler = open_sampler(world_size, *overrides, dtype=dtype)
    drawn = sampler.generate(PROMPTS * 8, range(40))
    sequences = [Sequence([*r.prompt.tokens, *r.tokens], len(r.prompt.tokens)) for r in drawn]
    micro_batches = pack(sequences, pad_id=PAD, max_tokens=64, rules=packing_rules(policy.config))
    recomputed = {}
    for m, log_probs in zip(micro_batches, policy.log_probs(micro_batches), strict=True):
        recomputed.update(zip(m.index, (part.tolist() for part in log_probs.split(m.response_lengths)), strict=True))
    return [x for r in drawn for x in r.log_probs], [x for i in range(len(drawn)) for x in recomputed[i]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5), ("bf16", 0.1)])
def test_log_probs_are_those_that_the_trainer_recomputes(dtype: str, tolerance: float) -> None:
    """One token at a time from the cache, or whole sequences packed: the same numbers, to the precision of the
    format."""
    [(sampled, recomputed)] = run_distributed(sampled_and_recomputed, 1, 1, dtype, ())
    assert len(sampled) > 100
    assert sampled == pytest.approx(recomputed, rel=0, abs=tolerance)


@pytest.mark.parametrize(
    "axes",
    [
        ("parallel.tp=2",),
        ("parallel.pp=2",),
        ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4"),
        ("parallel.ep=2", "parallel.token_dispatcher=allgather"),
    ],
)
def test_log_probs_are_those_that_the_trainer_recomputes_on_two_processes(axes: tuple[str, ...]) -> None:
    for sampled, recomputed in run_distributed(sampled_and_recomputed, 2, 2, "fp64", axes):
        assert sampled == pytest.approx(recomputed, rel=0, abs=1e-12)


def test_frequencies_follow_the_log_probs() -> None:
    """2,000 first tokens of one prompt: every count is within 5 standard deviations of what its log-prob says."""
    n = 2000
    drawn = one_process(
        "rollout.max_new_tokens=1", f"rollout.max_batch={n}", prompts=[PROMPTS[0]] * n, ids=list(range(n))
    )
    counts = Counter(r.tokens[0] for r in drawn)
    probability = {r.tokens[0]: math.exp(r.log_probs[0]) for r in drawn}
    assert len(counts) > 5
    for token, p in probability.items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)), f"token {token}"


def greedy_by_hand(prompts: list[Prompt]) -> tuple[list[Rollout], list[list[int]]]:
    """The sampler's greedy responses, and those of a loop that runs the whole sequence again for every token."""
    policy, sampler = open_sampler(1)
    [model], by_hand = policy.model, []
    with torch.no_grad():
        for prompt in prompts:
            tokens: list[int] = []
            while len(tokens) < 6 and EOS not in tokens:
                sequence = torch.tensor([*prompt.tokens, *tokens])
                n = len(sequence)
                hidden = model(sequence, packed(torch.arange(n), torch.tensor([0, n]), n))
                tokens.append(int((model.head_weight() @ hidden[-1, 0]).argmax()))
            by_hand.append(tokens)
    return sampler.generate(prompts, range(len(prompts)), greedy=True), by_hand


def test_greedy_takes_the_most_likely_token() -> None:
    [(drawn, by_hand)] = run_distributed(greedy_by_hand, 1, PROMPTS)
    assert [r.tokens for r in drawn] == by_hand


# ------------------------------------------------------------------------------------------- what must not matter


def test_batches_and_company_do_not_matter(rollouts: list[Rollout]) -> None:
    """Decoded two at a time, or in another order and beside other prompts, every rollout stays what it is."""
    assert_same(one_process("rollout.max_batch=2"), rollouts)
    # Prefill in two forwards: all prompts together have 16 tokens.
    assert_same(one_process("model.max_sequence_length=13", "train.tokens_per_micro_batch=13"), rollouts)
    order = [4, 0, 3, 1, 2]
    shuffled = one_process(prompts=[PROMPTS[i] for i in order], ids=[100 + i for i in order])
    assert_same(sorted(shuffled, key=lambda r: r.id), rollouts)


def together_and_alone(prompts: list[Prompt]) -> tuple[list[Rollout], list[Rollout]]:
    sampler = open_sampler(1)[1]
    alone = [sampler.generate([prompt], [i])[0] for i, prompt in enumerate(prompts)]
    return sampler.generate(prompts, range(len(prompts))), alone


def test_rollouts_of_a_prompt_share_its_prefill_and_nothing_else() -> None:
    [(group, alone)] = run_distributed(together_and_alone, 1, [PROMPTS[0], PROMPTS[1]] * 3)
    assert_same(group, alone)
    assert len({tuple(r.tokens) for r in group[::2]}) == 3, "the rollouts of a prompt differ"


@pytest.mark.parametrize("axes", [("parallel.ep=2",), ()])
def test_a_rank_without_prompts_takes_part(axes: tuple[str, ...], rollouts: list[Rollout]) -> None:
    ids = [r.id for r in rollouts]
    for owner in (0, 1):
        ranks = run_distributed(generate, 2, 2, ("rollout.max_batch=3", *axes), PROMPTS, ids, owner)
        assert ranks[1 - owner] == []
        assert_same(ranks[owner], rollouts)


@pytest.mark.parametrize("axes", [("parallel.tp=2",), ("parallel.pp=2",)])
def test_every_rank_of_a_replica_has_the_rollouts(axes: tuple[str, ...], rollouts: list[Rollout]) -> None:
    for ours in run_distributed(generate, 2, 2, axes, PROMPTS, [r.id for r in rollouts]):
        assert_same(ours, rollouts)


# ------------------------------------------------------------------------------------------------------ short ones


def test_one_new_token(rollouts: list[Rollout]) -> None:
    first = one_process("rollout.max_new_tokens=1")
    assert [r.tokens for r in first] == [r.tokens[:1] for r in rollouts]
    assert [r.truncated for r in first] == [r.tokens[0] != EOS for r in rollouts]


def ends_at_once() -> tuple[list[int], list[Rollout]]:
    policy, sampler = open_sampler(1)
    favourite = sampler.generate(PROMPTS[:1], [0], greedy=True)[0].tokens[0]
    return favourite, MegatronSampler(policy, eos_id=favourite, pad_id=PAD).generate(
        PROMPTS[:1] * 2, [0, 1], greedy=True
    )


def test_eos_as_the_first_token() -> None:
    [(favourite, drawn)] = run_distributed(ends_at_once, 1)
    assert [(r.tokens, r.truncated) for r in drawn] == [([favourite], False)] * 2


def test_no_prompts_at_all() -> None:
    assert one_process(prompts=[]) == []
