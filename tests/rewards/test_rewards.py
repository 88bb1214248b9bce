from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from gspo_megatron.rewards.rules import REWARDS
from gspo_megatron.rewards.user_code import described


def rollout(text: str, answer: str = "", id: int = 0, prompt: str = "what?") -> Rollout:
    return Rollout(id, Prompt(5, prompt, (2, 3), answer), [4], [-0.1], False, 0, text=text)


def judge(name: str, response: str, answer: str) -> float:
    return REWARDS[name](prompt="what?", response=response, answer=answer)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module, importable as Python imports from the working folder."""
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(prompt, response, answer):\n    return 1 / (1 + len(response)) + (prompt == answer)\n"
        "def exact(*, response, answer, **_):\n    return float(response == answer)\n"
        "def raises(**_):\n    raise KeyError('lost')\n"
        "def nan(**_):\n    return float('nan')\n"
        "def infinite(**_):\n    return 1e999\n"
        "def text(**_):\n    return '1.0'\n"
        "def nothing(**_):\n    pass\n"
        "def other_arguments(text):\n    return 1.0\n"
        "def exits(**_):\n    raise SystemExit(0)\n"
        "number = 3\n"
    )
    (tmp_path / "a_script.py").write_text("import sys\n\ndef f(prompt, response, answer): ...\n\nsys.exit(0)\n")
    (tmp_path / "careless.py").write_text(
        "import os, torch\n\ndef careless():\n    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n    os.chdir('/')\n\ncareless()\n\n"
        "def f(response):\n    careless()\n    raise KeyError('and then fails')\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [(" 123\n", "123", 1), ("123", " 123 ", 1), ("1234", "123", 0), ("", "123", 0), ("12 3", "123", 0)],
)
def test_exact_match(response: str, answer: str, reward: float) -> None:
    assert judge("exact_match", response, answer) == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so 72\n#### 72", "48+24=72\n#### 72", 1),
        ("#### 72.0", "#### 72", 1),
        ("####72.", "#### 72", 1),
        ("#### $1,200.50", "#### 1200.5", 1),
        ("#### -3", "#### -3", 1),
        ("#### +3", "#### 3", 1),
        ("#### .5", "#### 0.5", 1),
        ("#### 3 and then #### 72 \nmore", "72", 1),
        ("#### 9007199254740993", "#### 9007199254740992", 0),
        ("72", "#### 72", 0),
        ("#### 3", "#### -3", 0),
        ("#### 72\n#### 73", "#### 72", 0),
        ("#### 72 or 73", "#### 72", 0),
        ("#### 72/3", "#### 72", 0),
        ("#### 1,2", "#### 12", 0),
        ("#### 7e1", "#### 70", 0),
        ("#### \n72", "#### 72", 0),
        ("", "#### 72", 0),
    ],
)
def test_final_number(response: str, answer: str, reward: float) -> None:
    assert judge("final_number", response, answer) == reward


@pytest.mark.parametrize("answer", ["", "seven", "#### seven", "it is 7"])
def test_final_number_needs_an_answer_with_a_number(answer: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        judge("final_number", "#### 7", answer)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("The answer is 12.", "#### 12", 1),
        ("3 + 4 = 7, so $1,200.50", "1200.5", 1),
        ("It is -3", "-3", 1),
        ("so x=-3", "-3", 1),
        ("from 5-3", "3", 1),
        ("12, or 13", "12", 0),
        ("no idea", "12", 0),
        ("", "12", 0),
    ],
)
def test_last_number(response: str, answer: str, reward: float) -> None:
    assert judge("last_number", response, answer) == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so \boxed{12}", "12", 1),
        (r"\boxed{1,200.0}", "1200", 1),
        (r"\boxed{\frac{1}{2}} at last", r"\frac{1}{2}", 1),
        (r"\boxed{ \frac{1} {2} }", r"\boxed{\frac{1}{2}}", 1),
        (r"\boxed{3} or \boxed{4}", "3", 0),
        (r"\boxed{12", "12", 0),
        ("12", "12", 0),
        ("", "12", 0),
    ],
)
def test_boxed(response: str, answer: str, reward: float) -> None:
    assert judge("boxed", response, answer) == reward


def test_last_number_needs_an_answer_with_a_number() -> None:
    with pytest.raises(ValueError, match="has no number"):
        judge("last_number", "7", "seven")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("I think\n#### 7", 1),
        ("#### -1,000.5\n", 1),
        ("#### 7\nDone.", 0),
        ("#### 7\n#### 7", 0),
        ("It is #### 7", 0),
        ("####", 0),
        ("#### seven", 0),
        ("7", 0),
        ("", 0),
    ],
)
def test_format(response: str, reward: float) -> None:
    assert REWARDS["format"](response=response) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7+5-3", 1),
        ("5+7-3\n", 1),
        ("7-3+5", 1),
        ("7+5-3-0", 0),
        ("7+5", 0),
        ("7+3-5", 0),
        ("9", 0),
        ("7 + 5 - 3", 0),
        ("+7+5-3", 0),
        ("7+5--3", 0),
        ("7+5-3=9", 0),
        ("__import__('os')", 0),
        ("9" * 10_000, 0),
        ("", 0),
    ],
)
def test_countdown_evaluates_the_expression(response: str, reward: float) -> None:
    assert judge("countdown", response, "7,5,3=9") == reward


def test_countdown_uses_each_number_as_often_as_it_is_given() -> None:
    assert judge("countdown", "4+4-2", "4,2,4=6") == 1
    assert judge("countdown", "4+2", "4,2,4=6") == 0
    with pytest.raises(ValueError, match="not a countdown exercise"):
        judge("countdown", "1", "#### 72")


def test_the_reward_is_the_weighted_sum_and_the_terms_stay_raw(user_module: None) -> None:
    rewards = Rewards({"final_number": 1.0, "format": 0.25, "my_rewards:brevity": 2, "exact_match": 0})
    good, bad = rollout("#### 7", "#### 7.0", prompt="#### 7.0"), rollout("#### 8\n", "7", id=1)
    score_rollouts(rewards, [good, bad])
    brevity = 1 / 7 + 1
    assert good.reward_terms == {"final_number": 1, "format": 1, "my_rewards:brevity": brevity, "exact_match": 0}
    assert good.reward == pytest.approx(1.25 + 2 * brevity, abs=1e-15)
    assert bad.reward == pytest.approx(0.25 + 2 / 8, abs=1e-15)
    assert [rewards.accuracy(good), rewards.accuracy(bad)] == [1.0, 0.0]
    assert not good.reward_error and not bad.reward_error
    refuse_unscored([good, bad])


def test_accuracy_is_the_named_term_whatever_its_weight(user_module: None) -> None:
    rewards = Rewards({"format": 1.0, "my_rewards:exact": 0.0}, accuracy="my_rewards:exact")
    answered = rollout("#### 7", "#### 7")
    score_rollouts(rewards, [answered])
    assert (answered.reward, rewards.accuracy(answered)) == (1.0, 1.0)
    assert rewards.accuracy(rollout_with(rewards, "#### 8", "#### 7")) == 0.0


def rollout_with(rewards: Rewards, text: str, answer: str) -> Rollout:
    scored = rollout(text, answer)
    score_rollouts(rewards, [scored])
    return scored


FAILURES = [
    ("my_rewards:raises", "KeyError: 'lost'"),
    ("my_rewards:nan", "returned nan"),
    ("my_rewards:infinite", "returned inf"),
    ("my_rewards:text", r"returned '1.0' \(str\)"),
    ("my_rewards:nothing", r"returned None \(NoneType\)"),
]


@pytest.mark.parametrize(("name", "reason"), FAILURES)
def test_a_failing_reward_stops_the_run_and_names_the_rollout(user_module: None, name: str, reason: str) -> None:
    rewards = Rewards({"exact_match": 1.0, name: 0.5})
    failed = rollout("a", "a", id=1234, prompt="How many?")
    score_rollouts(rewards, [failed])
    assert math.isnan(failed.reward)
    message = rf"(?s)^1 rollout could not.*rollout 1234, prompt 5 'How many\?': reward '{name}' failed: .*{reason}"
    with pytest.raises(DataError, match=message):
        refuse_unscored([rollout("b"), failed])


@pytest.mark.parametrize(("name", "reason"), FAILURES)
def test_a_failing_reward_can_count_as_zero(user_module: None, name: str, reason: str) -> None:
    rewards = Rewards({"exact_match": 1.0, name: 0.5}, on_error="count")
    failed = rollout_with(rewards, "a", "a")
    assert failed.reward == 1.0
    assert failed.reward_terms == {"exact_match": 1.0, name: 0.0}
    assert name in failed.reward_error
    refuse_unscored([failed])


def test_many_failures_are_counted_and_the_first_are_listed(user_module: None) -> None:
    rewards = Rewards({"my_rewards:raises": 1.0})
    failed = [rollout("a", id=100 + number) for number in range(7)]
    score_rollouts(rewards, failed)
    with pytest.raises(DataError) as caught:
        refuse_unscored(failed)
    assert "7 rollouts" in str(caught.value)
    assert [number for number in range(100, 107) if f"rollout {number}," in str(caught.value)] == [100, 101, 102]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exactmatch", r"unknown reward 'exactmatch'; did you mean 'exact_match'\?.*'module:function', called with"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("broken_rewards:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards:brevety", "AttributeError: .*'brevety'"),
        ("my_rewards:number", "TypeError: 3 is not a callable object"),
        ("my_rewards:other_arguments", r"TypeError: .*expected a function such as f\(prompt, response, answer\)"),
    ],
)
def test_a_reward_that_cannot_be_found_or_called(user_module: None, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rewards({name: 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": {}}, "reward.functions is empty"),
        ({"functions": {"format": math.nan}}, "weight nan of reward 'format'"),
        ({"functions": {"format": 1.0}, "accuracy": "exact_match"}, "not one of the rewards format.*weight 0"),
        ({"functions": {"format": 1.0}, "on_error": "skip"}, "'stop' or 'count'"),
    ],
)
def test_reward_settings_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rewards(**arguments)


def test_a_reward_that_exits_is_a_reward_that_fails(user_module: None) -> None:
    """sys.exit(0) in a reward, or at the end of its module, must not end the run as done, wherever it runs."""
    for isolate in (True, False):
        rewards = Rewards({"my_rewards:exits": 1.0}, None, "count", isolate=isolate)
        (score,) = rewards.score([rollout("a", "a")])
        assert score.reward == 0 and "SystemExit: 0" in score.error
        rewards.close()
        with pytest.raises(ConfigError, match=r"'a_script:f' cannot be used \(SystemExit: 0\)"):
            Rewards({"a_script:f": 1.0}, isolate=isolate)


def test_what_a_reward_changes_stays_with_it(
    user_module: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients, or in another folder, a run would go on and do the wrong thing."""
    monkeypatch.chdir(tmp_path)
    rewards = Rewards({"careless:f": 1.0}, None, "count", isolate=False)
    assert "KeyError" in rewards.score([rollout("a", "a")])[0].error
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and Path.cwd() == tmp_path


def test_what_an_error_says_is_shown_harmlessly() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert described(Silent()) == "Silent: its text cannot be had, RuntimeError"
    assert described(ValueError("\x1b[31mred\x1b[0m\nline")) == "ValueError: \\x1b[31mred\\x1b[0m\nline"
    assert len(described(ValueError("x" * 10**7))) < 2100


@pytest.mark.parametrize(("count", "value"), [(0, 0), (6, 0), (7, -0.25), (8, -0.5), (10, -1), (11, -1), (100, -1)])
def test_length_is_dapos_overlong_punishment(count: int, value: float) -> None:
    assert REWARDS["length"](tokens=[3] * count, max_tokens=10, buffer=4) == value


def test_length_needs_a_buffer_within_the_length() -> None:
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="must be from 1 to max_tokens=10"):
            REWARDS["length"](tokens=[], max_tokens=10, buffer=buffer)


@pytest.mark.parametrize(
    ("text", "n", "value"),
    [("", 3, 0), ("a b", 3, 0), ("a b c d", 3, 0), ("a b a b a b", 2, -3 / 5), ("no No no", 1, -2 / 3)],
)
def test_repetition(text: str, n: int, value: float) -> None:
    assert REWARDS["repetition"](response=text, n=n) == pytest.approx(value)


def test_format_by_a_pattern_is_of_the_whole_response() -> None:
    def matches(text: str) -> float:
        return REWARDS["format"](response=text, pattern=r"<a>.*</a>")

    assert [matches(t) for t in ("<a>x\ny</a>", " <a></a>\n", "<a></a> so", "so <a></a>")] == [1, 1, 0, 0]


def test_json_schema() -> None:
    pytest.importorskip("jsonschema")
    from gspo_megatron.rewards.structure import json_schema

    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    texts = {
        '{"city": "Rome"}': (1, 1),
        'Here:\n```json\n{"city": 1}\n```\nor\n```\n{"city": "Rome"}\n```': (1, 1),
        '{"city": 1}': (0, 1),
        "[" * 10**5: (0, 0),
        "Rome": (0, 0),
        "": (0, 0),
    }
    for text, (score, is_json) in texts.items():
        assert json_schema(response=text, schema=schema) == {"score": score, "is_json": is_json}
    with pytest.raises(ValueError, match="schema: 'strng' is not valid"):
        json_schema(response="{}", schema={"type": "strng"})
