"""A run whose reward is a service: it trains as with a rule, counts what is lost, stops when refused, and continues."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from gspo_megatron.base.errors import DataError
from gspo_megatron.testing.fakes import OneRank
from tests.rewards.http_service import Answer, Service, serving
from tests.run.test_trainer import run, warnings_of, without_times
from tests.run.test_trainer_continues import continued

STEPS = ("train.steps=3", "algorithm.updates_per_rollout=4", "train.eval_every=0", "eval.rollouts=0")


def matches(request: Any, number: int = 0) -> Answer:
    """What exact_match gives."""
    return Answer({"scores": [float(r["response"].strip() == r["answer"]) for r in request["rollouts"]]})


def remote(service: Service, **parameters: Any) -> tuple[str, ...]:
    term = {"function": "remote", "name": "exact_match", "url": service.url, "backoff_s": 0.01, **parameters}
    return ("reward.functions={}", f"reward.terms=[{json.dumps(term)}]", *STEPS)


def test_a_service_trains_as_a_rule_does_and_is_asked_once() -> None:
    """Also in a run that is stopped between updates of a step, twice, and continued."""
    _, by_rule = run("reward.functions={exact_match: 1.0}", *STEPS)
    with serving(matches) as service:
        _, rows = run(*remote(service))
        asked = len(service.requests)
        _, writer, positions = continued(remote(service), [3, 3, 2], OneRank())
    assert without_times(rows) == without_times(writer.rows) == without_times(by_rule)
    assert all(p.updates for p in positions), positions
    assert len(service.requests) == 2 * asked


def test_a_failing_service_is_counted_and_a_refusal_stops() -> None:
    refuses, failed = threading.Event(), set()

    def answer(request: Any, number: int) -> Answer:
        if refuses.is_set():
            return Answer({"error": "expired"}, 401)
        (rollout,) = request["rollouts"]
        if rollout["id"] % 8 == 7:
            failed.add(rollout["id"])
            return Answer({}, 500)
        return matches(request)

    with serving(answer) as service:
        settings = (*remote(service, batch_size=1, retries=1, failures=1000), "reward.on_error=count")
        trainer, rows = run(*settings)
        assert [row["reward/lost"] for row in rows if "reward/lost" in row] == [4, 4, 4] and len(failed) == 12
        assert any("4 rollouts without a reward" in w and "HTTP 500" in w for w in warnings_of(trainer))
        refuses.set()
        with pytest.raises(DataError, match=r"(?s)could not be scored.*HTTP 401: \{\"error\": \"expired\"\}"):
            run(*settings)
