"""Guards: what stops a run or skips an update. Wrong numbers are put into the table policy of fakes.py on one replica
only: all replicas have to make the same decision. Real gradients and weights: tests/mcore/test_replica_check.py."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Prompt, Rollout, UpdateBatch
from gspo_megatron.base.errors import ConfigError, DataError, GuardError
from gspo_megatron.base.metrics import LossTerms, Metric
from gspo_megatron.base.protocols import Accept, Loss, Ranks, SavedState
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.guards import FEWEST, MOST_SKIPPED, WINDOW, Guards
from gspo_megatron.run.state import GuardState, RunState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fakes import (
    OneRank,
    Prompts,
    Replicas,
    Shelf,
    TablePolicy,
    TableSampler,
    config_of,
    trainer_of,
)

Change = Callable[[LossTerms, Tensor], LossTerms]


def bad_loss(terms: LossTerms, log_probs_R: Tensor) -> LossTerms:
    return terms._replace(loss=terms.loss * math.nan)


def bad_gradient(terms: LossTerms, log_probs_R: Tensor) -> LossTerms:
    """Adds 0, whose gradient is infinity times 0."""
    return terms._replace(loss=terms.loss + (log_probs_R * 0).sum().sqrt())


def large_gradient(terms: LossTerms, log_probs_R: Tensor) -> LossTerms:
    return terms._replace(loss=terms.loss * 1e6)


class Watched(TablePolicy):
    """Changes the loss of its updates number `when`, on the last replica. `tables`: the weights around each update."""

    def __init__(self, ranks: Ranks, when: Sequence[int] = (), change: Change = bad_loss) -> None:
        super().__init__(ranks)
        self.when, self.change = when, change
        self.tables: list[Tensor] = [self.logits_VV]

    def update(self, batch: UpdateBatch, loss: Loss, *, lr: float, accept: Accept | None = None) -> dict[str, Metric]:
        def changed(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
            return self.change(loss(log_probs_R, entropy_R, m, batch), log_probs_R)

        here = self.version in self.when and self.ranks.dp_rank == self.ranks.dp_size - 1
        metrics = super().update(batch, changed if here else loss, lr=lr, accept=accept)
        self.tables.append(self.logits_VV)
        return metrics


def started(config: Config, ranks: Ranks, policy: TablePolicy, state: RunState | None = None, **parts: Any) -> Trainer:
    """A trainer whose main process writes to config.run.dir."""
    first_step = state.position.steps + 1 if state else 0
    writer = RunWriter(Path(config.run.dir), first_step=first_step) if ranks.is_main else None
    return trainer_of(config, ranks, policy, writer=writer, state=state, **parts)


def rows_of_run(run: Path) -> list[dict[str, Any]]:
    return read(run / "metrics.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a loss or a gradient that is not finite ---


@pytest.mark.parametrize(("change", "what"), [(bad_loss, "the loss"), (bad_gradient, "the gradient")])
def test_an_update_that_is_not_finite_stops_all_replicas_before_it(change: Change, what: str, tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}")

    def stopped(ranks: Ranks) -> tuple[str, Watched]:
        policy = Watched(ranks, [3], change)
        with pytest.raises(GuardError) as caught:
            started(config, ranks, policy).run()
        return str(caught.value), policy

    for message, policy in Replicas(2).run(stopped):
        path = tmp_path / "guards" / "step_000002_update_002.jsonl"
        assert message.startswith(f"step 2, update 2: {what} is not finite;") and str(path) in message
        assert message.endswith("guards.on_nonfinite=skip those without a number")
        assert torch.equal(policy.tables[-1], policy.tables[-2]) and policy.logits_VV.isfinite().all()
    kept = read(path)
    # Of 4 groups of 4; one of them has equal rewards, so it stayed out of the update.
    assert len(kept) == 12 and len({row["prompt_id"] for row in kept}) == 3
    for row in kept:
        assert row["advantage"] != 0 and row["reward"] in (0, 1)
        assert len(row["old_log_probs"]) == len(row["tokens"]) and row["ref_log_probs"] is None
        assert row["old_log_probs"] == pytest.approx(row["log_probs"], abs=1e-12)
    assert [row["step"] for row in rows_of_run(tmp_path)] == [0, 1]


def no_gradient(terms: LossTerms, log_probs_R: Tensor) -> LossTerms:
    return terms._replace(loss=terms.loss + (terms.loss.detach() - terms.loss))


def test_a_gradient_of_0_where_advantages_are_not(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "guards.on_nonfinite=skip")
    with pytest.raises(GuardError, match=r"^step 2, update 1: the gradient is 0 although advantages are not"):
        started(config, OneRank(), Watched(OneRank(), [2], no_gradient)).run()


@pytest.mark.parametrize("change", [bad_loss, bad_gradient])
def test_an_update_that_is_not_finite_is_left_out(change: Change, tmp_path: Path) -> None:
    """The weights stay, bit for bit; the version counts; the row and a warning say so."""
    config = config_of(f"run.dir={tmp_path}", "guards.on_nonfinite=skip")

    def run(ranks: Ranks) -> tuple[Watched, list[str]]:
        policy = Watched(ranks, [2], change)
        trainer = started(config, ranks, policy)
        trainer.run()
        return policy, trainer.parts.console.warnings

    for policy, warnings in Replicas(2).run(run):
        same = [torch.equal(a, b) for a, b in itertools.pairwise(policy.tables)]
        assert same == [False, False, True, False, False, False] and policy.version == 6
        assert len(warnings) == 1 and warnings[0].startswith("step 2, update 1 is skipped: ")
    rows = rows_of_run(tmp_path)
    assert [row.get("guards/skipped_updates") for row in rows] == [None, 0, 1, 0]
    assert rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert (tmp_path / "guards" / "step_000002_update_001.jsonl").exists()


def test_the_warm_start_is_watched_too(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "train.warm_start_steps=3", "train.warm_start_batch=5")
    with pytest.raises(GuardError, match=r"^warm start, update 2: the loss is not finite"):
        started(config, OneRank(), Watched(OneRank(), [1])).run()
    kept = read(tmp_path / "guards" / "warm_start_000002.jsonl")
    assert len(kept) == 5 and all(row["solution"] for row in kept)


def test_a_run_that_only_skips_ends(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "guards.on_nonfinite=skip", "train.steps=20")
    policy = Watched(OneRank(), range(3, 100))
    with pytest.raises(GuardError, match=f"^step 12, update 1: .* {MOST_SKIPPED} updates in a row were skipped"):
        started(config, OneRank(), policy).run()
    assert policy.version == 3 + MOST_SKIPPED


def test_what_an_earlier_run_kept_does_not_pass_for_this_ones(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "logging.tensorboard=false")
    RunWriter.of_run(config, first_step=0, fresh=True).offenders("step_000001_log_probs", [{"id": math.nan}])
    RunWriter.of_run(config, first_step=0, fresh=True)
    assert not (tmp_path / "guards").exists()
    assert (tmp_path / "guards.replaced_1" / "step_000001_log_probs.jsonl").read_text() == '{"id": NaN}\n'


class Waiting(Shelf):
    """A save that is still being written when the guard stops the run."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = False

    def save(self, position: Any, state: SavedState, *, wait: bool, best: Any = None) -> None:
        super().save(position, state, wait=wait, best=best)
        self.writing = True

    def finish(self, *, wait: bool = True) -> None:
        self.writing = self.writing and not wait


def test_the_checkpoint_under_way_is_finished(tmp_path: Path) -> None:
    shelf = Waiting()
    with pytest.raises(GuardError):
        started(
            config_of(f"run.dir={tmp_path}", "checkpoint.save_every=1"),
            OneRank(),
            Watched(OneRank(), [3]),
            checkpoints=shelf,
        ).run()
    assert [position for position, _ in shelf.saved] == [(0, 1, 0)] and not shelf.writing


# --- spikes ---


def guards(*settings: str, state: GuardState | None = None) -> Guards:
    return Guards(config_of("guards.grad_norm_spike=10", *settings), OneRank(), None, print, state)


def accepted(watch: Guards, norms: Sequence[float]) -> list[bool]:
    return [watch.accept(norm, True) for norm in norms]


def test_a_spike_is_held_against_the_median_of_updates_that_were_made() -> None:
    watch = guards()
    assert accepted(watch, [1, 900, 1, 1]) == [True] * 4, "too few to tell"
    assert accepted(watch, [2, 11, 19.9, 10.1]) == [True, False, False, False], "median of 1, 900, 1, 1, 2"
    assert watch.objection is not None and watch.objection.action == "skip"
    assert "10.1 is 10.1 times 1, the median of the last 5 updates" in watch.objection.reason
    assert accepted(watch, [10, 0, 0, 0, 9]) == [True] * 5
    assert watch.grad_norms == [1, 900, 1, 1, 2, 10, 9], "neither spikes nor updates without a gradient"
    accepted(watch, [5.0] * WINDOW)
    assert watch.grad_norms == [5.0] * WINDOW and accepted(watch, [50.5, 50]) == [False, True]


def test_no_rule_no_spike() -> None:
    assert all(accepted(guards("guards.grad_norm_spike=0"), [1.0] * 20 + [1e9]))


def test_what_is_usual_starts_anew_with_the_first_step() -> None:
    watch = guards()
    accepted(watch, [1.0] * WINDOW)
    watch.begin()
    assert accepted(watch, [100.0] * FEWEST + [1001.0]) == [True] * FEWEST + [False]


SPIKES = ("train.steps=5", "guards.grad_norm_spike=100", "guards.on_nonfinite=skip")


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_spike_is_left_out_and_remembered_by_a_run_that_continues(dp_size: int, tmp_path: Path) -> None:
    """Stopped at each of its safe points in turn, the run refuses the same updates."""

    def run(ranks: Ranks, stop_at: int, folder: Path) -> Watched:
        config = config_of(*SPIKES, f"run.dir={folder}")
        policy, state = Watched(ranks, [6, 8], large_gradient), None
        for n in filter(None, [stop_at, -1]):
            asked, shelf = itertools.count(1), Shelf(ranks)
            trainer = started(
                config, ranks, policy, checkpoints=shelf, state=state, stop=lambda asked=asked, n=n: next(asked) == n
            )
            if not trainer.run():
                state = shelf.saved[-1][1]
        return policy

    for stop_at in range(10):
        folder = tmp_path / str(stop_at)
        for policy in Replicas(dp_size).run(lambda ranks, s=stop_at, f=folder: run(ranks, s, f)):
            same = [torch.equal(a, b) for a, b in itertools.pairwise(policy.tables)]
            assert same == [n in (6, 8) for n in range(10)], stop_at
        assert [row.get("guards/skipped_updates") for row in rows_of_run(folder)] == [None, 0, 0, 0, 1, 1]


def test_a_spike_stops_when_asked_to(tmp_path: Path) -> None:
    config = config_of(*SPIKES, f"run.dir={tmp_path}", "guards.on_spike=stop")
    with pytest.raises(GuardError, match=r"^step 4, update 1: the gradient norm .* times .*guards.grad_norm_spike=100"):
        started(config, OneRank(), Watched(OneRank(), [6], large_gradient)).run()


# --- log-probs, ratios, replicas ---


class BadScorer(TablePolicy):
    """Its last replica scores one token as impossible, with the reference or without."""

    def __init__(self, ranks: Ranks, of_reference: bool) -> None:
        super().__init__(ranks)
        self.of_reference, self.hit = of_reference, (-1, -1)

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], *, reference: bool = False, as_old: bool = False
    ) -> list[Tensor]:
        scored = super().log_probs(micro_batches, reference=reference)
        if reference == self.of_reference and self.ranks.dp_rank == self.ranks.dp_size - 1:
            scored[-1][2] = -math.inf
        return scored


class BadSampler(TableSampler):
    def generate(
        self, prompts: Sequence[Prompt], ids: Sequence[int], *, greedy: bool = False, **how: Any
    ) -> list[Rollout]:
        rollouts = super().generate(prompts, ids, greedy=greedy, **how)
        if not greedy and self.policy.ranks.dp_rank == 0:
            rollouts[3].log_probs[-1] = math.nan
        return rollouts


@pytest.mark.parametrize(("whose", "value"), [("old", "-inf"), ("reference", "-inf"), ("sampler's", "nan")])
def test_a_log_prob_that_is_not_finite_is_found_on_every_replica(whose: str, value: str, tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "algorithm.kl_coef=0.1", "guards.on_nonfinite=skip")

    def stopped(ranks: Ranks) -> str:
        policy = TablePolicy(ranks) if whose == "sampler's" else BadScorer(ranks, whose == "reference")
        sampler = BadSampler(policy, config) if whose == "sampler's" else None
        trainer = started(config, ranks, policy, sampler=sampler)
        with pytest.raises(GuardError) as caught:
            trainer.run()
        assert policy.version == 0
        return str(caught.value)

    first, second = Replicas(2).run(stopped)
    assert first == second
    [row] = read(tmp_path / "guards" / "step_000001_log_probs.jsonl")
    column = {"old": "old_log_probs", "reference": "ref_log_probs", "sampler's": "log_probs"}[whose]
    [at] = [i for i, log_prob in enumerate(row[column]) if not math.isfinite(log_prob)]
    assert (
        f"step 1: the {whose} log-prob of token {at} of the response (id {row['tokens'][at]}) of rollout {row['id']}, "
        f"prompt {row['prompt_id']}, is {value}; rollouts with a value that is not finite: 1 of 32, in "
    ) in first


def test_ratios_that_do_not_start_at_one(tmp_path: Path) -> None:
    class Shifted(TablePolicy):
        def log_probs(
            self, micro_batches: Sequence[MicroBatch], *, reference: bool = False, as_old: bool = False
        ) -> list[Tensor]:
            return [values + 1e-3 for values in super().log_probs(micro_batches)]

    started(config_of(f"run.dir={tmp_path}", "guards.ratio_noise=1e-9"), OneRank(), TablePolicy(OneRank())).run()
    started(config_of(f"run.dir={tmp_path}"), OneRank(), Shifted(OneRank())).run()
    config = config_of(f"run.dir={tmp_path}", "guards.ratio_noise=5e-4")
    with pytest.raises(
        GuardError, match=r"^step 1, ratio_noise: ratio/first_update_noise is 0.001, above guards.ratio_noise=0.0005"
    ):
        started(config, OneRank(), Shifted(OneRank())).run()


def test_replicas_that_differ_are_named_when_it_is_time_to_look() -> None:
    config = config_of("guards.check_replicas_every=2", "train.steps=4")

    class Drifting(TablePolicy):
        def update(self, *args: Any, **kwargs: Any) -> dict[str, Metric]:
            metrics = super().update(*args, **kwargs)
            if self.ranks.dp_rank == 1 and self.version == 5:
                self.logits_VV[1, 2] += 1e-15
            return metrics

    def stopped(ranks: Ranks) -> int:
        policy = Drifting(ranks)
        with pytest.raises(
            GuardError, match=r"^after step 4, copies of 1 parameter .* the first: logits on ranks 0 \| 1\."
        ):
            trainer_of(config, ranks, policy).run()
        return policy.version

    assert Replicas(2).run(stopped) == [8, 8]
    config = replaced(config, {"guards.check_replicas_every": 0})
    Replicas(2).run(lambda ranks: trainer_of(config, ranks, Drifting(ranks)).run())


# --- token ids ---


@pytest.mark.parametrize(("response", "place"), [((3, 9), (3, 9)), ((-1,), (2, -1))])
def test_an_id_without_a_row_is_named(response: tuple[int, ...], place: tuple[int, int]) -> None:
    prompt = Prompt(17, "what?", (4, 8), "")
    assert checked_tokens(prompt, (0, 8), 9) == [4, 8, 0, 8] and checked_tokens(Prompt(0, "", (), ""), (), 9) == []
    with pytest.raises(DataError) as caught:
        checked_tokens(prompt, response, 9)
    position, token = place
    assert f"prompt 17 ('what?'): token {position} of {2 + len(response)} has id {token}" in str(caught.value)
    assert "model.vocab_size=9 has ids 0 to 8" in str(caught.value)


class WrongPrompts(Prompts):
    def __getitem__(self, index: int) -> Prompt:
        prompt = super().__getitem__(index)
        return Prompt(index, prompt.text, (*prompt.tokens, 99), prompt.answer, prompt.solution)


@pytest.mark.parametrize(
    ("which", "settings"),
    [("eval_prompts", ()), ("train_prompts", ()), ("train_prompts", ("train.warm_start_steps=1",))],
)
def test_such_a_prompt_reaches_neither_sampler_nor_policy(which: str, settings: tuple[str, ...]) -> None:
    trainer = trainer_of(config_of(*settings), **{which: WrongPrompts()})
    with pytest.raises(DataError, match="has id 99"):
        trainer.run()
    assert isinstance(trainer.policy, TablePolicy)
    assert (
        trainer.policy.calls
        == {
            "eval_prompts": ["begin, reference False"],
            "train_prompts": [] if settings else ["begin, reference False", "sample greedily"],
        }[which]
    )


# --- settings ---


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("guards.grad_norm_spike=0.5", "guards.grad_norm_spike=0.5 would refuse ordinary updates"),
        ("guards.on_spike=stop", "guards.on_spike=stop has no effect with guards.grad_norm_spike=0"),
        ("guards.on_nonfinite=count", "guards.on_nonfinite='count' is not one of stop, skip"),
        ("guards.ratio_noise=-1", "guards.ratio_noise=-1.0 must be at least 0"),
    ],
)
def test_settings_that_cannot_work(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, ["precision.device=cpu", "model.vocab_size=13", override]), 1)
    assert message in str(caught.value)
