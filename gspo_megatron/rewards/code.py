"""Whether the program in a response passes tests, run in a sandbox (`sandbox.py`).

A test is one of

    {"input": "3 4\\n", "output": "7\\n"}                    run as a script: standard input, standard output
    {"call": "add", "args": [3, 4], "expected": 7}           a function of it; `Solution.add`: of a new Solution()
    "assert add(3, 4) == 7"                                  an expression of it

What is expected stays out of the sandbox: a program can print and return, and its results are compared here. Its exit
status decides nothing.
"""

from __future__ import annotations

import ast
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from gspo_megatron.rewards.functions import NotJudged
from gspo_megatron.rewards.launcher import OUT_OF_MEMORY
from gspo_megatron.rewards.sandbox import Call, Ended, Limits, Sandbox

VERDICTS = ("right", "wrong", "no_program", "timed_out", "memory", "crashed", "sandbox_failed")
FENCED = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
TOLERANCE = 1e-6
"""Of floats that functions return, relative and absolute."""


def code(
    *,
    response: str,
    answer: str,
    metadata: Mapping[str, Any] | None = None,
    tests: str = "tests",
    setup: str | None = None,
    fenced: bool = True,
    all_or_nothing: bool = True,
    sandbox: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """1 when the program in the response's last fenced block passes the row's tests; with `all_or_nothing=False`, the
    share that it passes.

    The tests are a list in the row's field `tests`, or, without it, the answer as JSON. `fenced=False` takes the whole
    response as the program. Next to the score, the verdict of VERDICTS is 1: `right`, or what became of the first test
    that the program does not pass. After a test that timed out, the others are not run and count as not passed.

    Args:
        setup: the row's field with code that asserts need, such as imports: text, or a list of lines. It is run after
            the program.
        sandbox: isolation, python, seconds, memory_gib, output_mib (see reward.code.*), and total_seconds: for all
            tests of a program.

    Raises:
        NotJudged: the sandbox failed; says nothing about the program.
        ValueError: a row without tests that can be read.
    """
    cases = _cases(metadata, answer, tests)
    needed = _setup(metadata, setup) if setup else ""
    program = _program(response) if fenced else response
    if program is None:
        return _result("no_program", 0.0)
    verdicts = _Judge(sandbox or {}).verdicts(f"{program}\n{needed}", cases)
    verdict = next((v for v in verdicts if v != "right"), "right")
    share = verdicts.count("right") / len(cases)
    return _result(verdict, float(share == 1) if all_or_nothing else share)


def _result(verdict: str, score: float) -> dict[str, float]:
    return {"score": score, **{name: float(name == verdict) for name in VERDICTS}}


def _program(response: str) -> str | None:
    """The last fenced block. As in CommonMark, its lines lose the indentation of the fence, which may stand in a list;
    `textwrap.dedent` would also empty the lines of white space in a program's texts."""
    blocks = FENCED.findall(response)
    if not blocks:
        return None
    indentation, program = blocks[-1]
    return re.sub(rf"^[ \t]{{1,{len(indentation)}}}", "", program, flags=re.MULTILINE) if indentation else program


def _setup(metadata: Mapping[str, Any] | None, name: str) -> str:
    """The code that the asserts of a row need.

    Raises:
        ValueError: there is no such field, or it holds something else.
    """
    found = (metadata or {}).get(name)
    lines = [found] if isinstance(found, str) else found
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(
            f"its field {name!r} is {json.dumps(found, default=str)[:100]}; expected code, as text or lines"
        )
    return "\n".join(lines)


def _cases(metadata: Mapping[str, Any] | None, answer: str, name: str) -> list[Mapping[str, Any]]:
    """The tests of a row.

    Raises:
        ValueError: there is no test, or one that is not of a known form.
    """
    where, found = f"its field {name!r}", (metadata or {}).get(name)
    if found is None:
        where, found = "its answer", answer
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); expected tests such as {EXAMPLES}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where} is not a list of tests such as {EXAMPLES}")
    return [_assertion(case, where) if isinstance(case, str) else _case(case, where) for case in found]


def _case(case: Any, where: str) -> Mapping[str, Any]:
    """A test that is not an assert.

    Raises:
        ValueError: it is neither a script's nor a function's.
    """
    if isinstance(case, Mapping):
        is_script = all(isinstance(case.get(key), str) for key in ("input", "output"))
        is_call = isinstance(case.get("call"), str) and isinstance(case.get("args"), list) and "expected" in case
        if (is_script or is_call) and "evaluate" not in case:
            return case
    raise ValueError(f"the test {json.dumps(case, default=str)[:100]} in {where} is not like those of {EXAMPLES}")


def _assertion(text: str, where: str) -> dict[str, Any]:
    """{"evaluate": an expression, "expected": its value}. Of `assert f(3) == 4` the program gets `f(3)` alone; what is
    compared with something other than a literal, it gets as a whole, with its truth as `not` sees it: a program may
    have a `bool` of its own.

    Raises:
        ValueError: it is not an assert.
    """
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test {text[:100]!r} in {where} cannot be read ({error}); expected an assert") from None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"the test {text[:100]!r} in {where} is not an assert, as in {EXAMPLES}")
    test = body[0].test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        for asked, literal in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return {"evaluate": ast.unparse(asked), "expected": _literal(literal)}
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return {"evaluate": f"not not ({ast.unparse(test.operand)})", "expected": False}
    return {"evaluate": f"not not ({ast.unparse(test)})", "expected": True}


MAKERS: Mapping[str, Callable[..., Any]] = {"set": set, "frozenset": frozenset, "sorted": sorted, "tuple": tuple}
"""Functions by name that only make another collection of one; asserts call them on literals."""


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of MAKERS on one: `set([1, 2])`.

    Raises:
        ValueError, TypeError, SyntaxError, RecursionError, MemoryError: it has none.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS and not node.keywords:
        return MAKERS[node.func.id](*map(_literal, node.args))
    return ast.literal_eval(node)


EXAMPLES = (
    '[{"input": "3 4", "output": "7"}] or [{"call": "add", "args": [3, 4], "expected": 7}] or ["assert add(3, 4) == 7"]'
)


class _Judge:
    """Runs programs against tests."""

    def __init__(self, how: Mapping[str, Any]) -> None:
        limits = Limits(
            how.get("seconds", 5.0), int(how.get("memory_gib", 1.0) * 2**30), int(how.get("output_mib", 1.0) * 2**20)
        )
        self._sandbox = _sandbox(how.get("isolation", "auto"), limits, how.get("python"))
        self._end = time.monotonic() + how.get("total_seconds", math.inf)

    def verdicts(self, program: str, cases: Sequence[Mapping[str, Any]]) -> list[str]:
        """One for each test that was run: first the scripts, each in a process of its own, then all calls in one."""
        found: list[str] = []
        calls = [case for case in cases if "call" in case or "evaluate" in case]
        for case in cases:
            if "call" not in case and "evaluate" not in case:
                ended = self._ended(program, case["input"].encode())
                found.append(_verdict(ended) or ("right" if _same_text(ended.output, case["output"]) else "wrong"))
                if found[-1] == "timed_out":
                    return found
        if calls:
            asked = [each["evaluate"] if "evaluate" in each else (each["call"], each["args"]) for each in calls]
            ended = self._ended(program, b"", asked)
            found += _verdicts_of_calls(ended, calls)
        return found

    def _ended(self, program: str, stdin: bytes, calls: Sequence[Call] | None = None) -> Ended:
        if time.monotonic() > self._end:
            return Ended("timed_out", 0, b"", "")
        ended = self._sandbox.run(program, stdin, calls)
        if ended.how == "sandbox_failed":
            raise NotJudged(f"the sandbox failed: {ended.errors.strip()[-300:]}", _result("sandbox_failed", 0.0))
        return ended


@lru_cache
def _sandbox(isolation: str, limits: Limits, python: str | None) -> Sandbox:
    return Sandbox(isolation, limits, python)


def _verdict(ended: Ended) -> str:
    """What a run of a program says without its output; empty where that decides."""
    if ended.how == "timed_out":
        return "timed_out"
    if ended.status == OUT_OF_MEMORY:
        return "memory"
    return "crashed" if ended.how != "exited" or ended.status != 0 else ""


def _same_text(output: bytes, expected: str) -> bool:
    """White space at the ends of lines, and empty lines at the end, aside."""
    return _lines(output.decode(errors="replace")) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _verdicts_of_calls(ended: Ended, calls: Sequence[Mapping[str, Any]]) -> list[str]:
    results = [_parsed(line) for line in ended.output.splitlines(keepends=True) if line.endswith(b"\n")][: len(calls)]
    found = [_verdict_of_call(result, case) for result, case in zip(results, calls)]  # noqa: B905
    missing = len(calls) - len(found)
    return found + [_verdict(ended) or "crashed"] * missing


def _verdict_of_call(result: Any, test: Mapping[str, Any]) -> str:
    match result:
        case [value]:
            equal = _is_literal if "evaluate" in test else _equal
            return "right" if equal(value, test["expected"]) else "wrong"
        case {"error": "MemoryError"}:
            return "memory"
        case {"error": _}:
            return "crashed"
    return "wrong"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_literal(text: Any, expected: Any) -> bool:
    """Whether the repr() of a value is that of one that equals `expected`, as in an assert."""
    with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return isinstance(text, str) and bool(ast.literal_eval(text) == expected)
    return False


def _equal(found: Any, expected: Any) -> bool:
    """As JSON: a tuple is a list. Where a float is expected, to TOLERANCE."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_equal(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, float) and type(found) in (int, float):
        try:
            return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        except OverflowError:  # an int that no float holds
            return False
    return (type(found) is type(expected) and bool(found == expected)) or (
        type(found) is float and type(expected) is int and found == expected
    )
