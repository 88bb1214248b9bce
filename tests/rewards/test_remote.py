"""Rewards from an HTTP service: a real one on this machine, which answers well, badly, late or not at all."""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.rewards.client import _retry_after
from gspo_megatron.rewards.judge import JudgeParameters
from gspo_megatron.rewards.remote import RemoteParameters
from gspo_megatron.rewards.reward_model import RewardModelParameters
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from gspo_megatron.rollout.group_scores import GroupScores
from gspo_megatron.testing.time_limits import time_factor
from tests.rewards.http_service import Answer, Service, serving

QUICK = {"backoff_s": 0.01, "retries": 2}


def rollouts(*texts: str) -> list[Rollout]:
    prompt = Prompt(5, "what?", (2,), "a", messages=({"role": "user", "content": "what?"},), metadata={"level": 3})
    return [Rollout(i, prompt, [4] * len(t), [], not i, 0, text=t) for i, t in enumerate(texts)]


def lengths(request: Any, number: int = 0) -> Answer:
    return Answer({"scores": [float(len(r["response"])) for r in request["rollouts"]]})


@pytest.fixture
def opened() -> Iterator[Callable[..., Rewards]]:
    made: list[Rewards] = []

    def open(service: Service | str, on_error: str = "count", environment: Any = None, **parameters: Any) -> Rewards:
        url = service if isinstance(service, str) else service.url
        term = {"function": "remote", "url": url, **QUICK, **parameters}
        made.append(Rewards({}, None, on_error, terms=[term], environment=environment or {}))
        return made[-1]

    yield open
    for rewards in made:
        rewards.close()


def scored(rewards: Rewards, *texts: str) -> list[Rollout]:
    asked = rollouts(*texts)
    score_rollouts(rewards, asked)
    return asked


def test_a_group_is_sent_in_batches_with_token_and_request_id(opened: Callable[..., Rewards]) -> None:
    def parts(request: Any, number: int) -> Answer:
        return Answer({"scores": [{"score": r["id"], "cut": int(r["truncated"])} for r in request["rollouts"]]})

    with serving(parts) as service:
        rewards = opened(service, environment={"JUDGE": " secret\n"}, token_variable="JUDGE", batch_size=2)
        rewards.check_services()
        found = scored(rewards, "a", "né\ud800", "c")
    assert [r.reward for r in found] == [0, 1, 2] and found[0].reward_terms == {"remote": 0, "remote/cut": 1}
    trial, *batches = service.requests
    assert trial == {"rollouts": []} and sorted(len(b["rollouts"]) for b in batches) == [1, 2]
    sent = {r["id"]: r for b in batches for r in b["rollouts"]}
    assert sent[1]["response"] == "né?"
    assert sent[0] == {
        **{"id": 0, "prompt": "what?", "response": "a", "answer": "a", "truncated": True, "metadata": {"level": 3}},
        "messages": [{"role": "user", "content": "what?"}],
    }
    assert {h["Authorization"] for h in service.headers} == {"Bearer secret"}
    assert len({h["X-Request-Id"] for h in service.headers}) == 3


@pytest.mark.parametrize(
    ("score", "error"),
    [
        (True, r"it returned True \(bool\)"),
        ("1", r"it returned '1' \(str\)"),
        (math.nan, "it returned nan; expected a finite"),
        (None, "it returned None"),
        (10**400, "OverflowError"),
        ({"score": [1]}, r"it returned \[1\] \(list\)"),
        ({"mean": 1}, "expected a number, or a dict with a 'score'"),
        ({"error": "does not \x1b[31mcompile"}, r"ServiceError: does not \\x1b\[31mcompile"),
    ],
)
def test_what_is_no_score_is_an_error_of_its_rollout(opened: Callable[..., Rewards], score: Any, error: str) -> None:
    with serving(lambda request, _: Answer({"scores": [1, score]})) as service:
        found = scored(opened(service, "stop"), "good", "bad")
    assert found[0].reward == 1 and not found[0].reward_error
    assert math.isnan(found[1].reward) and not found[1].reward_lost
    with pytest.raises(DataError, match=rf"(?s)1 rollout could not.*rollout 1, .* reward 'remote' failed: .*{error}"):
        refuse_unscored(found)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer({"scores": [1]}), "1 score for 2 rollouts"),
        (Answer([1, 2]), "answered [1, 2]; expected {'scores'"),
        (Answer({"scores": {"0": 1}}), "expected {'scores'"),
        (Answer(b"<html>It works!</html>"), "'<html>It works!</html>' is not JSON (request "),
        (Answer(b"[" * 100_000), "is not JSON"),
        (Answer(b"1" * (2**24 + 1)), "an answer of more than 16,777,216 bytes"),
        (Answer({"detail": "no field x"}, 422), 'HTTP 422: {"detail": "no field x"} (request '),
    ],
)
def test_a_useless_answer_is_an_error_of_its_rollouts(
    opened: Callable[..., Rewards], answer: Answer, error: str
) -> None:
    with serving(lambda *_: answer) as service:
        found = scored(opened(service), "one", "two")
    assert [(r.reward, r.reward_lost) for r in found] == [(0, False)] * 2
    assert all(error in r.reward_error for r in found), found[0].reward_error
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer({}, 500), "HTTP 500: {} (try 3 of 3, request "),
        (Answer(b"", 503), "HTTP 503: (empty) (try 3 of 3"),
        (Answer({}, 429, {"Retry-After": "0"}), "HTTP 429"),
        (Answer({}, wait_s=1000), "no answer within timeout_s=0.3 s (try 3 of 3"),
        (Answer(b"{", drip=True), "no answer within timeout_s=0.3 s (try 3 of 3"),
    ],
)
def test_no_answer_costs_the_rollouts_their_rewards(opened: Callable[..., Rewards], answer: Answer, error: str) -> None:
    with serving(lambda *_: answer) as service:
        found = scored(opened(service, "stop", timeout_s=0.3), "one", "two")
    assert [(r.reward, r.reward_lost) for r in found] == [(0, True)] * 2 and error in found[1].reward_error
    assert len(service.requests) == 3 and len({h["X-Request-Id"] for h in service.headers}) == 1
    with pytest.raises(DataError, match=r"2 of 2 rollouts were lost with the processes or services"):
        refuse_unscored(found)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 2", b"\x00\x01garbage\r\n\r\n"])
def test_what_does_not_speak_http_costs_the_rollout_its_reward(opened: Callable[..., Rewards], reply: bytes) -> None:
    def answer() -> None:
        for _ in range(3):
            connection, _ = server.accept()
            with closing(connection):
                connection.recv(2**16)
                connection.sendall(reply)

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        (found,) = scored(opened(f"http://127.0.0.1:{server.getsockname()[1]}/"), "one")
        thread.join(10 * time_factor())
    assert found.reward_lost and "RemoteProtocolError" in found.reward_error


def test_a_failing_service_is_asked_again_and_its_time_is_kept(opened: Callable[..., Rewards]) -> None:
    def answer(request: Any, number: int) -> Answer:
        return (
            Answer({}, 429, {"Retry-After": "1"}) if number < 1 else Answer({}, 502) if number < 2 else lengths(request)
        )

    with serving(answer) as service:
        (found,) = scored(opened(service), "four")
        assert found.reward == 4 and not found.reward_error
        assert service.times[1] - service.times[0] >= 1.0 and len(service.times) == 3
    with serving(lambda *_: Answer({}, 429, {"Retry-After": "3600"})) as service:
        (lost,) = scored(opened(service), "four")
    assert lost.reward_lost and "asks to wait 3600 s, more than max_wait_s=60" in lost.reward_error
    assert len(service.requests) == 1
    with serving(lambda *_: Answer({}, 429, {"Retry-After": "1"})) as service:
        (lost,) = scored(opened(service, retries=0), "four")
    assert lost.reward_lost and "HTTP 429" in lost.reward_error and "asks to wait" not in lost.reward_error


def test_retry_after() -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 28 < _retry_after(format_datetime(soon, usegmt=True)) <= 30
    given = ("7", "", "soon", "-3", "Wed, 21 Oct 2015 07:28:00 GMT", "²", "inf")
    assert [_retry_after(text) for text in given] == [7, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("on_error", ["stop", "count"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer({"error": "Bearer wr0ng"}, 401), 'HTTP 401: {"error": "Bearer [token]"}; correct .* variable KEY'),
        (Answer({}, 404), "HTTP 404"),
        (Answer({}, 307, {"Location": "/other"}), "sends to '/other'; set url"),
    ],
)
def test_wrong_settings_stop_the_run(opened: Callable[..., Rewards], answer: Answer, error: str, on_error: str) -> None:
    with serving(lambda *_: answer) as service:
        rewards = opened(service, on_error, token_variable="KEY", environment={"KEY": "wr0ng"})
        with pytest.raises(ConfigError, match="reward 'remote': ") as refused:
            rewards.check_services()
        found = scored(rewards, "one", "two")
    assert "wr0ng" not in str(refused.value) and len(service.requests) == 1  # no later one could succeed
    assert not any(r.reward_lost for r in found)
    with pytest.raises(DataError, match=error.replace("[", r"\[").replace("{", r"\{")) as stopped:
        refuse_unscored(found)
    assert "set reward.on_error=count" not in str(stopped.value)  # which would not help


def test_the_trial_finds_a_wrong_address_and_a_missing_token(opened: Callable[..., Rewards]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=r"(?s)ConnectError.*start the service, or correct url"):
        opened(f"http://127.0.0.1:{port}/").check_services()
    with serving(lengths) as service:
        with pytest.raises(ConfigError, match="environment variable KEY, which token_variable names, is not set"):
            opened(service, token_variable="KEY").check_services()
        with pytest.raises(ConfigError, match="KEY, which token_variable names, holds what no token can be"):
            opened(service, token_variable="KEY", environment={"KEY": "a\nb"}).check_services()
        assert service.requests == []
        opened(service).check_services()


def test_services_are_tried_at_once() -> None:
    together = threading.Barrier(2, timeout=10 * time_factor())

    def answer(request: Any, number: int) -> Answer:
        try:
            together.wait()
        except threading.BrokenBarrierError:
            return Answer({}, 400)
        return Answer({"scores": []})

    with serving(answer) as service:
        terms = [{"function": "remote", "name": name, "url": service.url, "retries": 0} for name in ("one", "two")]
        with closing(Rewards({}, terms=terms)) as rewards:
            rewards.check_services()


def test_after_failures_in_a_row_none_is_sent_for_a_while(opened: Callable[..., Rewards]) -> None:
    broken = threading.Event()
    broken.set()
    with serving(lambda request, _: Answer({}, 500) if broken.is_set() else lengths(request)) as service:
        rewards = opened(service, retries=0, failures=2, pause_s=1.0, concurrency=1, batch_size=1)
        found = scored(rewards, *"abcd")
        assert len(service.requests) == 2 and all(r.reward_lost for r in found)
        assert "not asked: the last 2 requests failed; again in" in found[3].reward_error
        broken.clear()
        time.sleep(1.1)
        assert [r.reward for r in scored(rewards, *"ab")] == [1, 1]


def test_failures_between_answers_are_not_in_a_row(opened: Callable[..., Rewards]) -> None:
    """A refusal of these rollouts is an answer: the service is there."""
    with serving(lambda request, number: Answer({}, 400 if number % 2 else 500)) as service:
        found = scored(opened(service, retries=0, failures=2, concurrency=1, batch_size=1), *"abcdef")
    assert len(service.requests) == 6 and [r.reward_lost for r in found] == [True, False] * 3


def test_the_table_of_the_docs_has_every_parameter() -> None:
    """With its default, where that is a number."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \| (.*?) \|", page, re.MULTILINE)
    found = {(of, name): default for name, of_all, default in rows for of in re.findall(r"\w+", of_all)}
    for of, kind in (("remote", RemoteParameters), ("judge", JudgeParameters), ("reward_model", RewardModelParameters)):
        declared = {each.name: each.default for each in fields(kind)}
        assert {name for one, name in found if one == of} == declared.keys()
        for name, default in declared.items():
            if isinstance(default, (int, float)):
                assert found[of, name] == f"{default:g}"


def test_requests_are_concurrent_up_to_a_limit_while_groups_are_sampled(opened: Callable[..., Rewards]) -> None:
    def slow(request: Any, number: int) -> Answer:
        return lengths(request)._replace(wait_s=0.2)

    with serving(slow) as service:
        rewards = opened(service, concurrency=3)
        asked = rollouts(*["ab"] * 12)
        with GroupScores(rewards, lambda _: None, first_id=0, size=2) as scores:
            start = time.monotonic()
            for rollout in asked:
                scores.add(rollout)
            added_s = time.monotonic() - start
            scores.finish()
    assert [r.reward for r in asked] == [2.0] * 12 and service.most_at_once == 3
    assert added_s < 0.4 * time_factor()  # sampling does not wait for six requests of 0.2 s


def test_closing_lets_no_one_wait(opened: Callable[..., Rewards]) -> None:
    ended: list[BaseException] = []

    def wait(rewards: Rewards) -> None:
        try:
            rewards.score(rollouts("one"))
        except BaseException as error:
            ended.append(error)

    with serving(lambda *_: Answer({}, wait_s=1000)) as service:
        rewards = opened(service)
        thread = threading.Thread(target=wait, args=(rewards,), daemon=True)
        thread.start()
        while not service.requests:
            time.sleep(0.01)
        rewards.close()
        thread.join(10 * time_factor())
    assert [type(error).__name__ for error in ended] == ["CancelledError"]


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({}, "it needs url: write"),
        ({"url": 5}, "url=5 must be a value of type str"),
        ({"url": "localhost:80"}, "url='localhost:80' must be an address such as http"),
        ({"url": "http://me:secret@host/"}, "url holds a password"),
        ({"url": "http://host", "batchsize": 3}, "no parameter 'batchsize' to set; did you mean 'batch_size'"),
        ({"url": "http://host", "batch_size": True}, "batch_size=True must be a value of type int"),
        ({"url": "http://host", "concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"url": "http://host", "timeout_s": math.nan}, "timeout_s=nan must be above 0"),
        ({"url": "http://host", "fields": ["respons"]}, "'respons' is not one of .*; did you mean 'response'"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=f"reward 'remote' cannot be used: .*{error}") as refused:
        Rewards({}, terms=[{"function": "remote", **parameters}])
    assert "secret" not in str(refused.value)
