"""Skipping or overlapping work in a step changes no result: every optimisation, on against off."""

from __future__ import annotations

import itertools
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Sequence
from gspo_megatron.base.metrics import merge
from gspo_megatron.data.packing import pack
from gspo_megatron.mcore import optimizer, schedule
from gspo_megatron.mcore.model import PolicyModel
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.objective import PolicyObjective, Segments, resolve_variant
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.commands import forked, metrics, rollouts
from gspo_megatron.testing.fakes import TablePolicy, config_of, trainer_of
from gspo_megatron.testing.local_ranks import RankError, run_distributed
from gspo_megatron.train import main
from tests.support.small import SMALL

THREE_STEPS = (
    "train.steps=3",
    "algorithm.updates_per_rollout=2",
    "algorithm.clip_low=1e-3",
    "algorithm.clip_high=1e-3",
)


def trained(*settings: str) -> tuple[Trainer, TablePolicy]:
    trainer = trainer_of(config_of(*THREE_STEPS, *settings))
    trainer.run()
    assert isinstance(trainer.policy, TablePolicy)
    return trainer, trainer.policy


def sequences_of(policy: TablePolicy) -> list[int]:
    return [sum(len(m.index) for m in batch.micro_batches) for batch in policy.batches]


def test_dead_sequences_stay_out_and_still_count() -> None:
    (_, on), (_, off) = trained(), trained("train.skip_zero_gradient=false")
    assert sum(sequences_of(on)) < sum(sequences_of(off))
    for lean, full in zip(on.batches, off.batches, strict=True):
        assert (lean.num_sequences, lean.num_tokens) == (full.num_sequences, full.num_tokens)
        assert all(advantage for m in lean.micro_batches for advantage in m.advantages_S.tolist())
    torch.testing.assert_close(on.logits_VV, off.logits_VV, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "setting", ["algorithm.kl_coef=0.01", "algorithm.entropy_coef=0.01", "model.aux_loss_coef=0.01"]
)
def test_sequences_that_another_term_uses_stay_in(setting: str) -> None:
    (_, on), (_, off) = trained(setting), trained(setting, "train.skip_zero_gradient=false")
    assert sequences_of(on) == sequences_of(off)
    assert torch.equal(on.logits_VV, off.logits_VV)


def test_a_step_without_a_live_sequence_is_a_step() -> None:
    trainer = trainer_of(config_of(*THREE_STEPS, "algorithm.updates_per_rollout=1"))
    groups = trainer.sample(1)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        rollout.reward = 1.0
    trainer.sample = lambda step: groups  # type: ignore[method-assign]
    row = trainer.step(1)
    assert isinstance(trainer.policy, TablePolicy) and sequences_of(trainer.policy) == [0]
    assert row["loss"] == row["grad_norm"] == 0
    assert row["ratio/first_update_noise"] == -math.inf, "no ratio: null in metrics.jsonl"
    assert row["groups/zero_variance_fraction"] == 1


def test_one_update_tells_its_own_old_log_probs() -> None:
    once = ("algorithm.updates_per_rollout=1",)
    (_, auto), (_, scored) = trained(*once), trained(*once, "algorithm.old_log_probs=recompute")
    assert "log-probs" not in auto.calls and scored.calls.count("log-probs") == 3
    assert torch.equal(auto.logits_VV, scored.logits_VV)


def test_several_updates_are_scored_once_ahead_of_them() -> None:
    (_, auto), (_, scored) = trained(), trained("algorithm.old_log_probs=recompute")
    assert auto.calls == scored.calls and auto.calls.count("log-probs") == 3
    of_a_step = [kind for kind, _ in itertools.groupby(call.split(",")[0] for call in auto.calls)]
    assert "log-probs update log-probs update" in " ".join(k for k in of_a_step if k in ("log-probs", "update"))
    assert torch.equal(auto.logits_VV, scored.logits_VV)


@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_in_a_micro_batch_waits_for_the_device(entropy: bool) -> None:
    """The meta device has shapes and no values: whoever asks it for one, or for a size that hangs on one, fails."""
    device = torch.device("meta")
    sequences = [
        Sequence.after_prompt([1, 2, 3, 4], 2, 1.0, {"old_log_probs": torch.zeros(2)}),
        Sequence.after_prompt([1, 2, 3], 1, -1.0, {"old_log_probs": torch.zeros(2)}),
    ]
    micro_batch = pack(sequences, pad_id=0, max_tokens=16)[0].to(device)
    hidden = torch.empty(7, 1, 8, device=device, requires_grad=True)
    weight_VH = torch.empty(13, 8, device=device, requires_grad=True)
    module: Any = SimpleNamespace(
        head_weight=lambda: weight_VH, config=SimpleNamespace(sequence_parallel=False), true_vocab_size=13
    )
    groups: Any = SimpleNamespace(tp=None, layout=SimpleNamespace(tp=1))
    scoring = schedule.Scoring(0.7, with_entropy=entropy, store_bytes=100, skip_zero_rows=False)
    log_probs_R, entropy_R = schedule.response_log_probs(module, groups, micro_batch, hidden, scoring)
    objective = PolicyObjective(resolve_variant("gspo"), entropy_coef=0.1 * entropy)
    segments = Segments.from_lengths(micro_batch.trained_lengths, index_R=micro_batch.sequence_R, device=device)
    terms = objective(
        log_probs_R, micro_batch.columns["old_log_probs"], micro_batch.advantages_S, segments, entropy_T=entropy_R
    )
    merge([terms.metrics, terms.metrics])
    terms.loss.backward()
    assert hidden.grad is not None and hidden.grad.device == device
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(terms.loss.detach())  # what waiting would have looked like


# ----------------------------------------------------------------------------------------------- on real Megatron-Core

RUN = (
    *(s for s in SMALL if "vocab_size" not in s),
    "model.init_std=0.2",
    "model.max_sequence_length=16",
    "data.task={min_length: 1, max_length: 3}",
    "data.tokenizer=characters:0123456789>",
    "data.eval_size=4",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.max_new_tokens=4",
    "algorithm.updates_per_rollout=2",
    "algorithm.clip_low=1e-3",
    "algorithm.clip_high=1e-3",
    "optimizer.lr=3e-3",
    "train.steps=3",
    "train.warm_start_steps=25",
    "train.warm_start_batch=16",
    "train.warm_start_lr=1e-2",
    "train.tokens_per_micro_batch=32",
    "logging.tensorboard=false",
    "logging.rollouts_per_step=-1",
)


def command(num_processes: int, folder: Path, *settings: str) -> Path:
    (folder / "empty.yaml").write_text("{}\n")
    for status, errors in forked(
        num_processes, ["--config", str(folder / "empty.yaml"), f"run.dir={folder / 'run'}", *RUN, *settings]
    ):
        assert status == 0, errors
    return folder / "run"


def in_folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


SAME = ("step", "policy_version", "loss", "grad_norm", "reward/mean", "tokens", "eval/accuracy")


@pytest.mark.parametrize(
    ("saving", "off"),
    [
        ("train.skip_zero_gradient=true", "train.skip_zero_gradient=false"),
        ("train.log_prob_store_gib=1", "train.log_prob_store_gib=0"),
    ],
)
def test_savings_of_an_update_change_nothing(saving: str, off: str, tmp_path: Path) -> None:
    """On a vocabulary of two shards, where rows leave the backward too."""
    on, without = (
        command(2, in_folder(tmp_path, name), "precision.dtype=fp64", "parallel.tp=2", setting)
        for name, setting in (("on", saving), ("off", off))
    )
    assert any(row["clip_fraction"] > 0 for row in metrics(without)[1:])
    assert any(not rollout["advantage"] for step in rollouts(without) for rollout in step)
    tokens = [[[rollout["tokens"] for rollout in step] for step in rollouts(run)] for run in (on, without)]
    assert tokens[0] == tokens[1]
    for a, b in zip(metrics(on), metrics(without), strict=True):
        for key in SAME:
            assert a.get(key, 0) == pytest.approx(
                b.get(key, 0), rel=1e-6 if key == "grad_norm" else 1e-11, abs=1e-13
            ), key


def overlapping_rank(arguments: list[str], bucket_size: int | None, waits: bool) -> int:
    """The command, with gradient buffers in buckets of `bucket_size`, since a model this small would be one. `waits`:
    after each update for its weights, with nothing to overlap."""
    made: list[Any] = []
    config, update = optimizer.DistributedDataParallelConfig, MegatronPolicy.update

    def updated(self: MegatronPolicy, *args: Any, **kwargs: Any) -> Any:
        found = update(self, *args, **kwargs)
        made[:] = self.chunks
        return found if not waits or self.model else None

    def scored(module: PolicyModel, *args: Any) -> Any:
        """The vocabulary matrix is read outside its module, whose hook would have waited for it."""
        for chunk in made:
            if overlaps and module is chunk.module:
                group = chunk.param_to_bucket_group[module.head_weight()]
                assert group.param_gather_dispatched and group.param_gather_handle is None
        return score(module, *args)

    overlaps, score = "optimizer.overlap=on" in arguments, schedule.response_log_probs
    schedule.response_log_probs = scored
    optimizer.DistributedDataParallelConfig = partial(config, bucket_size=bucket_size)
    MegatronPolicy.update = updated  # type: ignore[method-assign]
    status = main(arguments)
    groups = [g for chunk in made for g in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    assert {(g.ddp_config.overlap_grad_reduce, g.ddp_config.overlap_param_gather) for g in groups} == {(overlaps,) * 2}
    assert (sum(len(g.buckets) for g in groups) > 4) == (bucket_size is not None)
    return status


# gpt-oss: its experts have biases, and their layers are not called.
GPT_OSS = ("model.preset=tiny_gpt_oss", "model.num_layers=2", "parallel.ep=1")


@pytest.mark.parametrize("settings", [("parallel.ep=1",), ("parallel.ep=2",), GPT_OSS], ids=" ".join)
def test_what_overlaps_gives_the_same_bits(settings: tuple[str, ...], tmp_path: Path) -> None:
    ways = {
        "off": ("optimizer.overlap=off", None, False),
        "on": ("optimizer.overlap=on", None, False),
        # Other buckets, other shards, and so another order in which the gradient's norm is added up.
        "in many buckets": ("optimizer.overlap=on", 100, False),
        "in many buckets, with waits": ("optimizer.overlap=on", 100, True),
    }
    runs = {}
    for name, (setting, bucket_size, waits) in ways.items():
        overlapping = name != "off"
        folder = in_folder(tmp_path, name)
        (folder / "empty.yaml").write_text("{}\n")
        arguments = ["--config", str(folder / "empty.yaml"), f"run.dir={folder / 'run'}", *RUN, *settings, setting]
        try:
            statuses = run_distributed(overlapping_rank, 2, arguments, bucket_size, waits, like_torchrun=True)
        except RankError as error:
            # Once in a hundred runs, on a machine at its limit, a rank died of a segmentation fault in libtorch_cpu.
            # What gloo does with overlapping collectives is not what is tested here, and `auto` is off on the CPU.
            assert overlapping and "died without a word" in str(error)
            shutil.rmtree(folder / "run")
            statuses = run_distributed(overlapping_rank, 2, arguments, bucket_size, waits, like_torchrun=True)
        assert statuses == [0, 0]
        runs[name] = folder / "run"
    for a, b in (("off", "on"), ("in many buckets, with waits", "in many buckets")):
        assert metrics(runs[a]) == metrics(runs[b]) and rollouts(runs[a]) == rollouts(runs[b])
        weights = [
            {p.name: p.read_bytes() for p in (runs[name] / "checkpoints" / "step_000003").glob("*.safetensors")}
            for name in (a, b)
        ]
        assert weights[0] == weights[1] and weights[0]
