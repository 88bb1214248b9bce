"""Learning rates, the warm start, and runs that are stopped and continued."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gspo_megatron.base.batches import Position
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.run.state import RunState
from gspo_megatron.testing.fakes import (
    TOKENIZER,
    Notebook,
    OneRank,
    Replicas,
    Shelf,
    TablePolicy,
    config_of,
    trainer_of,
)
from tests.run.test_trainer import Rows, policy_of, prompts_of, run, without_times


@pytest.mark.parametrize(
    ("decay", "halfway", "last"),
    [("constant", 5.0, 5.0), ("linear", 3.0, 1.2), ("cosine", 3.0, 1 + 4 * (1 + math.cos(math.pi * 0.95)) / 2)],
)
def test_the_learning_rate(decay: str, halfway: float, last: float) -> None:
    """12 steps of 2 updates: a warm-up of 4, then 20 updates from lr towards min_lr."""
    trainer = trainer_of(
        config_of(
            "train.steps=12", "optimizer.min_lr=1", "optimizer.lr_warmup_updates=4", f"optimizer.lr_decay={decay}"
        )
    )
    assert [trainer.learning_rate(k) for k in range(5)] == pytest.approx([1.25, 2.5, 3.75, 5, 5])
    assert trainer.learning_rate(14) == pytest.approx(halfway)
    assert trainer.learning_rate(23) == pytest.approx(last)
    # A continued run with fewer updates a step may be past its end: no rate below the last one.
    assert trainer.learning_rate(40) == pytest.approx(5 if decay == "constant" else trainer.config.optimizer.min_lr)
    rates = [trainer.learning_rate(k) for k in range(4, 24)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= 1


def test_the_rate_of_a_row_is_that_of_its_last_update() -> None:
    trainer, rows = run("train.steps=3", "optimizer.lr_decay=linear", "optimizer.lr_warmup_updates=2")
    asked = [float(call.removeprefix("update, lr ")) for call in policy_of(trainer).calls if call.startswith("update")]
    assert asked == pytest.approx([2.5, 5, 5, 3.75, 2.5, 1.25])
    assert [row["lr"] for row in rows[1:]] == pytest.approx(asked[1::2])


def test_the_warm_start_learns_the_solutions() -> None:
    losses: list[float] = []

    class Listener(Notebook):
        def warm_start(self, step: int, steps: int, loss: float) -> None:
            losses.append(loss)

    settings = ("train.warm_start_steps=60", "train.warm_start_lr=20", "train.steps=0")
    _, rows = run(*settings, console=Listener())
    before = trainer_of(config_of(*settings))
    table_VV = policy_of(before).logits_VV.log_softmax(dim=-1)
    prompts = [*prompts_of(before).take(0, before.config.train.warm_start_batch)]
    total = 0.0
    for prompt in prompts:
        a, b = prompt.tokens[-1], TOKENIZER.encode(prompt.solution)[0]
        total -= float(table_VV[a, b] + table_VV[b, TOKENIZER.eos_id])
    assert losses[0] == pytest.approx(total / (2 * len(prompts)))
    assert losses[-1] < 0.1
    assert rows == [rows[0]] and rows[0]["eval/accuracy"] == 1.0


def test_a_solution_is_cut_at_the_context() -> None:
    trainer = trainer_of(config_of())
    prompt = prompts_of(trainer).source[0]
    long = TOKENIZER.encode("abababab")
    cut = trainer.parts.warm_start.with_solution(type(prompt)(0, "AB", tuple(TOKENIZER.encode("AB")), "", "abababab"))
    assert cut.tokens[2:].tolist() == long[:6] and cut.trained.tolist() == [False] * 2 + [True] * 6
    whole = trainer.parts.warm_start.with_solution(type(prompt)(0, "AB", tuple(TOKENIZER.encode("AB")), "", "ababa"))
    assert whole.tokens[2:].tolist() == [*long[:5], TOKENIZER.eos_id]


def continued(settings: tuple[str, ...], stops: list[int], ranks: Ranks) -> tuple[TablePolicy, Rows, list[Position]]:
    """A run that is told to stop when it asks for the n-th time, for each n of `stops`, and then continued. Its policy
    is kept in memory, all else goes through JSON."""
    policy, writer, state, positions = TablePolicy(ranks), Rows(), None, []
    for n in [*stops, 0]:
        asked, shelf = itertools.count(1), Shelf(ranks)
        parts = {"writer": writer, "checkpoints": shelf, "state": state}
        trainer = trainer_of(
            config_of(*settings), ranks, policy, **parts, stop=lambda asked=asked, n=n: next(asked) == n
        )
        if n == 0:
            trainer.run()
            return policy, writer, positions
        assert not trainer.run()
        if shelf.saved:  # nothing, when it was stopped where it had been continued
            _, state = shelf.saved[-1]
        positions.append(trainer.position)
    raise AssertionError


WITH_EVERYTHING = (
    "train.steps=3",
    "train.warm_start_steps=2",
    "optimizer.lr_decay=cosine",
    "algorithm.kl_coef=0.1",
    "algorithm.updates_per_rollout=4",
    "train.eval_every=2",
)


@pytest.mark.parametrize("dp_size", [1, 3])
def test_a_run_that_is_stopped_anywhere_goes_on_as_if_it_had_not(dp_size: int) -> None:
    """Asked to stop at each of its safe points in turn: between warm-start updates, steps, updates of a step."""
    whole, rows = run(*WITH_EVERYTHING)
    [(expected, _), *_] = Replicas(dp_size).run(lambda ranks: (policy_of(run(*WITH_EVERYTHING, ranks=ranks)[0]), 0))
    seen = set()
    for n in range(1, 15):
        runs = Replicas(dp_size).run(lambda ranks, n=n: continued(WITH_EVERYTHING, [n], ranks))
        for policy, writer, positions in runs:
            seen.update(positions)
            assert torch.equal(policy.logits_VV, expected.logits_VV), positions
            for row, same in zip(without_times(rows), without_times(writer.rows), strict=True):
                assert same == (row if dp_size == 1 else pytest.approx(row, abs=1e-11)), positions
    assert {(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 0, 3), (2, 1, 0), (2, 1, 2), (2, 2, 1)} <= seen
    assert policy_of(whole).version == 12


def test_a_run_may_be_stopped_again_and_again() -> None:
    _, rows = run(*WITH_EVERYTHING)
    _, writer, positions = continued(WITH_EVERYTHING, [2, 3, 1, 2, 2, 4], OneRank())
    assert positions == sorted(positions) and len(positions) == 6
    assert without_times(writer.rows) == without_times(rows)


def test_a_step_under_way_goes_on_with_other_ranks() -> None:
    """Stopped after two of four updates on three replicas, continued on one and on two."""
    _, rows = run(*WITH_EVERYTHING)

    def stopped(ranks: Ranks) -> tuple[RunState, TablePolicy, Rows]:
        policy, writer, shelf, asked = TablePolicy(ranks), Rows(), Shelf(ranks), itertools.count(1)
        parts = {"writer": writer, "checkpoints": shelf, "stop": lambda: next(asked) == 9}
        assert not trainer_of(config_of(*WITH_EVERYTHING), ranks, policy, **parts).run()
        return shelf.saved[-1][1], policy, writer

    (state, before, written), *_ = Replicas(3).run(stopped)
    assert state.position == (2, 1, 2) and len(state.step.about["updates"]) == len(state.step.shares) == 3

    def go_on(ranks: Ranks) -> Rows:
        policy, writer = TablePolicy(ranks), Rows()
        policy.logits_VV, policy.reference_VV, policy.version = before.logits_VV, before.reference_VV, before.version
        trainer_of(config_of(*WITH_EVERYTHING), ranks, policy, writer=writer, state=state).run()
        return writer

    for size in (1, 2):
        for writer in Replicas(size).run(go_on):
            for row, same in zip(without_times(rows), without_times([*written.rows, *writer.rows]), strict=True):
                assert same == pytest.approx(row, abs=1e-11)
