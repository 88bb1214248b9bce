"""Reward functions: how they are found, called by the names of their parameters, and what they may return.

Imports no torch: the worker processes that call a user's functions start from this file.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gspo_megatron.base.errors import ConfigError, did_you_mean, plural
from gspo_megatron.rewards.rules import IN_WORKERS, REWARDS, SERVICES
from gspo_megatron.rewards.user_code import described, plain

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout

ARGUMENTS: dict[str, Callable[[Rollout], Any]] = {
    "prompt": lambda rollout: rollout.prompt.text,
    "response": lambda rollout: rollout.text,
    "answer": lambda rollout: rollout.prompt.answer,
    "messages": lambda rollout: rollout.messages,
    "metadata": lambda rollout: rollout.prompt.metadata,
    "truncated": lambda rollout: rollout.truncated,
    "tokens": lambda rollout: rollout.tokens,
}
"""What a reward function may ask for, by the name of a parameter."""
PLURALS = {"prompt": "prompts", "response": "responses", "answer": "answers"}
"""What they are called for a function that judges a batch; the others keep their names, and all are lists."""
SCORE = "score"
"""The part of a result that is the reward's value."""

REPLY = "reply"
"""The part of an environment's result that is its answer; rollout/user_environment.py reads it."""

Arguments = dict[str, Any]
"""Of one rollout, by the names in ARGUMENTS."""


class Outcome(NamedTuple):
    """What a reward gave for a rollout: `values` has its score and, by name, its other parts; or why it gave nothing.
    `lost`: its process hung, ended or ran out of memory, or its service gave no answer, which says nothing about later
    rollouts. `stops`: no later rollout can have a score either."""

    values: dict[str, Any]
    error: str = ""
    lost: bool = False
    stops: bool = False


class NotJudged(Exception):
    """A reward could not judge a rollout, through no fault of the response: its value is 0, the rollout counts as lost.
    `values` as in `Outcome`."""

    def __init__(self, message: str, values: dict[str, float]) -> None:
        super().__init__(message)
        self.values = values


class RewardFunction(NamedTuple):
    """A function, and how to call it.

    Attributes:
        takes: the names in ARGUMENTS that it asks for.
        parameters: what else the settings pass to it.
        batch: called once, with lists, for several rollouts.
        is_async: a coroutine function; calls for several rollouts run concurrently.
        returns: SCORE of a reward, REPLY of an environment.
    """

    call: Callable[..., Any]
    takes: tuple[str, ...]
    parameters: Mapping[str, Any]
    batch: bool
    is_async: bool
    returns: str = SCORE

    @classmethod
    def of(cls, call: Callable[..., Any], parameters: Mapping[str, Any], returns: str = SCORE) -> RewardFunction:
        """Matches the function's parameters with what it can be given.

        Raises:
            TypeError: a parameter that nothing gives a value, or a value that no parameter takes.
        """
        declared = inspect.signature(call).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in declared.values())
        batch = "responses" in declared
        known = {PLURALS.get(name, name) if batch else name: name for name in ARGUMENTS}
        takes = tuple(name for keyword, name in known.items() if takes_any or keyword in declared)
        for name, parameter in declared.items():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            given = name in known or name in parameters
            if parameter.kind is parameter.POSITIONAL_ONLY or (parameter.default is parameter.empty and not given):
                raise TypeError(
                    f"nothing gives its parameter {name!r} a value; known are {', '.join(known)}, and what "
                    f"reward.terms=[{{function: NAME, {name}: VALUE}}] sets"
                )
        if unknown := [name for name in parameters if name in known or not (takes_any or name in declared)]:
            raise TypeError(f"it has no parameter {unknown[0]!r} to set{did_you_mean(unknown[0], declared)}")
        is_async = any(map(inspect.iscoroutinefunction, (call, getattr(call, "__call__", None))))  # noqa: B004
        return cls(call, takes, dict(parameters), batch, is_async, returns)

    def arguments(self, items: Sequence[Arguments]) -> Arguments:
        """The keywords of one call for these rollouts: of a batch, or of one."""
        if not self.batch:
            (item,) = items
            return {**item, **self.parameters}
        return {**{PLURALS.get(name, name): [i[name] for i in items] for name in self.takes}, **self.parameters}


def find(name: str, parameters: Mapping[str, Any] | None = None, returns: str = SCORE) -> RewardFunction:
    """The reward that `name` stands for: one of REWARDS, or `module:function`. Imports the module. An environment is
    found in the same way.

    Raises:
        ConfigError: an unknown name (suggests the closest), a failing import, or a function that cannot be called.
    """
    module, colon, attribute = IN_WORKERS.get(name, name).partition(":")
    if not colon and name not in REWARDS:
        known = (*REWARDS, *IN_WORKERS, *SERVICES)
        raise ConfigError(
            f"unknown reward {name!r}{did_you_mean(name, known) or '.'} Known: {', '.join(known)}, "
            f"and your own as 'module:function', called with what it names of {', '.join(ARGUMENTS)}"
        )
    try:
        call = getattr(importlib.import_module(module), attribute) if colon else REWARDS[name]
        return RewardFunction.of(call, parameters or {}, returns)
    except BaseException as error:  # a script without a __main__ guard exits when it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(
            f"{'reward' if returns == SCORE else 'environment'} {name!r} cannot be used ({described(error)})"
            + (
                "; expected a function such as f(prompt, response, answer) in a module that Python can import from the "
                "working folder"
                if ":" in name
                else ""
            )
        ) from error


class Caller:
    """Calls reward functions. `caught` are the exceptions that are a function's own fault; each call of an async one is
    given up after `timeout_s`."""

    def __init__(self, caught: tuple[type[BaseException], ...], timeout_s: float | None = None) -> None:
        self.caught, self.timeout_s = caught, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, function: RewardFunction, items: Sequence[Arguments]) -> list[Outcome]:
        """One outcome for each item."""
        if function.is_async:
            self._loop = self._loop or asyncio.new_event_loop()
            calls = [items] if function.batch else [[item] for item in items]
            found = self._loop.run_until_complete(self._concurrently(function, calls))
            return [outcome for outcomes in found for outcome in outcomes]
        if function.batch:
            return self._one_call(function, items)
        return [outcome for item in items for outcome in self._one_call(function, [item])]

    def _one_call(self, function: RewardFunction, items: Sequence[Arguments]) -> list[Outcome]:
        try:
            return _outcomes(function, function.call(**function.arguments(items)), len(items))
        except self.caught as error:
            return [_failed(error)] * len(items)

    async def _concurrently(
        self, function: RewardFunction, calls: Sequence[Sequence[Arguments]]
    ) -> list[list[Outcome]]:
        return await asyncio.gather(*(self._one_async_call(function, items) for items in calls))

    async def _one_async_call(self, function: RewardFunction, items: Sequence[Arguments]) -> list[Outcome]:
        try:
            call: Coroutine[Any, Any, Any] = function.call(**function.arguments(items))
            return _outcomes(function, await asyncio.wait_for(call, self.timeout_s), len(items))
        except (asyncio.TimeoutError, TimeoutError):
            return [Outcome({}, f"gave no result within {self.timeout_s:g} s", lost=True)] * len(items)
        except self.caught as error:
            return [_failed(error)] * len(items)


def _failed(error: BaseException) -> Outcome:
    if isinstance(error, NotJudged):
        return Outcome(error.values, plain(str(error)), lost=True)
    return Outcome({}, described(error), lost=isinstance(error, MemoryError))


def _outcomes(function: RewardFunction, value: Any, count: int) -> list[Outcome]:
    """One outcome for each rollout of a call.

    Raises:
        TypeError, ValueError: a result that is not a score.
    """
    if function.returns == REPLY:
        json.dumps(value)  # which refuses what cannot leave the process
        return [Outcome({REPLY: value})] * count
    if not function.batch:
        return [outcome_of(value)]
    if type(value) not in (list, tuple):
        raise TypeError(f"it returned {_shown(value)}; expected a list with a score for each response")
    if len(value) != count:
        raise ValueError(f"it returned {plural(len(value), 'score')} for {plural(count, 'response')}")
    return [outcome_of(v) for v in value]


def outcome_of(value: Any) -> Outcome:
    """Of what was returned for one rollout: a score, or an exception that says why there is none."""
    try:
        return _failed(value) if isinstance(value, Exception) else Outcome(parts(value))
    except (TypeError, ValueError, OverflowError) as error:
        return _failed(error)


def parts(value: Any) -> dict[str, float]:
    """What a function returned, by name: its score, and what else it measures.

    Raises:
        TypeError, ValueError: it is not a finite number, nor a dict of such with a "score".
    """
    if type(value) is not dict:
        return {SCORE: _number(value)}
    if SCORE not in value:
        raise ValueError(f"it returned {_shown(value)}; expected a number, or a dict with a {SCORE!r}")
    for name in value:
        if type(name) is not str or not name.isprintable() or not name or "/" in name:
            raise ValueError(f"it returned {_shown(value)}; its keys become metrics: use text without '/'")
    return {name: _number(v) for name, v in value.items()}


def _number(value: Any) -> float:
    """Exactly an int or a float: a tensor or an array is often a whole batch, a bool often a forgotten weight."""
    if type(value) not in (int, float):
        raise TypeError(f"it returned {_shown(value)}; expected an int or a float: write float(...)")
    if not math.isfinite(value):
        raise ValueError(f"it returned {value}; expected a finite number")
    return float(value)


def _shown(value: Any) -> str:
    try:
        text = plain(repr(value), 60)
    except BaseException:
        text = "something"
    return f"{text} ({type(value).__module__}.{type(value).__qualname__})".replace("(builtins.", "(")
