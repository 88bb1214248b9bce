"""Prompts, rollout ids, and the shares of the replicas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gspo_megatron.base.batches import IGNORED, RolloutGroup, Sequence, UpdateBatch
from gspo_megatron.run.step_state import StepState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fakes import (
    Prompts,
    Replicas,
    config_of,
    trainer_of,
)
from tests.run.test_trainer import policy_of, prompts_of, run, sampler_of, without_times


def test_no_rollout_id_comes_twice_and_no_prompt_before_all_have_come() -> None:
    """3 warm-start batches of 8, 5 steps of 8 prompts: 64 in all, which is how many the source has."""
    trainer, _ = run(
        "train.steps=5", "train.warm_start_steps=3", "train.warm_start_batch=8", train_prompts=Prompts(size=64)
    )
    sampled = [
        (ids, prompts) for ids, prompts in zip(sampler_of(trainer).ids, sampler_of(trainer).prompts, strict=True)
    ]
    steps = [call for call in sampled if len(call[0]) == 32]
    ids = [i for ids, _ in steps for i in ids]
    assert len(set(ids)) == len(ids) == 5 * 32
    of_steps = Counter(p for _, prompts in steps for p in prompts)
    assert set(of_steps.values()) == {4}
    of_warm_start = Counter(prompts_of(trainer).order[k] for k in range(24))
    assert sorted([*of_steps, *of_warm_start]) == list(range(64))
    assert [b.num_sequences for b in policy_of(trainer).batches[:3]] == [8, 8, 8]


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_shares_of_the_replicas_partition_a_step(dp_size: int) -> None:
    config = config_of()
    wanted = trainer_of(config).sample(1)
    replicas = Replicas(dp_size)
    trainers = [trainer_of(config, ranks) for ranks in replicas.ranks]
    gathered = replicas.run(lambda ranks: trainers[ranks.dp_rank].sample(1))
    asked = [sampler_of(t).ids[0] for t in trainers]
    assert sorted(i for ids in asked for i in ids) == [r.id for g in wanted for r in g.rollouts]
    assert max(map(len, asked)) - min(map(len, asked)) <= config.rollout.group_size
    for groups in gathered:
        assert groups == wanted
        assert [[r.prompt for r in g.rollouts] for g in groups] == [[g.prompt] * 4 for g in groups]


@pytest.mark.parametrize(("dp_size", "tokens_per_micro_batch"), [(1, 1000), (1, 8), (2, 12), (3, 9), (5, 1000)])
def test_a_run_is_the_same_on_any_number_of_replicas_and_micro_batches(
    dp_size: int, tokens_per_micro_batch: int
) -> None:
    """With 5 replicas and 2 updates of 4 groups some micro-batches are empty; with 8 tokens each holds one or two."""
    settings = ("train.warm_start_steps=2", "train.warm_start_batch=6", "algorithm.kl_coef=0.05", "train.eval_every=1")
    alone, rows = run(*settings)
    few = f"train.tokens_per_micro_batch={tokens_per_micro_batch}"
    for trainer, same_rows in Replicas(dp_size).run(lambda ranks: run(*settings, few, ranks=ranks)):
        torch.testing.assert_close(policy_of(trainer).logits_VV, policy_of(alone).logits_VV, rtol=0, atol=1e-12)
        for row, same in zip(without_times(rows), without_times(same_rows), strict=True):
            assert same == pytest.approx(row, abs=1e-11)


def test_a_replica_without_anything_to_do_takes_part() -> None:
    settings = ("rollout.prompts_per_step=2", "rollout.group_size=2", "train.steps=1", "data.eval_size=1")
    alone, rows = run(*settings)
    for trainer, same_rows in Replicas(6).run(lambda ranks: run(*settings, ranks=ranks)):
        assert without_times(same_rows)[1] == pytest.approx(without_times(rows)[1], abs=1e-12, nan_ok=True)
        assert policy_of(trainer).calls == policy_of(alone).calls


def batches_of(trainer: Trainer, sequences: list[Sequence], number: int) -> list[UpdateBatch]:
    groups = [RolloutGroup(prompts_of(trainer).source[0], [])] * (len(sequences) // trainer.config.rollout.group_size)
    step = StepState(number, groups, sequences)
    trainer.pack(step)
    return step.batches


@pytest.mark.parametrize("dp_size", [1, 3])
def test_packing_counts_all_ranks_and_cuts_the_same_mini_batches(dp_size: int) -> None:
    config = config_of("algorithm.updates_per_rollout=4")
    alone = trainer_of(config)
    sequences = alone.advantages(alone.sample(1))
    for i, sequence in enumerate(sequences):
        sequence.advantage = i + 0.5  # to be recognised by, and not 0
    trainers = [trainer_of(config, ranks) for ranks in Replicas(dp_size).ranks]
    packed = [batches_of(trainer, sequences, 1) for trainer in trainers]

    seen: list[float] = []
    for update, reference in enumerate(batches_of(alone, sequences, 1)):
        batches = [of_rank[update] for of_rank in packed]
        members = sorted(a for b in batches for m in b.micro_batches for a in m.advantages_S.tolist())
        assert members == sorted(a for m in reference.micro_batches for a in m.advantages_S.tolist())
        groups = Counter(int(a) // 4 for a in members)
        assert len(groups) == 2 and set(groups.values()) == {4}
        lengths = [sequences[int(a)].num_trained for a in members]
        for batch in batches:
            assert (batch.num_sequences, batch.num_tokens) == (len(members), sum(lengths))
        scored = sum(int((m.targets_T != IGNORED).sum()) for b in batches for m in b.micro_batches)
        assert scored == sum(lengths)
        assert len({len(b.micro_batches) for b in batches}) == 1
        seen += members
    assert sorted(seen) == [i + 0.5 for i in range(32)]


def test_mini_batches_are_shuffled_anew_in_every_step() -> None:
    trainer = trainer_of(config_of())
    sequences = trainer.advantages(trainer.sample(1))
    for i, sequence in enumerate(sequences):
        sequence.advantage = float(i)

    def first_groups(step: int) -> set[int]:
        batch = batches_of(trainer, sequences, step)[0]
        return {int(a) // 4 for m in batch.micro_batches for a in m.advantages_S.tolist()}

    assert first_groups(1) == first_groups(1)
    assert len({frozenset(first_groups(step)) for step in range(1, 9)}) > 4
