"""A language model that rates responses: its prompt, its ratings, and answers that are none. The endpoint is a real
HTTP server on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.rewards.ratings import rating
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from tests.rewards.http_service import Answer, Service, serving
from tests.rewards.test_remote import QUICK, rollouts

ANSWERS = {
    "good": "Both steps are right. (I would not say Rating: 3.)\n**Rating:** 8.5",
    "prose": "What a wonderful response, I enjoyed it.",
    "eleven": "Rating: 11",
    "empty": "",
    "null": None,
    "cut": "Let me think about",
    "garbage": "",
    "overloaded": "",
}


def completion(request: Any, number: int) -> Answer:
    """As the OpenAI API, vLLM and SGLang answer."""
    text = request["messages"][-1]["content"]
    case = next((name for name in ANSWERS if f"<{name}>" in text), "good")
    if case == "garbage":
        return Answer({"object": "chat.completion", "choices": []})
    if case == "overloaded":
        return Answer({"error": {"message": "overloaded"}}, 503)
    message = {"role": "assistant", "content": ANSWERS[case]}
    reason = "length" if case == "cut" else "stop"
    return Answer({"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]})


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving(completion) as service:
        service.url = service.url.replace("/score", "/v1")
        yield service


@pytest.fixture(scope="module")
def judge(service: Service) -> Iterator[Rewards]:
    rewards = open_judge(service)
    yield rewards
    rewards.close()


def open_judge(service: Service, **parameters: Any) -> Rewards:
    term = {"function": "judge", "url": service.url, "model": "big", **QUICK, **parameters}
    return Rewards({}, None, "count", terms=[term])


def test_a_rating_becomes_a_score(judge: Rewards, service: Service) -> None:
    judge.check_services()
    (found,) = rollouts("It is {prompt} {7}.")
    score_rollouts(judge, [found])
    assert found.reward == 0.85 and found.reward_terms == {"judge": 0.85, "judge/rating": 8.5}
    request = service.requests[-1]
    assert {k: request[k] for k in ("model", "temperature", "max_tokens")} == {
        **{"model": "big", "temperature": 0, "max_tokens": 1024}
    }
    (message,) = request["messages"]
    text = message["content"]
    system = {"role": "system", "content": "S"}
    found.prompt = replace(found.prompt, text="<|im_start|>", messages=(system, *found.prompt.messages))
    score_rollouts(judge, [found])
    assert "<question>\nsystem: S\n\nuser: what?\n</question>" in service.requests[-1]["messages"][0]["content"]
    # What a response writes in braces is not filled in.
    assert (
        "<question>\nwhat?\n</question>" in text and "It is {prompt} {7}." in text and "from 0 (useless) to 10" in text
    )


def test_answers_without_a_rating_cost_the_rollout_its_reward(judge: Rewards) -> None:
    found = rollouts(*(f"<{name}>" for name in ANSWERS))
    score_rollouts(judge, found)
    errors = {
        "prose": "the judge gave no rating that pattern finds: 'What a wonderful response",
        "eleven": "the judge's rating 11 is not from 0 to 10",
        "empty": "the judge's answer has no text: ''",
        "null": "the judge's answer has no text: None",
        "cut": "the judge's answer was cut; raise max_tokens in options",
        "garbage": "'choices': []}, which is not a chat completion",
        "overloaded": "HTTP 503",
    }
    for name, rollout in zip(ANSWERS, found, strict=True):
        assert (rollout.reward, bool(rollout.reward_error)) == ((0.85, False) if name == "good" else (0, True))
        assert errors.get(name, "") in rollout.reward_error and rollout.reward_lost == (name not in ("good", "garbage"))
    with pytest.raises(DataError, match="6 of 8 rollouts were lost"):
        refuse_unscored(found)


def test_the_same_request_is_made_once(service: Service, tmp_path: Path) -> None:
    cache = tmp_path / "run" / "judge"
    before = len(service.requests)
    first = open_judge(service, cache=str(cache))
    found = rollouts("same", "same", "same", "other", "<prose>")
    score_rollouts(first, found)
    score_rollouts(first, found)
    first.close()
    assert len(service.requests) - before == 4  # a failure is not kept
    (file,) = cache.iterdir()
    with file.open("a") as end:
        end.write('["torn", {"sco')
    before = len(service.requests)
    second = open_judge(service, cache=str(cache))
    score_rollouts(second, again := rollouts("same", "other"))
    second.close()
    assert [r.reward for r in again] == [0.85, 0.85] and len(service.requests) == before
    third = open_judge(service, cache=str(cache), model="small")
    score_rollouts(third, rollouts("same"))
    third.close()
    assert len(service.requests) == before + 1 and len(list(cache.iterdir())) == 2
    assert [len(json.loads(line)) for line in file.read_text().splitlines()[:-1]] == [2, 2]


@pytest.mark.parametrize(
    ("answer", "pattern", "expected"),
    [
        ("Rating: 3\nRating: 10", r"rating\W{1,8}(\d+)", 1.0),
        ("RATING - 1", r"rating\W{1,8}(\d+)", 0.0),
        ("so 5.5", r"[\d.]+", 0.5),
        ("Rating: nan", r"rating: (\w+)", "rating nan is not from 1 to 10"),
        ("Rating: good", r"rating: (\w+)", "rating 'good' is not a number"),
        ("Rating:", r"rating:(\d)?", "rating None is not a number"),
    ],
)
def test_rating(answer: str, pattern: str, expected: float | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            rating(response=answer, pattern=pattern, low=1, high=10)
    else:
        assert rating(response=answer, pattern=pattern, low=1, high=10)["score"] == expected


def test_a_judge_without_ratings_is_refused_before_the_run(service: Service) -> None:
    rewards = open_judge(service, template="{response} <prose>")
    with pytest.raises(ConfigError, match=r"(?s)no rating that pattern finds.* asked to rate a trial before the run"):
        rewards.check_services()
    rewards.close()


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"template": "Rate {respons}."}, r"has no place for \{response\}; did you mean 'respons'"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "(a)(b)"}, "has several groups"),
        ({"range": [10, 0]}, r"range=\[10, 0\] must be two numbers"),
        ({"range": [0, math.inf]}, "must be two numbers"),
        ({"range": [False, 1]}, "must be two numbers"),
        ({"options": {"stream": True}}, "options: 'stream' cannot be set"),
        ({"cache": __file__}, "name a folder that can be written"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Rewards({}, terms=[{"function": "judge", "url": "http://host/v1", "model": "m", **parameters}])
