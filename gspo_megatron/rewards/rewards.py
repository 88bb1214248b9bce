"""Rewards: functions of the decoded text of a response, and their weighted sum."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from numbers import Real
from typing import Any, NamedTuple, Protocol

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean
from gspo_megatron.rewards.rules import REWARDS, RewardFunction
from gspo_megatron.rewards.user_code import contained, described

LISTED_ERRORS = 3


class Score(NamedTuple):
    """The score of a rollout: the weighted sum, the raw value of every reward by name, and what went wrong."""

    reward: float
    terms: dict[str, float]
    error: str = ""


class Reward(Protocol):
    """Scores a batch of rollouts, whose text has been decoded."""

    def score(self, rollouts: Seq[Rollout]) -> list[Score]:
        """One score for each rollout, in order. A reward of NaN means that a rollout could not be scored, and `error`
        says why: the run then stops."""


class Rewards:
    """reward = sum_f weight_f * f(prompt, response, answer), over the functions f of a run.

    `functions` maps names of REWARDS, or a user's `module:function`, to weights; weight 0 only measures. `accuracy` is
    the function that decides whether a response is correct (default: the first one). A function that raises, or returns
    anything but a finite number, is noted in the score's `error`; its value is then 0 with on_error="count", and NaN
    with "stop", so that `refuse_unscored` stops the run.

    Raises:
        ConfigError: an unknown name, a function that cannot be imported or called, or a weight that is not finite.
    """

    def __init__(self, functions: Mapping[str, float], accuracy: str | None = None, on_error: str = "stop") -> None:
        if on_error not in ("stop", "count"):
            raise ConfigError(f"reward.on_error={on_error!r} must be 'stop' or 'count'")
        if not functions:
            raise ConfigError(f"reward.functions is empty; add one of {', '.join(REWARDS)} or 'module:function'")
        self._functions = {name: find_reward(name) for name in functions}
        self._weights = dict(functions)
        for name, weight in functions.items():
            if not math.isfinite(weight):
                raise ConfigError(f"the weight {weight} of reward {name!r} must be a finite number")
        self._accuracy = accuracy if accuracy is not None else next(iter(functions))
        if self._accuracy not in functions:
            raise ConfigError(
                f"reward.accuracy={accuracy!r} is not one of the rewards {', '.join(functions)}; name one of them, or "
                "add it with weight 0"
            )
        self._stop = on_error == "stop"

    def score(self, rollouts: Seq[Rollout]) -> list[Score]:
        """See `Reward.score`. The terms are raw values, before weights."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> Score:
        terms, errors = {}, []
        for name, function in self._functions.items():
            try:
                terms[name] = _call(function, rollout)
            except (Exception, SystemExit) as error:  # sys.exit in a reward must not end the run as done
                terms[name] = math.nan if self._stop else 0.0
                errors.append(f"reward {name!r} failed: {described(error)}")
        total = sum(weight * terms[name] for name, weight in self._weights.items())
        return Score(total, terms, "; ".join(errors))

    def check_answer(self, prompt: Prompt) -> None:
        """Whether the rewards by rule can read a prompt's answer. A user's own are not called ahead of the run.

        Raises:
            DataError: one cannot.
        """
        for name, function in self._functions.items():
            if name in REWARDS:
                try:
                    function(prompt=prompt.text, response="", answer=prompt.answer)
                except ValueError as error:
                    raise DataError(
                        f"prompt {prompt.id} ({prompt.text[:60]!r}): reward {name!r} cannot judge it: {error}; use "
                        "another reward, correct the answer, or set reward.on_error=count"
                    ) from error

    def accuracy(self, rollout: Rollout) -> float:
        """1 when the accuracy reward's raw value is at least 1, else 0."""
        return float(rollout.reward_terms[self._accuracy] >= 1)


def score_rollouts(reward: Reward, rollouts: Seq[Rollout]) -> None:
    """Fills `reward`, `reward_terms` and `reward_error` of the rollouts in place."""
    with contained():
        scores = reward.score(rollouts)
    for rollout, score in zip(rollouts, scores, strict=True):
        rollout.reward, rollout.reward_terms, rollout.reward_error = score


def refuse_unscored(rollouts: Iterable[Rollout]) -> None:
    """Stops the run when a rollout could not be scored.

    Separate from `score`, so that all ranks can gather their rollouts first and then stop together.

    Raises:
        DataError: a rollout has an error and a reward of NaN.
    """
    failed = [rollout for rollout in rollouts if rollout.reward_error and math.isnan(rollout.reward)]
    if not failed:
        return
    listed = "\n".join(
        f"  rollout {rollout.id}, prompt {rollout.prompt.id} {rollout.prompt.text[:60]!r}: {rollout.reward_error}"
        for rollout in failed[:LISTED_ERRORS]
    )
    raise DataError(
        f"{len(failed)} rollouts could not be scored; fix the reward or the data, or set reward.on_error=count to "
        f"count such a reward as 0. The first of them:\n{listed}"
    )


def find_reward(name: str) -> RewardFunction:
    """The reward that `name` stands for: one of REWARDS, or `module:function`.

    Raises:
        ConfigError: an unknown name (suggests the closest), a failing import, or a function with other arguments.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"unknown reward {name!r}{did_you_mean(name, REWARDS) or '.'} Known: {', '.join(REWARDS)}, "
            "and your own as 'module:function', called with prompt=, response=, answer="
        )
    try:
        with contained():
            function = getattr(importlib.import_module(module), attribute)
        inspect.signature(function).bind(prompt="", response="", answer="")
    except (Exception, SystemExit) as error:  # a script without a __main__ guard exits when it is imported
        raise ConfigError(
            f"reward {name!r} cannot be used ({described(error)}); expected a function "
            "f(prompt, response, answer) in a module that Python can import from the working folder"
        ) from error
    return function


def _call(function: RewardFunction, rollout: Rollout) -> float:
    value: Any = function(prompt=rollout.prompt.text, response=rollout.text, answer=rollout.prompt.answer)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"it returned {str(value)[:60]!r} ({type(value).__name__}); expected a finite number")
    return float(value)
