"""What a reward function is called with, and what it may return: in a process of its own and here alike."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import parts
from gspo_megatron.rewards.rewards import Rewards, Score
from gspo_megatron.rollout.group_scores import GroupScores
from gspo_megatron.testing.time_limits import time_factor

MODULE = """
import threading

def everything(prompt, response, answer, messages, metadata, truncated, tokens, *, scale=1.0):
    assert prompt == "what?" and answer == "a" and messages == [{"role": "user", "content": "what?"}]
    assert metadata == {"level": 3, "tags": ["x", None]}
    return {"score": scale * len(response), "tokens": len(tokens), "cut": int(truncated)}

def batch(responses, answers, tokens, metadata):
    assert len(answers) == len(tokens) == len(metadata)
    return [len(set(responses)) + i for i in range(len(responses))]

async def asynchronous(response, **others):
    return len(others) / 2

async def async_batch(responses): return [1.0] * len(responses)
def only_keywords(**given): return len(given)
def one_part(response): return {"score": 1.0, **({"long": 1.0} if len(response) > 1 else {})}
def counts(response): return 1.0
def no_signature(response, threshold): return 1.0
def by_position(response, /): return 1.0
class Judge:
    async def __call__(self, response): return 0.25
judge = Judge()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"protocol_{tmp_path.name}"  # not one that an earlier test has imported
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def group(*texts: str, ids: range | None = None) -> list[Rollout]:
    messages = ({"role": "user", "content": "what?"},)
    prompt = Prompt(5, "what?", (2,), "a", messages=messages, metadata={"level": 3, "tags": ["x", None]})
    ids = ids or range(len(texts))
    return [Rollout(i, prompt, [4] * len(t), [], not i, 0, text=t) for i, t in zip(ids, texts, strict=True)]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_function_gets_what_it_names(module: str, isolate: bool) -> None:
    names = ("batch", "asynchronous", "async_batch", "only_keywords", "judge", "one_part")
    terms = [{"function": f"{module}:{name}", "name": name, "weight": 0} for name in names]
    terms.append({"function": f"{module}:everything", "name": "all", "scale": 0.5, "weight": 2})
    rewards = Rewards({}, accuracy="all", terms=terms, isolate=isolate)
    scores = rewards.score(group("a", "bcd"))
    rewards.close()
    same = {"asynchronous": 3.0, "async_batch": 1.0, "only_keywords": 7.0, "judge": 0.25, "one_part": 1.0}
    assert scores == [
        Score(1.0, {"batch": 2.0, **same, "all": 0.5, "all/tokens": 1.0, "all/cut": 1.0}),
        Score(3.0, {"batch": 3.0, **same, "one_part/long": 1.0, "all": 1.5, "all/tokens": 3.0, "all/cut": 0.0}),
    ]


def test_a_gate_closes_all_later_terms() -> None:
    terms = [
        {"function": "length", "weight": 0.5, "max_tokens": 4, "buffer": 2},
        {"function": "format", "pattern": r"<think>.*</think>\s*\d+", "gate": True},
        {"function": "last_number", "weight": 2},
    ]
    rewards = Rewards({"exact_match": 1.0}, accuracy="last_number", terms=terms)
    asked = Prompt(0, "", (2,), "7")
    texts = {"<think>3+4\n</think> 7": [4] * 3, "<think></think> 8": [4], "so 7": [4] * 9, "7": [4]}
    rollouts = [Rollout(i, asked, tokens, [], False, 0, text=t) for i, (t, tokens) in enumerate(texts.items())]
    scores = rewards.score(rollouts)
    assert [tuple(s.terms.values()) for s in scores] == [(0, -0.5, 1, 1), (0, 0, 1, 0), (0, -1, 0, 0), (1, 0, 0, 0)]
    assert [s.reward for s in scores] == [1.75, 0, -0.5, 1]
    assert Rewards({}, terms=terms[1:])._accuracy == "last_number"  # the first that is no gate


def test_a_pattern_that_backtracks_for_ever_costs_one_reward() -> None:
    rewards = Rewards({}, terms=[{"function": "format", "pattern": "(a|a)*b"}], timeout_s=0.5, workers=2)
    scores = rewards.score(group("a" * 60, "aab"))
    rewards.close()
    assert [s.reward for s in scores] == [0, 1] and scores[0].lost


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"name": "x"}], "names no function"),
        ([{"functoin": "format"}], "did you mean 'functoin'"),
        ([{"function": "format", "wieght": 2}], "no parameter 'wieght' to set"),
        ([{"function": "length", "max_tokens": 8}], "nothing gives its parameter 'buffer' a value"),
        ([{"function": "format", "gate": 1}], "gate=1 in .* must be a value of type bool"),
        ([{"function": "format", "weight": "2"}], "weight='2' in .* must be a value of type int or float"),
        ([{"function": "format", "gate": True}], "'format' is a gate to nothing"),
        ([{"function": "format", "pattern": "("}], "is not a regular expression"),
        ([{"function": "exact_match"}, {"function": "exact_match"}], "two terms are called 'exact_match'"),
        ([{"function": "MODULE:no_signature"}], "nothing gives its parameter 'threshold' a value; known are prompt, "),
        ([{"function": "MODULE:by_position"}], "nothing gives its parameter 'response'"),
        ([{"function": "MODULE:counts", "answer": "7"}], "no parameter 'answer' to set"),
    ],
)
def test_terms_that_cannot_work(module: str, terms: list[dict[str, Any]], message: str) -> None:
    terms = [{k: v.replace("MODULE", module) if isinstance(v, str) else v for k, v in t.items()} for t in terms]
    with pytest.raises(ConfigError, match=message):
        Rewards({}, terms=terms)


def results() -> list[tuple[Any, str]]:
    import numpy as np
    import torch

    return [
        (True, r"True \(bool\)"),
        ("1.0", r"'1.0' \(str\)"),
        (None, r"None \(NoneType\)"),
        (float("nan"), "returned nan; expected a finite number"),
        (10**400, "too large"),
        (torch.tensor(1.0), r"tensor\(1.\) \(torch.Tensor\)"),
        (np.float32(1), r"\(numpy.float32\)"),
        (np.float64(1), r"\(numpy.float64\)"),
        (np.zeros(2), r"\(numpy.ndarray\)"),
        ([1.0], r"\[1.0\] \(list\)"),
        ({"value": 1.0}, "or a dict with a 'score'"),
        ({"score": 1.0, "right": True}, r"True \(bool\)"),
        ({"score": 1.0, "a/b": 1.0}, "use text without '/'"),
        ({"score": 1.0, 3: 1.0}, "use text without '/'"),
    ]


@pytest.mark.parametrize(("value", "message"), results(), ids=lambda value: str(type(value).__name__))
def test_what_is_no_score(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError), match=message):
        parts(value)


def test_groups_are_scored_while_others_are_sampled() -> None:
    """The sampler here ends its second group only when the first one has its reward."""
    scored = threading.Event()

    class Waited:
        groups_at_once = 1

        def score(self, rollouts: list[Rollout]) -> list[Score]:
            assert [r.text for r in rollouts] == ["decoded"] * 2
            scored.set()
            return [Score(float(r.id), {}) for r in rollouts]

    def decode(rollout: Rollout) -> None:
        rollout.text = "decoded"

    rollouts = group("", "", "", "", ids=range(10, 14))
    with GroupScores(Waited(), decode, first_id=10, size=2) as scores:
        for rollout in (rollouts[1], rollouts[2], rollouts[0]):
            scores.add(rollout)
        assert scored.wait(timeout=10 * time_factor())
        scores.add(rollouts[3])
        scores.finish()
    assert [r.reward for r in rollouts] == [10, 11, 12, 13]


def test_an_error_in_a_thread_reaches_the_run() -> None:
    class Broken:
        groups_at_once = 1

        def score(self, rollouts: list[Rollout]) -> list[Score]:
            raise ConfigError("no such reward")

    with (
        pytest.raises(ConfigError, match="no such reward"),
        GroupScores(Broken(), lambda rollout: None, first_id=0, size=1) as scores,
    ):
        scores.add(group("a")[0])
        scores.finish()


def test_a_module_here_is_the_one_in_the_processes(module: str) -> None:
    """A function that needs a process is not imported in this one."""
    rewards = Rewards({f"{module}:counts": 1.0})
    assert module not in sys.modules and rewards.score(group("a"))[0].reward == 1
    rewards.close()
