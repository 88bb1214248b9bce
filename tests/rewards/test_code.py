"""The reward `code`: verdicts over programs of responses, and what a program cannot do to its score."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.build.programs import check_programs, describe_sandbox, sandbox_of
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.reward import CodeConfig, RewardConfig
from gspo_megatron.rewards import code
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from gspo_megatron.rewards.sandbox import settled
from gspo_megatron.testing.time_limits import time_factor
from tests.support.small import SMALL

ROOT = Path(__file__).parents[2]
SUMS = [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]
ADD = [{"call": "add", "args": [3, 4], "expected": 7}, {"call": "add", "args": ["a", "b"], "expected": "ab"}]
SANDBOX = {"isolation": "auto", "seconds": 0.5 * time_factor(), "memory_gib": 0.25, "output_mib": 0.1}

CASES: dict[str, tuple[str, list[Any], str, float]] = {
    # name: program, tests, verdict, share of tests passed
    "script": ("a, b = map(int, input().split()); print(a + b, '', sep=' \\n')", SUMS, "right", 1),
    "one_right": ("print(7)", SUMS, "wrong", 0.5),
    "spins": ("while True: pass", SUMS, "timed_out", 0),
    "all_memory": ("x = bytearray(8 << 30)", SUMS, "memory", 0),
    "raises": ("1 / 0", SUMS, "crashed", 0),
    "no_syntax": ("def f(: pass", SUMS, "crashed", 0),
    "floods": ("while True: print('x' * 9999)", SUMS, "crashed", 0),
    "function": ("def add(a, b): print('noise'); return a + b", ADD, "right", 1),
    "method": (
        "class Solution:\n    def add(self, a, b): return a + b",
        [{**case, "call": "Solution.add"} for case in ADD],
        "right",
        1,
    ),
    "wrong_function": ("def add(a, b): return 7", ADD, "wrong", 0.5),
    "raises_once": ("def add(a, b): return a + b + 0", ADD, "crashed", 0.5),
    "hangs_in_second": ("def add(a, b):\n    while a == 'a': pass\n    return a + b", ADD, "timed_out", 0.5),
    "memory_in_call": ("def add(a, b): return bytearray(8 << 30)", ADD, "memory", 0),
    "not_json": ("def add(a, b): return {1, 2}", ADD, "crashed", 0),
    "no_function": ("x = 1", ADD, "crashed", 0),
    "guarded": ("def add(a, b): return a + b\nif __name__ == '__main__': print(input())", ADD, "right", 1),
    # What models try where a test's own code, its status or its output decide.
    "exits_at_once": ("import os; print('ALL TESTS PASSED'); os._exit(0)", ADD, "crashed", 0),
    "says_it_passed": ("print('passed'); import sys; sys.exit(0)", SUMS, "wrong", 0),
    "equals_anything": (
        "class Yes(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Yes(1)",
        ADD,
        "wrong",
        0,
    ),
    "equals_anything_in_asserts": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return '7'\n"
        "def add(a, b): return Yes(1)",
        ["assert add(3, 4) == 7"],
        "wrong",
        0,
    ),
    "equals_any_set_in_asserts": (
        "class Yes(set):\n    def __eq__(self, other): return True\ndef add(a, b): return Yes()",
        ["assert add(3, 4) == set([7])", "assert add(3, 4) == frozenset((7,))", "assert sorted([7]) == add(3, 4)"],
        "wrong",
        0,
    ),
    "has_its_own_bool": (
        "def bool(x): return True\ndef add(a, b): return 0",
        ["assert add(3, 4) == 3 + 4", "assert add(3, 4)"],
        "wrong",
        0,
    ),
    "has_its_own_bool_for_not": (
        "def bool(x): return False\ndef add(a, b): return 7",
        ["assert not add(3, 4)"],
        "wrong",
        0,
    ),
    "is_not_a_number": (
        "def add(a, b): return float('nan')",
        ["assert add(3, 4) == 7", {"call": "add", "args": [3, 4], "expected": float("nan")}],
        "wrong",
        0,
    ),
    "forges_results": (
        "import os\nfor fd in range(3, 9):\n"
        "    try: os.write(fd, b'[true]\\n{\"right\": 1}\\n' * 9)\n    except OSError: pass\nos._exit(0)",
        ADD,
        "wrong",
        0,
    ),
    "forges_a_failure": ("import os, sys; os.write(2, b'sandbox_failed'); os._exit(255)", SUMS, "crashed", 0),
    "looks_for_answers": (
        "import gc, re\nfound = re.findall('SECRET-[0-9]+', repr(gc.get_objects()))\nprint(*found[:1])",
        [{"input": "", "output": "SECRET-4711"}],
        "wrong",
        0,
    ),
    "nests_deeply": ("def add(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x", ADD, "wrong", 0),
}


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    terms = [{"function": "code", "all_or_nothing": False}]
    found = Rewards({}, terms=terms, defaults={"code": {"sandbox": SANDBOX}}, workers=4)
    yield found
    found.close()


def rollout(text: str, tests: Any, id: int = 0) -> Rollout:
    return Rollout(id, Prompt(id, "Write it.", (1,), "", metadata={"tests": tests}), [1], [0.0], False, 0, text=text)


def fenced(program: str) -> str:
    return f"First an idea:\n```python\nprint('not this one')\n```\nNow:\n```python\n{program}\n```\nDone."


def test_every_program_gets_its_verdict(rewards: Rewards) -> None:
    rollouts = [rollout(fenced(program), tests, i) for i, (program, tests, *_) in enumerate(CASES.values())]
    score_rollouts(rewards, rollouts)
    found = {}
    for name, r in zip(CASES, rollouts, strict=True):
        (verdict,) = [v for v in code.VERDICTS if r.reward_terms[f"code/{v}"]]
        found[name] = (verdict, r.reward_terms["code"])
        assert r.reward == r.reward_terms["code"] and not r.reward_error
    assert found == {name: (verdict, share) for name, (_, _, verdict, share) in CASES.items()}


def test_where_the_program_is() -> None:
    def verdict(response: str, **how: Any) -> str:
        values = code.code(response=response, answer=json.dumps(SUMS), sandbox=SANDBOX, **how)
        return next(name for name in code.VERDICTS if values[name])

    half = code.code(response=fenced("print(7)"), answer=json.dumps(SUMS), sandbox=SANDBOX)
    assert half["score"] == 0 and half["wrong"] == 1  # all or nothing
    program = "a, b = map(int, input().split())\nprint(a + b)"
    assert verdict(fenced(program)) == "right"
    assert verdict(program) == "no_program" and verdict(program, fenced=False) == "right"
    assert verdict(f"```py\n{program}") == "no_program"  # the response was cut
    # In a list, as CommonMark reads it: lines lose as much indentation as the fence has, where they have it.
    in_a_list = "1. So:\n\n   ```python3\n   {}\n   ```\n"
    assert verdict(in_a_list.format(program.replace("\n", "\n   "))) == "right"
    assert verdict(in_a_list.format(program)) == "right"
    text = 'print("""\n \n""")'  # whose white space is the program's
    assert code._program(fenced(text)) == text + "\n"
    assert verdict(in_a_list.format(program.replace("\n", "\n     "))) == "crashed"
    assert verdict(f"```\r\n{program}\r\n```".replace("\r", "")) == "right"


ASSERTS = [
    "assert freq('abca') == {'a': 2, 'b': 1, 'c': 1}",
    "assert freq('') == {}, 'of nothing'",
    "assert {'x': 1} == freq('x')",
    "assert set(freq('ab')) == set(['a', 'b'])",
    "assert math.isclose(sum(freq('ab').values()) / 3, 0.667, rel_tol=0.001)",
    "assert not freq('')",
    "assert freq(None) is None",
]
PROGRAMS = {
    "right": "from collections import Counter\ndef freq(text): return None if text is None else Counter(text)",
    "a_dict": "def freq(text): return None if text is None else {c: text.count(c) for c in text}",
    "always_empty": "def freq(text): return {}",
    "one_too_many": "def freq(text): return text and {c: text.count(c) + (len(text) > 3) for c in text}",
    "raises": "def freq(text): return {c: text.count(c) for c in text}",
}


def test_asserts_hold_where_python_says_so() -> None:
    """Each on its own, as in a plain interpreter. What is compared with a literal is not told to the program."""
    terms = [{"function": "code", "all_or_nothing": False, "setup": "imports"}]
    own = Rewards({}, terms=terms, defaults={"code": {"sandbox": SANDBOX}}, workers=2)
    rollouts = [rollout(fenced(program), ASSERTS, i) for i, program in enumerate(PROGRAMS.values())]
    for each in rollouts:
        each.prompt.metadata["imports"] = ["import math"]
    score_rollouts(own, rollouts)
    own.close()
    shares = [sum(_holds(program, test) for test in ASSERTS) / len(ASSERTS) for program in PROGRAMS.values()]
    assert [r.reward for r in rollouts] == pytest.approx(shares) and shares[:2] == [1, 1] and shares[2] < shares[3] < 1
    asked = [case["evaluate"] for case in code._cases({"tests": ASSERTS}, "", "tests")]
    with pytest.raises(ValueError, match="its field 'imports' is null; expected code"):
        code.code(response="", answer="", metadata={"tests": ASSERTS}, setup="imports", sandbox=SANDBOX)
    assert asked[:3] == ["freq('abca')", "freq('')", "freq('x')"] and asked[5] == "not not (freq(''))"
    assert asked[3] == "set(freq('ab'))"


@pytest.mark.parametrize(
    ("assertion", "evaluate", "expected"),
    [
        ("assert set(f(3)) == set((4, 5))", "set(f(3))", {4, 5}),
        ("assert f() == set()", "f()", set()),
        ("assert tuple(sorted([3, 1])) == f()", "f()", (1, 3)),
        ("assert f() == frozenset({'a'})", "f()", frozenset("a")),
        # No literal: the program evaluates them as a whole.
        ("assert f() == sorted([1, 3], reverse=True)", None, True),
        ("assert f() == sorted([1, 'a'])", None, True),
        ("assert f() == set([[1]])", None, True),
        ("assert f() == set(g())", None, True),
        ("assert f() == open('/etc/passwd')", None, True),
        ("assert f() == [set([1])]", None, True),
        ("assert not f() == set([1])", None, False),
    ],
)
def test_what_the_program_is_told(assertion: str, evaluate: str | None, expected: Any) -> None:
    [case] = code._cases({"tests": [assertion]}, "", "tests")
    whole = "not not (" + assertion.removeprefix("assert ").removeprefix("not ") + ")"
    assert case == {"evaluate": evaluate or whole, "expected": expected}
    assert type(case["expected"]) is type(expected)


def test_numbers_of_numpy_are_numbers() -> None:
    program = (
        "import numpy\ndef add(a, b): return numpy.array([a, b]).sum()\ndef both(a): return {'x': [numpy.int64(a)]}\n"
    )
    program += "def more(a): return numpy.bool_(a > 1)\ndef half(a): return numpy.float32(a / 2)"
    tests = [
        {"call": "add", "args": [3, 4], "expected": 7},
        {"call": "half", "args": [3], "expected": 1.5},
        {"call": "both", "args": [3], "expected": {"x": [3]}},
        {"call": "more", "args": [3], "expected": True},
        *("assert add(3, 4) == 7", "assert half(3) == 1.5", "assert both(3) == {'x': [3]}", "assert more(3) == True"),
        {"call": "add", "args": [3, 4], "expected": 8},
        "assert more(3) == False",
    ]
    box = SANDBOX | {"seconds": 5 * time_factor(), "memory_gib": 1}
    values = code.code(
        response=fenced(program), answer="", metadata={"tests": tests}, all_or_nothing=False, sandbox=box
    )
    assert values["score"] == 0.8 and values["wrong"] == 1


def _holds(program: str, test: str) -> bool:
    try:
        exec(f"{program}\nimport math\n{test}", {})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "found, expected, equal",
    [
        (7, 7, True),
        (7.0, 7, True),
        (7, 7.0, True),
        (True, 1, False),
        (1, True, False),
        ("7", 7, False),
        ([1, [2]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"b": 1}, False),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (10**400, 1.0, False),
        (float("nan"), 1.0, False),
        (float("nan"), float("nan"), False),
        ({"a": [math.nan]}, {"a": [math.nan]}, False),
        (math.nan, 1, False),
        (None, None, True),
        (None, [], False),
    ],
)
def test_what_is_equal(found: Any, expected: Any, equal: bool) -> None:
    assert code._equal(found, expected) is equal


@pytest.mark.parametrize(
    "tests, said",
    [
        ("", "its answer is not JSON"),
        ("[]", "is not a list of tests"),
        ('{"input": "1"}', "is not a list of tests"),
        ('[{"input": "1"}]', "is not like"),
        ('[{"input": 1, "output": "2"}]', "is not like"),
        ('[{"call": "f", "args": 3, "expected": 1}]', "is not like"),
        ('[{"call": "f", "args": []}]', "is not like"),
        ("[3]", "is not like"),
        ('["assert f(3) =="]', "cannot be read"),
        ('["f(3) == 4"]', "is not an assert, as in"),
        ('["assert f(3)\\nassert f(4)"]', "is not an assert, as in"),
    ],
)
def test_tests_that_cannot_be_read_are_named(tests: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        code.code(response="", answer=tests, sandbox=SANDBOX)


def test_a_sandbox_that_fails_is_not_the_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It worked when the run started, and later does not."""
    monkeypatch.setattr(code, "_sandbox", lambda *_: _Broken())
    with pytest.raises(code.NotJudged, match="the sandbox failed: no room") as failed:
        code.code(response=fenced("print(1)"), answer=json.dumps(SUMS), sandbox={})
    assert failed.value.values == {**dict.fromkeys(code.VERDICTS, 0.0), "sandbox_failed": 1.0, "score": 0.0}


class _Broken:
    def run(self, *_: Any) -> Any:
        return code.Ended("sandbox_failed", 1, b"", "no room")


def test_lost_rollouts_stop_the_run_above_a_share() -> None:
    python = "tests.rewards.test_code:not_judged"
    rewards = Rewards({python: 1.0}, on_error="stop", isolate=False)
    rollouts = [rollout("lost" if i < 2 else "fine", SUMS, i) for i in range(8)]
    score_rollouts(rewards, rollouts)
    assert [r.reward for r in rollouts] == [0, 0] + [1] * 6 and [r.reward_lost for r in rollouts[:3]] == [1, 1, 0]
    assert rollouts[0].reward_terms == {python: 0.0, f"{python}/sandbox_failed": 1.0}
    refuse_unscored(rollouts, 0.25)
    with pytest.raises(DataError, match=r"(?s)2 of 8 rollouts were lost.*reward.most_lost=0.2.*no room"):
        refuse_unscored(rollouts, 0.2)


def not_judged(response: str) -> float:
    if response == "lost":
        raise code.NotJudged("no room", {"score": 0.0, "sandbox_failed": 1.0})
    return 1.0


def test_settings() -> None:
    def config(*overrides: str) -> Any:
        return load_config(None, [*SMALL, "model.vocab_size=null", *overrides])

    check_programs(config())
    asked = config("reward.functions={code: 1}", "reward.code.isolation=none", "reward.code.seconds=2")
    assert asked.reward.code == {"isolation": "none", "seconds": 2}
    sandbox = sandbox_of(asked)
    assert sandbox["total_seconds"] == 48 and sandbox["memory_gib"] == 1
    assert any("no sandbox" in line for line in describe_sandbox(asked))
    asked = config("reward.terms=[{function: code}]")
    assert sandbox_of(asked)["isolation"] in ("bwrap", "landlock")
    for overrides, said in (
        (["reward.code.isolation=chroot"], "is not one of auto, bwrap, landlock, none"),
        (["reward.code.isolate=none"], "did you mean 'isolation'"),
        (["reward.code.seconds=long"], "must be a value of type float"),
        (["reward.code.seconds=-1"], "must be above 0"),
        (["reward.code=[1]"], "must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=said):
            config("reward.functions={code: 1}", *overrides)
    with pytest.raises(ConfigError, match="no effect without the reward code"):
        check_programs(config("reward.code.isolation=none"))
    with pytest.raises(ConfigError, match=r"raise reward\.timeout_s"):
        sandbox_of(config("reward.functions={code: 1}", "reward.code.seconds=30"))


def test_the_config_of_the_docs_has_the_defaults() -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "isolation:" in each]
    shown = yaml.safe_load(block)["reward"]
    assert shown.pop("functions") == {"code": 1} and shown.pop("code") == asdict(CodeConfig())
    assert shown == {name: getattr(RewardConfig(), name) for name in ("timeout_s", "memory_gib", "on_error")}


def test_a_run_is_rewarded_for_programs(tmp_path: Path) -> None:
    """Responses of random digits and signs: some are a program, and end without a word."""
    rows = [{"prompt": f"{i}>", "answer": "", "tests": [{"input": "", "output": ""}]} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_the_model = [setting for setting in SMALL if "vocab_size" not in setting]
    settings = [f"run.dir={tmp_path / 'run'}", f"data.train={data}", f"data.eval={data}", "data.eval_size=2"]
    settings += ["data.tokenizer=characters:0123456789>", "model.max_sequence_length=16", "rollout.max_new_tokens=4"]
    settings += ["rollout.prompts_per_step=4", "rollout.group_size=4", "train.steps=1", "logging.tensorboard=false"]
    settings += ["reward.terms=[{function: code, fenced: false}]", "reward.workers=2"]
    command = [sys.executable, "-m", "gspo_megatron.train", *of_the_model, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120 * time_factor())
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert f"sandbox {settled('auto')}" in " ".join(printed.split())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if "reward/mean" in row]
    shares = [step[f"reward/code/{verdict}"] for verdict in code.VERDICTS]
    assert sum(shares) == pytest.approx(1) and step["reward/code/sandbox_failed"] == 0
    assert 0 < step["reward/code/crashed"] < 1 and step["reward/code/right"] == step["reward/mean"]
