"""The pool of engines: who samples what, deaths under load, wrong answers and wrong weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
import pytest
import torch

from gspo_megatron.base.errors import CannotSend, EngineError, EnginesDown, EnginesStale, Refused, WrongWeights
from gspo_megatron.rollout.answers import Answer
from gspo_megatron.rollout.engine import Engine, Piece, Request, Span
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.engine_states import FORGIVEN, NEXT, State
from gspo_megatron.rollout.native.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.testing.fake_engine import FakeEngine, Garbage, weights_of
from gspo_megatron.testing.time_limits import time_factor

V, EOS, SEED = 13, 0, 5
PROBED = (3, 4, 5, 6)


def table(number: int) -> torch.Tensor:
    logits_VV = torch.randn(V, V, generator=torch.Generator().manual_seed(number)).double()
    logits_VV[:, EOS] -= 2  # long responses
    return logits_VV


def request(number: int, response: tuple[int, ...] = (), longest: int = 24) -> Request:
    return Request(number, (1, 2 + number % 7), response, SEED, 1.0, 1.0, 0, longest, (EOS,))


def groups_of(count: int, size: int = 4, longest: int = 24) -> list[list[Request]]:
    return [[request(g * size + i, longest=longest) for i in range(size)] for g in range(count)]


def sampled_alone(asked: Request, logits_VV: torch.Tensor) -> tuple[list[int], list[float]]:
    """By the definition, token by token."""
    tokens, log_probs = list(asked.response), list[float]()
    while len(tokens) < asked.max_new_tokens and tokens[-1:] != [EOS]:
        u_B = torch.from_numpy(uniforms(asked.seed, np.array([asked.id]), np.array([len(tokens)])))
        token_B, log_prob_B = next_tokens(logits_VV[(*asked.prompt, *tokens)[-1]][None], u_B, Decoding())
        tokens.append(int(token_B))
        log_probs.append(float(log_prob_B))
    return tokens[len(asked.response) :], log_probs


class Setup:
    """A pool over fakes that get the weights of `table(version)`. `probes`: which engine, with what complaint."""

    def __init__(self, *engines: FakeEngine, restarts: bool = True, reloads: bool = True, **how: object) -> None:
        self.engines, self.said = engines, list[str]()
        self.pool = EnginePool(
            engines,
            probe=self.probe,
            start=self.start if restarts else None,
            load=self.load if reloads else None,
            say=self.said.append,
            **how,  # type: ignore[arg-type]
        )
        self.started = list[str]()

    def start(self, engine: Engine) -> None:
        self.started.append(engine.name)
        assert isinstance(engine, FakeEngine)
        if "start" in engine.refuses:
            raise EngineError(f"{engine.name} ends at once")
        engine.start()

    def load(self, engine: Engine) -> None:
        engine.load(weights_of(self.pool.version, table(self.pool.version)))

    def probe(self, engine: Engine) -> str:
        log_probs_VV = table(self.pool.version).log_softmax(dim=-1)
        found = torch.tensor(engine.probe(PROBED, 1), dtype=torch.float64)
        gap = float((found - log_probs_VV[PROBED[:-1], PROBED[1:]]).abs().max())
        return "" if gap < 1e-4 else f"log-probs differ by {gap:.2g}"

    def update(self, version: int) -> None:
        self.pool.update(weights_of(version, table(version)))

    def answers(self, groups: list[list[Request]]) -> dict[int, Answer]:
        answers = {r.id: Answer(r) for group in groups for r in group}
        for piece in self.pool.generate(groups):
            answers[piece.id].add(piece, range(100))
        return answers


def wait_until(happened: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < 20 * time_factor(), "did not happen"
        time.sleep(0.002)


def check(answers: dict[int, Answer], logits_VV: torch.Tensor) -> None:
    for answer in answers.values():
        tokens, log_probs = sampled_alone(answer.request, logits_VV)
        assert (answer.tokens, answer.log_probs) == (tokens, log_probs)
        assert answer.finish == ("stop" if answer.tokens[-1] == EOS else "length")


# --- who samples what ---


def test_groups_stay_together_and_go_to_the_engine_with_the_fewest_requests() -> None:
    engines = FakeEngine("a", delay_s=0.002), FakeEngine("b", delay_s=0.004), FakeEngine("c", delay_s=0.002)
    setup = Setup(*engines, most_in_flight=8)
    setup.update(0)
    groups = groups_of(12)
    check(setup.answers(groups), table(0))
    asked = [tuple(r.id for r in requests) for engine in engines for requests in engine.asked]
    assert sorted(asked) == [tuple(r.id for r in group) for group in groups]
    assert all(engine.asked for engine in engines)
    assert [member.in_flight for member in setup.pool.members] == [0, 0, 0]


def test_a_cut_response_is_continued_with_the_same_tokens() -> None:
    setup = Setup(FakeEngine("a"))
    setup.update(0)
    whole, _ = sampled_alone(request(3), table(0))
    [answer] = setup.answers([[request(3, tuple(whole[:5]))]]).values()
    assert answer.tokens == whole[5:] and answer.versions == [(0, 5, len(whole))]
    # What is aborted goes on after the pause: nobody who asked hears of it.
    setup = Setup(engine := FakeEngine("a", delay_s=0.002))
    setup.update(0)
    pieces = setup.pool.generate(groups_of(1))
    got = [next(pieces)]
    with setup.pool.paused("abort"):
        pass
    got += pieces
    answers = {r.id: Answer(r) for r in groups_of(1)[0]}
    for piece in got:
        answers[piece.id].add(piece, range(1))
    check(answers, table(0))
    assert len(engine.asked) == 2


# --- deaths ---


@pytest.mark.parametrize("restarts", [False, True])
def test_a_death_under_load_costs_no_rollout(restarts: bool) -> None:
    setup = Setup(FakeEngine("a", delay_s=0.002), FakeEngine("b", dies_after=3), restarts=restarts)
    setup.update(0)
    groups = groups_of(6)
    check(setup.answers(groups), table(0))
    a, b = setup.pool.members
    assert setup.pool.deaths == 1 and setup.pool.continued > 0
    assert any("b is dead: b does not answer generate" in line for line in setup.said)
    # Its responses were continued from where they were cut, not begun again.
    assert any(r.response for engine in setup.engines for requests in engine.asked for r in requests)
    if restarts:
        wait_until(lambda: b.state == "alive")
        # Started, given the weights while it was paused, and probed.
        assert setup.engines[1].calls[-5:] == ["pause keep", "load 0", "resume", "version", "probe"]
        setup.engines[0].kill()
        check(setup.answers(groups), table(0))
    else:
        assert (a.state, b.state) == ("alive", "dead")


def test_the_only_engine_is_waited_for() -> None:
    setup = Setup(engine := FakeEngine("a", dies_after=5))
    setup.update(0)
    check(setup.answers(groups_of(2)), table(0))
    assert setup.started == ["a"] and any(r.response for r in engine.asked[-1] + engine.asked[-2])


def test_when_no_engine_is_left_the_run_is_told() -> None:
    setup = Setup(FakeEngine("a", dies_after=2), FakeEngine("b", dies_after=3, refuses={"start"}), most_starts=2)
    setup.engines[0].refuses.add("start")
    setup.update(0)
    with pytest.raises(EnginesDown, match=r"a is dead \(a ends at once\); b is dead \(b ends at once\)"):
        setup.answers(groups_of(4))
    assert sorted(setup.started) == ["a", "a", "b", "b"]
    with pytest.raises(EnginesDown):
        setup.answers(groups_of(1))
    # The ranks of the trainer make the weights together: they are read to the end.
    weights = weights_of(1, table(1))
    with pytest.raises(EnginesDown):
        setup.pool.update(weights)
    assert next(weights.tensors, None) is None


def test_an_engine_that_did_well_since_its_last_death_is_as_good_as_new() -> None:
    setup = Setup(engine := FakeEngine("a"), most_starts=2)
    [a] = setup.pool.members
    setup.update(0)
    for death, starts, updates in ((1, 1, FORGIVEN), (2, 1, FORGIVEN), (3, 1, FORGIVEN - 2), (4, 2, 0)):
        engine.kill()
        check(setup.answers(groups_of(1)), table(setup.pool.version))
        assert len(setup.started) == death and (a.state, a.starts) == ("alive", starts)
        for _ in range(updates):  # with that of its restart one more
            setup.update(setup.pool.version + 1)
    engine.kill()
    with pytest.raises(EnginesDown):
        setup.answers(groups_of(1))
    assert "given up (engine.most_starts=2)" in setup.said[-1]


@pytest.mark.parametrize("part", ["start", "load"])
def test_whatever_goes_wrong_in_a_restart_the_engine_is_dead_and_the_run_is_told(part: str) -> None:
    setup = Setup(FakeEngine("a", delay_s=0.002), most_starts=2)

    def full(engine: Engine) -> None:
        raise OSError(12, "Cannot allocate memory")

    setattr(setup.pool, f"_{part}", full)
    setup.update(0)
    pieces = setup.pool.generate(groups_of(2, longest=1000))
    next(pieces)
    setup.engines[0].kill()
    with pytest.raises(EnginesDown, match=r"a is dead \(OSError: .*Cannot allocate memory\)"):
        list(pieces)
    assert not setup.pool.members[0].returning


def test_what_others_sample_on_a_dead_engine_is_not_waited_for() -> None:
    """It hangs, and a call that it does not answer says so."""
    setup = Setup(FakeEngine("a"), FakeEngine("b", delay_s=0.002), restarts=False)
    setup.update(0)
    pieces = setup.pool.generate(groups_of(2))
    got = [next(pieces)]
    member = setup.pool.members[1]
    wait_until(lambda: member.in_flight > 0)
    setup.engines[1].pause("keep")
    setup.pool._died(member, 1, "did not answer")
    got += pieces
    answers = {r.id: Answer(r) for group in groups_of(2) for r in group}
    for piece in got:
        answers[piece.id].add(piece, range(1))
    check(answers, table(0))


@pytest.mark.parametrize("error", [Refused, CannotSend])
def test_an_error_that_is_not_the_engines_kills_none(error: type[EngineError]) -> None:
    setup = Setup(*(FakeEngine(name) for name in "abc"))
    setup.update(0)

    def raising(*what: object) -> Iterator[Piece]:
        raise error("the prompt is too long")

    if error is Refused:
        for engine in setup.engines:
            engine.generate = raising  # type: ignore[method-assign]
        with pytest.raises(Refused, match="too long"):
            setup.answers(groups_of(4))
    weights = weights_of(1, table(1))
    setup.pool._send = raising
    with pytest.raises(error, match="too long"):
        setup.pool.update(weights)
    assert next(weights.tensors, None) is None
    assert setup.pool.deaths == 0 and not any(engine.paused for engine in setup.engines)


def test_a_stop_is_noticed_while_nothing_comes() -> None:
    setup = Setup(FakeEngine("a", dies_after=1))
    setup.pool._start = lambda engine: time.sleep(3600)
    setup.update(0)
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    began = time.monotonic()
    list(setup.pool.generate(groups_of(2), stopped.is_set))
    assert stopped.is_set() and time.monotonic() - began < 10 * time_factor()
    wait_until(lambda: not setup.pool._flights)


@pytest.mark.parametrize("garbage", [kind for kind in get_args(Garbage) if kind])
def test_an_engine_that_answers_garbage_is_dead(garbage: Garbage) -> None:
    setup = Setup(FakeEngine("a", delay_s=0.002), FakeEngine("b", garbage=garbage), restarts=False)
    setup.update(0)
    check(setup.answers(groups_of(4)), table(0))
    assert [member.state for member in setup.pool.members] == ["alive", "dead"]
    assert setup.pool.members[1].why


# --- weights ---


def test_new_weights_under_way() -> None:
    setup = Setup(FakeEngine("a", delay_s=0.005), FakeEngine("b", delay_s=0.005))
    setup.update(0)
    groups = groups_of(4)
    answers = {r.id: Answer(r) for group in groups for r in group}
    for count, piece in enumerate(setup.pool.generate(groups)):
        answers[piece.id].add(piece, range(8))
        if count == 10:
            setup.update(7)
    both = 0
    for answer in answers.values():
        at, given = 0, list[int]()
        for span in answer.versions:
            assert span.begin == at and span.version in (0, 7)
            part = Request(*{**vars(answer.request), "response": tuple(given), "max_new_tokens": span.end}.values())
            tokens, _ = sampled_alone(part, table(span.version))
            assert answer.tokens[span.begin : span.end] == tokens
            at, given = span.end, given + tokens
        both += len(answer.versions) == 2
    assert both > 4
    assert all(engine.calls[-5:] == ["pause keep", "load 7", "resume", "version", "probe"] for engine in setup.engines)


def test_an_engine_with_other_weights_stops_the_run() -> None:
    setup = Setup(FakeEngine("a"), FakeEngine("b", keeps_old=True))
    setup.update(0)
    with pytest.raises(WrongWeights, match=r"^b, after weights of version 2 .* log-probs differ by"):
        setup.update(2)
    with pytest.raises(WrongWeights):
        setup.answers(groups_of(1))


@pytest.mark.parametrize("method", ["pause", "load", "resume", "version", "probe"])
def test_an_engine_that_dies_while_it_is_updated_costs_nothing(method: str) -> None:
    setup = Setup(FakeEngine("a"), FakeEngine("b"))
    setup.update(0)
    setup.engines[1].refuses.add(method)
    setup.update(1)
    check(setup.answers(groups_of(3)), table(1))
    assert setup.pool.deaths == 1 and not setup.engines[0].paused


def test_an_engine_without_a_way_to_reload_waits_for_the_next_update() -> None:
    setup = Setup(FakeEngine("a"), FakeEngine("b", dies_after=1), reloads=False)
    setup.update(0)
    check(setup.answers(groups_of(4)), table(0))
    b = setup.pool.members[1]
    wait_until(lambda: b.state == "stale" and not b.returning)
    setup.engines[0].kill()
    with pytest.raises(EnginesStale, match=r"a is dead .*; b is stale") as caught:
        setup.pool._start = None
        setup.answers(groups_of(1))
    assert caught.value.ended == setup.pool.ended == 16
    setup.update(1)
    check(setup.answers(groups_of(3)), table(1))


def test_no_engine_stays_paused() -> None:
    setup = Setup(FakeEngine("a"), FakeEngine("b"))
    setup.update(0)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from [("logits.0", table(0)[0])]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        setup.pool.update(weights_of(1, table(1))._replace(tensors=broken()))
    with pytest.raises(KeyboardInterrupt), setup.pool.paused("wait"):
        raise KeyboardInterrupt
    assert [engine.paused for engine in setup.engines] == [False, False]


# --- the end ---


def test_whoever_waits_for_an_engine_to_return_can_be_stopped() -> None:
    setup, waited, done = Setup(FakeEngine("a", dies_after=2)), threading.Event(), threading.Event()
    setup.update(0)

    def start_never(engine: Engine) -> None:
        waited.set()
        done.wait()

    setup.pool._start = start_never
    assert len(list(setup.pool.generate(groups_of(2), waited.is_set))) < 8
    assert waited.is_set()
    done.set()


def test_an_iterator_that_is_closed_ends_its_requests() -> None:
    setup = Setup(engine := FakeEngine("a", delay_s=0.002))
    setup.update(0)
    pieces = setup.pool.generate(groups_of(3, longest=1000))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    wait_until(lambda: not setup.pool._flights and not engine._under_way)
    assert setup.pool.members[0].in_flight == 0
    check(setup.answers(groups_of(1)), table(0))
    setup.pool.close()


def test_the_table_of_states() -> None:
    assert set(NEXT) == set(get_args(State))
    # From death there is one way back, and it leads through stale.
    assert NEXT["dead"] == ("restarting",) and "alive" not in NEXT["restarting"]
    assert [state for state in NEXT if "alive" in NEXT[state]] == ["stale"]


def test_the_versions_of_an_answer() -> None:
    answer = Answer(request(1, (9,), longest=9))
    answer.add(Piece(1, (4, 5), (-1.0, -1.0), (Span(3, 1, 3),), ""), range(5))
    answer.add(answer.dated(Piece(1, (6, 7), (-1.0, -1.0), (), ""), 4), range(5))
    assert answer.versions == [(3, 1, 3), (4, 3, 5)]
    # vLLM tells them with the last piece, of all tokens of the request.
    answer.add(Piece(1, (8,), (-1.0,), (Span(3, 1, 4), Span(4, 4, 6)), "abort"), range(5))
    assert answer.versions == [(3, 1, 4), (4, 4, 6)] and answer.finish == ""
    assert answer.rest.response == (9, 4, 5, 6, 7, 8)
    for spans in [
        (Span(4, 7, 7),),
        (Span(4, 0, 7),),
        (Span(4, 6, 8),),
        (Span(3, 1, 5), Span(4, 6, 7)),
        (Span(5, 6, 7),),
        (),
    ]:
        with pytest.raises(EngineError, match="version"):
            answer.add(Piece(1, (8,), (-1.0,), spans, ""), range(5))
    # Its engine died before it could say so.
    answer.add(answer.dated(Piece(1, (1, 2, 3), (-1.0,) * 3, (), ""), 4), range(5))
    answer.close_if_whole()
    assert answer.finish == "length"
