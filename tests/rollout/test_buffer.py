"""Runs over engines: with lag 0 they are those of the own sampler; with more, every rule of the buffer holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Prompt, Sampling
from gspo_megatron.base.errors import CheckpointError, DataError, EnginesDown, StopRequested
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.rollout.answers import Answer
from gspo_megatron.rollout.buffer import BufferedGroup, RolloutBuffer
from gspo_megatron.rollout.buffered import BufferedSource
from gspo_megatron.rollout.engine import Request
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.rollout.served import ServedSource
from gspo_megatron.run.state import RunState
from gspo_megatron.testing.fake_engine import FakeEngine, weights_of
from gspo_megatron.testing.fakes import TOKENIZER, OneRank, Prompts, Replicas, Shelf, TablePolicy, config_of, trainer_of
from tests.rollout.test_engine_pool import wait_until
from tests.run.test_trainer import Rows, without_times

SETTINGS = ("rollout.prompts_per_step=4", "rollout.group_size=2", "train.steps=4", "checkpoint.load=latest")
PER_STEP, GROUP = 4, 2


class Run:
    """A run over fake engines, or, without any, of the own sampler."""

    def __init__(
        self,
        *engines: FakeEngine,
        source: type[ServedSource] = BufferedSource,
        ranks: Ranks | None = None,
        state: RunState | None = None,
        policy: TablePolicy | None = None,
        overrides: tuple[str, ...] = (),
        restarts: bool = True,
        stop_at: int = 0,
        raises: type[Exception] | None = None,
        train_prompts: Prompts | None = None,
        **how: Any,
    ) -> None:
        ranks = ranks or OneRank()
        self.policy = policy or TablePolicy(ranks)
        self.rows, self.shelf, self.engines = Rows(), Shelf(ranks), engines
        self.tables = dict[int, torch.Tensor]()
        config, self.points, self.stop_at = config_of(*SETTINGS, *overrides), 0, stop_at
        self.is_ahead = how.get("max_lag", 0) > 0
        r = config.rollout
        parts: dict[str, Any] = {}
        if engines:
            parts["served"] = partial(
                source,
                policy=self.policy,
                open_pool=partial(self.pool, restarts=restarts) if ranks.is_main else None,
                weights=self.weights,
                probe=Probe.of_vocabulary(TOKENIZER.vocab_size, 8),
                score=self.score,
                as_in_training=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, config.run.seed),
                stop_ids=(TOKENIZER.eos_id,),
                **how,
            )
        self.trainer = trainer_of(
            config,
            ranks,
            self.policy,
            train_prompts=train_prompts or Prompts(),
            writer=self.rows,
            checkpoints=self.shelf,
            state=state,
            stop=self.stop,
            **parts,
        )
        with pytest.raises(raises) if raises else nullcontext():
            self.completed = self.trainer.run()

    def pool(self, wrong: Any, stop: Any, *, restarts: bool) -> EnginePool:
        start = (lambda engine: engine.start()) if restarts else None
        return EnginePool(self.engines, probe=wrong, start=start)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.tables[self.policy.version] = self.policy.logits_VV
        return weights_of(self.policy.version, self.policy.logits_VV).tensors

    def score(self, tokens: Any, begin: int) -> list[float]:
        log_probs_VV = self.policy.logits_VV.log_softmax(dim=-1)
        return [float(log_probs_VV[tokens[i - 1], tokens[i]]) for i in range(begin, len(tokens))]

    def stop(self) -> bool:
        self.points += 1
        if (is_now := self.points == self.stop_at) and self.is_ahead:
            # What is under way has tokens when the run stops.
            rounds, since = sum(engine.rounds for engine in self.engines), time.monotonic()
            while sum(engine.rounds for engine in self.engines) < rounds + 3 and time.monotonic() - since < 1.0:
                time.sleep(0.001)
        return is_now


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows = without_times(run.rows.rows)
    return [{k: v for k, v in row.items() if not k.startswith(("engine/", "lag/"))} for row in rows]


# --- lag 0 ---


@pytest.fixture(scope="module")
def own() -> Run:
    return Run()


@pytest.mark.parametrize("source", [ServedSource, partial(BufferedSource, max_lag=0)], ids=["served", "buffered"])
def test_with_lag_0_a_run_is_that_of_the_own_sampler(own: Run, source: Any) -> None:
    # One engine dies in a step, and the other one in another.
    engines = FakeEngine("a", dies_after=7), FakeEngine("b", delay_s=0.001, dies_after=15)
    run = Run(*engines, source=source)
    assert run.completed and rows_of(run) == rows_of(own)
    assert torch.equal(run.policy.logits_VV, own.policy.logits_VV)
    assert sum(call.startswith("load") for engine in engines for call in engine.calls) >= 9
    if source is not ServedSource:
        lags = [{k: v for k, v in row.items() if k.startswith("lag/")} for row in run.rows.rows[1:]]
        assert lags == [{"lag/mean": 0, "lag/max": 0, "lag/swept": 0, "lag/older_tokens": 0}] * 4


def test_with_lag_0_a_run_goes_on_with_the_same_bits(own: Run) -> None:
    points = Run(FakeEngine("a"), max_lag=0).points
    for stop_at in range(3, points, 4):
        first = Run(FakeEngine("a"), max_lag=0, stop_at=stop_at)
        assert not first.completed
        state = first.shelf.saved[-1][1]
        second = Run(FakeEngine("b"), max_lag=0, state=state, policy=first.policy)
        assert rows_of(first) + rows_of(second) == rows_of(own), stop_at
        assert torch.equal(second.policy.logits_VV, own.policy.logits_VV)


# --- lag ---


def check_tokens(run: Run, rollouts: list[dict[str, Any]]) -> int:
    """Every log-prob is that of the version that its span names; returns how many rollouts have several."""
    several = 0
    for rollout in rollouts:
        at, before = 0, TOKENIZER.encode(rollout["prompt"])[-1]
        for version, begin, end in rollout["versions"]:
            assert begin == at
            log_probs_VV = run.tables[version].log_softmax(dim=-1)
            for token, log_prob in zip(rollout["tokens"][begin:end], rollout["log_probs"][begin:end], strict=True):
                assert log_prob == float(log_probs_VV[before, token])
                before = token
            at = end
        assert at == len(rollout["tokens"])
        assert rollout["policy_version"] == min(version for version, _, _ in rollout["versions"])
        several += len(rollout["versions"]) > 1
    return several


def check_prompts(*runs: Run) -> None:
    """No prompt twice, none left out: what is not trained on yet is under way, or to be asked again."""
    source, held = runs[-1].trainer.parts.source, runs[-1].shelf.saved[-1][1].held
    assert held is not None and len(held.about["groups"]) <= 2 * PER_STEP
    waiting = [group["prompt"] for group in held.about["groups"]] + held.about["again"]
    trained = [rows[i]["prompt_id"] for run in runs for rows in run.rows.samples.values() for i in range(0, 8, GROUP)]
    order = source.prompts.order  # type: ignore[attr-defined]
    assert sorted(trained + waiting) == sorted(order.slice(0, source.taken.prompts))


LONG = ("rollout.max_new_tokens=30", "model.max_sequence_length=40", "train.tokens_per_micro_batch=64")


def test_a_run_ahead_of_its_trainer() -> None:
    engines = [FakeEngine(name, delay_s=0.01, piece=1) for name in "ab"]
    run = Run(*engines, max_lag=2, overrides=(*LONG, "train.steps=5", "logging.rollouts_per_step=-1"))
    rows = run.rows.rows[1:]
    assert run.completed and len(rows) == 5
    assert rows[0]["lag/max"] == 0 and all(0 <= row["lag/mean"] <= row["lag/max"] <= 2 for row in rows)
    assert any(row["lag/mean"] > 0 for row in rows) and any(row["lag/older_tokens"] > 0 for row in rows)
    samples = [rollout for step in run.rows.samples.values() for rollout in step]
    assert len(samples) == 5 * PER_STEP * GROUP and check_tokens(run, samples) > 0
    check_prompts(run)
    # Without a lag, sampler and trainer agree; nan: no token with an advantage.
    assert not any(row["sampler/kl"] > 1e-12 for row in rows if not row["lag/older_tokens"])


def test_a_run_with_lag_goes_on_where_its_rollouts_were_cut() -> None:
    how: dict[str, Any] = {"max_lag": 1, "overrides": (*LONG, "logging.rollouts_per_step=-1")}
    first = Run(FakeEngine("a", delay_s=0.005, piece=1), stop_at=4, **how)
    assert not first.completed
    state = first.shelf.saved[-1][1]
    assert state.held is not None
    groups = state.held.about["groups"]
    newest = max(group["step"] for group in groups)  # what began before is swept when the next step begins
    rollouts = [(group["step"] == newest, rollout) for group in groups for rollout in group["rollouts"]]
    cut = {
        rollout["id"]: int(length)
        for (is_kept, rollout), length in zip(rollouts, state.held.tensors["lengths_S"], strict=True)
        if is_kept and not rollout["finish"]
    }
    assert any(cut.values())
    second = Run(engine := FakeEngine("b", delay_s=0.005, piece=1), state=state, policy=first.policy, **how)
    assert second.completed
    begun = {request.id: len(request.response) for requests in engine.asked for request in requests}
    assert {number: begun[number] for number in cut} == cut
    second.tables = first.tables | second.tables
    check_tokens(second, [rollout for step in second.rows.samples.values() for rollout in step])
    broken = state.held._replace(tensors=dict(state.held.tensors, tokens_R=state.held.tensors["tokens_R"][1:]))
    with pytest.raises(CheckpointError, match="rollouts under way of the checkpoint do not fit together"):
        Run(FakeEngine("c"), state=replace(state, held=broken), policy=first.policy, **how)


class Right:
    """Every rollout is right. `scored`: the prompts."""

    groups_at_once, most_lost = 0, 0.5

    def __init__(self) -> None:
        self.scored = list[int]()

    def score(self, rollouts: Any) -> Any:
        self.scored.append(rollouts[0].prompt.id)
        return [(1.0, {}, "", False)] * len(rollouts)


def test_what_grew_too_old_is_sampled_anew() -> None:
    policy = TablePolicy(OneRank())
    engine = FakeEngine("a", delay_s=0.002)
    pool = EnginePool([engine], probe=lambda engine: "")
    pool.update(weights_of(0, policy.logits_VV))

    buffer = RolloutBuffer(pool, right := Right(), lambda rollout: None, max_lag=1)

    def begin(number: int, longest: int, step: int) -> None:
        prompt = Prompt(number, "", (3,), "")
        asked = [Request(2 * number + i, (3,), (), 0, 1.0, 1.0, 0, longest, ()) for i in range(2)]
        buffer.begin(prompt, asked, step)

    begin(0, 100_000, 1)
    begin(1, 3, 1)
    begin(2, 3, 2)
    # The oldest of those that are whole.
    [first] = buffer.wait(1, threading.Event())
    wait_until(lambda: sum(bool(group.rollouts) for group in buffer.groups) == 2)
    [first] = buffer.wait(1, threading.Event())
    buffer.go_on()  # nothing rests but what an error has stopped
    assert first.prompt.id == 1 and buffer.remove([first]) == [1]
    assert buffer.sweep(2) == []
    assert [prompt.id for prompt in buffer.sweep(3)] == [0]
    wait_until(lambda: pool.members[0].in_flight == 0)
    assert [group.prompt.id for group in buffer.groups] == [2] and sorted(right.scored) == [1, 2]
    buffer.close()
    pool.close()


def test_all_ranks_get_the_same() -> None:
    engines = [FakeEngine(name) for name in "ab"]
    runs = Replicas(2).run(lambda ranks: Run(*engines, ranks=ranks, max_lag=1))
    assert rows_of(runs[0])[1]["step"] == 1
    assert torch.equal(runs[0].policy.logits_VV, runs[1].policy.logits_VV)
    [a, b] = [run.trainer.parts.source for run in runs]
    assert a.taken == b.taken and {k: v for k, v in a.metrics.items() if k[:4] == "lag/"} == {
        k: v for k, v in b.metrics.items() if k[:4] == "lag/"
    }


# --- stops, and what a checkpoint holds ---


class Late(OneRank):
    """A stop is seen in the poll that also finds the work done."""

    def from_main(self, work: Any, stop: Any) -> Any:
        result = work(threading.Event())
        if stop():
            raise StopRequested
        return result


@pytest.mark.parametrize("stop_at", range(4, 10))
def test_a_stop_that_comes_when_a_step_has_its_groups_loses_none(stop_at: int) -> None:
    points = iter(range(1, 1000))
    how: dict[str, Any] = {"max_lag": 1, "overrides": ("logging.rollouts_per_step=-1",)}
    first = Run(FakeEngine("a"), ranks=Late(), stop=lambda: next(points) >= stop_at, **how)
    assert not first.completed
    check_prompts(first)
    second = Run(FakeEngine("b"), state=first.shelf.saved[-1][1], policy=first.policy, **how)
    assert second.completed
    check_prompts(first, second)


@pytest.fixture(scope="module")
def ahead() -> Run:
    """A run of two steps that holds what it has sampled ahead."""
    run = Run(FakeEngine("a", delay_s=0.001, piece=1), max_lag=1, overrides=("train.steps=2",))
    assert run.shelf.saved[-1][1].held is not None
    return run


def continued(ahead: Run, said: list[str], *overrides: str, **how: Any) -> Run:
    policy = TablePolicy(OneRank())
    policy.logits_VV, policy.version = ahead.policy.logits_VV.clone(), ahead.policy.version
    state, steps = ahead.shelf.saved[-1][1], ("train.steps=3", "logging.rollouts_per_step=-1")
    return Run(
        FakeEngine("b"), state=state, policy=policy, overrides=(*steps, *overrides), max_lag=1, warn=said.append, **how
    )


@pytest.mark.parametrize("size", [1, 4])
def test_groups_of_another_size_are_dropped_and_their_prompts_sampled(ahead: Run, size: int) -> None:
    said: list[str] = []
    run = continued(ahead, said, f"rollout.group_size={size}")
    waiting = {group["prompt"] for group in ahead.shelf.saved[-1][1].held.about["groups"]}
    [row] = run.rows.samples.values()
    assert len(row) == PER_STEP * size
    held = run.shelf.saved[-1][1].held
    assert held is not None and {len(group["rollouts"]) for group in held.about["groups"]} == {size}
    assert waiting <= {rollout["prompt_id"] for rollout in row} | {group["prompt"] for group in held.about["groups"]}
    [line] = said
    assert line == (
        f"{len(waiting)} groups that the run had sampled ahead are dropped: they have 2 rollouts, and "
        f"rollout.group_size={size}"
    )


def test_groups_of_prompts_that_have_changed_are_dropped(ahead: Run) -> None:
    held = [group["prompt"] for group in ahead.shelf.saved[-1][1].held.about["groups"]]
    same = next(index for index in held if Prompts()[index].tokens != Prompts(seed=3)[index].tokens)

    class Edited(Prompts):
        """Every prompt but one is another one."""

        def __getitem__(self, index: int) -> Prompt:
            return Prompts()[index] if index == same else replace(Prompts(seed=3)[index], text="C", tokens=(4, 4, 4))

    said: list[str] = []
    run = continued(ahead, said, train_prompts=Edited())
    [line] = said
    assert line == (
        f"{len(held) - 1} groups that the run had sampled ahead are dropped: data.train has other prompts in their "
        "place"
    )
    # Evaluations are greedy.
    asked = {request.prompt for requests in run.engines[0].asked for request in requests if request.temperature}
    assert asked <= {(4, 4, 4), Prompts()[same].tokens}


def test_groups_of_data_that_became_smaller_are_dropped(ahead: Run) -> None:
    said: list[str] = []
    held = [group["prompt"] for group in ahead.shelf.saved[-1][1].held.about["groups"]]
    smaller = sorted(held)[1]
    run = continued(ahead, said, train_prompts=Prompts(smaller))
    assert run.completed and len(said) == 1 and "data.train has other prompts in their place" in said[0]


class Unfit(Prompts):
    """The prompt with this text has an id that the embedding lacks."""

    bad: int = -1

    def __getitem__(self, index: int) -> Prompt:
        prompt = super().__getitem__(index)
        return replace(prompt, tokens=(*prompt.tokens, 999)) if index == self.bad else prompt


@pytest.mark.parametrize("place", [2, 5, 9, 12])
def test_a_prompt_that_cannot_be_asked_takes_no_other_with_it(place: int) -> None:
    """In the first step, in what is begun ahead, and in what later steps begin."""
    prompts = Unfit()
    prompts.bad = OrderedPrompts(prompts, 1).order.slice(place, 1)[0]
    how: dict[str, Any] = {"max_lag": 1, "overrides": ("logging.rollouts_per_step=-1",)}
    first = Run(FakeEngine("a"), train_prompts=prompts, raises=DataError, **how)
    state = first.shelf.saved[-1][1] if first.shelf.saved else None
    assert state is None or prompts.bad in state.held.about["again"]
    second = Run(FakeEngine("b"), state=state, policy=first.policy, **how)
    assert second.completed
    check_prompts(*([first] if state else []), second)


def test_scores_that_nobody_waits_for_are_not_begun_at_the_end() -> None:
    scored, release = list[int](), threading.Event()

    class Slow:
        groups_at_once, most_lost = 1, 1.0

        def score(self, rollouts: Any) -> Any:
            scored.append(rollouts[0].prompt.id)
            release.wait(20)
            return [(1.0, {}, "", False)] * len(rollouts)

    pool = EnginePool([FakeEngine("a")], probe=lambda engine: "")
    pool.update(weights_of(0, TablePolicy(OneRank()).logits_VV))
    source = BufferedSource(
        *(OneRank(), TOKENIZER, TOKENIZER.vocab_size, Slow(), OrderedPrompts(Prompts(), 1), 0, PER_STEP, GROUP),
        *(TablePolicy(OneRank()), lambda wrong, stop: pool, lambda: iter(()), Probe((1, 2), 1), lambda *at: (0.0,)),
        *(Sampling(1.0, 1.0, 0, 3, 0), (TOKENIZER.eos_id,)),
    )
    source._open(threading.Event())
    buffer = source._buffer
    assert buffer is not None
    source._begin(1, PER_STEP)
    wait_until(lambda: scored != [] and all(group.scoring for group in buffer.groups))
    source.close()
    release.set()
    wait_until(lambda: any(group.rollouts for group in buffer.groups))
    buffer._scoring.shutdown(wait=True)
    assert len(scored) == 1
    pool.close()


def test_an_error_before_the_score_is_told() -> None:
    class Broken(RolloutBuffer):
        def _listen(self) -> None:
            pass

    pool = EnginePool([FakeEngine("a")], probe=lambda engine: "")
    buffer = Broken(pool, Right(), lambda rollout: None, max_lag=1)
    # Without a token there is no version, and no oldest one.
    group = BufferedGroup(Prompt(0, "", (3,), ""), 1, [Answer(Request(0, (3,), (), 0, 1.0, 1.0, 0, 3, ()))])
    buffer._score(group)
    with pytest.raises(ValueError, match="empty"):
        buffer.wait(1, threading.Event())
    buffer.close()
    pool.close()


# --- the end of all engines ---


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_run_whose_engines_are_all_dead_is_saved(max_lag: int) -> None:
    how: dict[str, Any] = {"max_lag": max_lag, "overrides": ("logging.rollouts_per_step=-1",)}
    first = Run(FakeEngine("a", dies_after=48), restarts=False, raises=EnginesDown, **how)
    assert first.trainer.completed_steps < 4
    second = Run(FakeEngine("c"), state=first.shelf.saved[-1][1], policy=first.policy, **how)
    assert second.completed
    check_prompts(first, second)
    assert [row["step"] for row in [*first.rows.rows, *second.rows.rows]] == [0, 1, 2, 3, 4]
