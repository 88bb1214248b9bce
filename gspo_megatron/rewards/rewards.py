"""Rewards: functions of a response, gates, and the weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError, plural
from gspo_megatron.rewards.functions import ARGUMENTS, SCORE, Arguments, Caller, Outcome, find
from gspo_megatron.rewards.rules import IN_WORKERS, SERVICES
from gspo_megatron.rewards.services import open_service
from gspo_megatron.rewards.terms import Term, terms_of
from gspo_megatron.rewards.user_code import contained
from gspo_megatron.rewards.workers import WorkerPool

LISTED_ERRORS = 3


class Score(NamedTuple):
    """The score of a rollout: the weighted sum, the raw value of every reward by name, and what went wrong."""

    reward: float
    terms: dict[str, float]
    error: str = ""
    lost: bool = False


class Reward(Protocol):
    """Scores rollouts, whose text has been decoded."""

    @property
    def groups_at_once(self) -> int:
        """How many groups may be scored at once, each in a thread of its own; 0: one after the other, in the thread
        that samples."""

    @property
    def most_lost(self) -> float:
        """The run stops at a step of which a larger share of rollouts is lost."""

    def score(self, rollouts: Seq[Rollout]) -> list[Score]:
        """One score for each rollout of a group, in order. A reward of NaN means that a rollout could not be scored,
        and `error` says why: the run then stops."""


class Rewards:
    """reward = sum_t weight_t * f_t, over the terms t of a run; 0 for every term after a gate that a response fails.

    A function of f_t(prompt, response, answer, ...) is one of REWARDS, or a user's `module:function`. Rules are called
    in this process, a user's functions, and rules that can take any time, in processes of their own (`workers.py`);
    `isolate=False` calls a user's functions here, too. Services (`services.py`) are asked by threads; `environment` has
    their tokens. `accuracy` is the term that decides whether a response is correct (default: the first that is not a
    gate). `defaults`: parameters by function, below those of a term.

    A function that raises, or returns anything but finite numbers, is noted in the score's `error`; its value is then 0
    with on_error="count", and NaN with "stop", so that `refuse_unscored` stops the run. Where a process hung or ended,
    or a service gave no answer, the value is 0 either way; where a service refuses the run, NaN.

    Raises:
        ConfigError: an unknown name, a function that cannot be imported or called, or a weight that is not finite.
    """

    def __init__(
        self,
        functions: Mapping[str, float],
        accuracy: str | None = None,
        on_error: str = "stop",
        *,
        terms: Seq[Mapping[str, Any]] = (),
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        isolate: bool = True,
        workers: int = 1,
        timeout_s: float = 60.0,
        memory_gib: float = 4.0,
        seed: int = 0,
        most_lost: float = 0.5,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if on_error not in ("stop", "count"):
            raise ConfigError(f"reward.on_error={on_error!r} must be 'stop' or 'count'")
        self.terms = terms_of(functions, terms, defaults or {})
        self._accuracy = accuracy or next((t.name for t in self.terms if not t.gate), self.terms[0].name)
        if self._accuracy not in [term.name for term in self.terms]:
            raise ConfigError(
                f"reward.accuracy={accuracy!r} is not one of the rewards {', '.join(t.name for t in self.terms)}; name "
                "one of them, or add it with weight 0"
            )
        self._stop = on_error == "stop"
        self.most_lost = most_lost
        asked = [t for t in self.terms if t.function in SERVICES]
        called = [t for t in self.terms if t not in asked]
        self._pooled = [t for t in called if (isolate if t.is_users else _takes_any_time(t))]
        with contained():
            self._here = {t.name: find(t.function, t.parameters) for t in called if t not in self._pooled}
        self._services = {t.name: open_service(t.function, t.parameters, environment) for t in asked}
        self._one_at_a_time = Lock()
        self._call = Caller((Exception, SystemExit))  # sys.exit in a reward must not end the run as done
        self._pool = WorkerPool(
            {term.name: (term.function, term.parameters) for term in self._pooled},
            timeout_s=timeout_s,
            memory_gib=memory_gib,
            seed=seed,
        )
        self._called = self._pool.functions if self._pooled else {}  # which imports them
        self.use_workers(workers)

    @property
    def longest_s(self) -> dict[str, float]:
        """Of each term that others compute, the most that it may take for a rollout."""
        return {term.name: self._pool.timeout_s for term in self._pooled} | {
            name: service.longest_s for name, service in self._services.items()
        }

    def use_workers(self, count: int) -> None:
        """Calls functions in up to `count` processes, where any needs one."""
        self._pool.grow(count)
        waiting = [service.groups_at_once for service in self._services.values()]
        self.groups_at_once = max([count if self._pooled else 0, *waiting])

    def check_services(self) -> None:
        """Asks every service for a trial, all at once.

        Raises:
            ConfigError: one gives none.
        """
        with ThreadPoolExecutor(max(1, len(self._services))) as threads:
            trials = {name: threads.submit(service.check) for name, service in self._services.items()}
        for name, trial in trials.items():
            try:
                trial.result()
            except ConfigError as error:
                raise ConfigError(f"reward {name!r}: {error}") from error

    def close(self) -> None:
        """Ends the processes, and what waits for services."""
        self._pool.close()
        for service in self._services.values():
            service.close()

    def score(self, rollouts: Seq[Rollout]) -> list[Score]:
        """See `Reward.score`. The terms are raw values, before weights."""
        return self._scores(rollouts, self.terms)

    def try_functions(self, rollout: Rollout) -> Score:
        """The score as far as functions compute it; `check_services` tries the services, where a run needs them."""
        (score,) = self._scores([rollout], [term for term in self.terms if term.name not in self._services])
        return score

    def _scores(self, rollouts: Seq[Rollout], terms: Seq[Term]) -> list[Score]:
        sheets = [_Sheet(rollout) for rollout in rollouts]
        stage: list[Term] = []
        for term in terms:
            stage.append(term)
            if term.gate or term is terms[-1]:
                self._fill([sheet for sheet in sheets if sheet.passed], stage)
                stage = []
        return [self._total(sheet) for sheet in sheets]

    def _fill(self, sheets: Seq[_Sheet], stage: Seq[Term]) -> None:
        """Scores the terms up to a gate. Those that others compute are begun first."""
        begun = {term.name: self._begun(term, sheets) for term in stage if term.name not in self._here}
        for term in stage:
            outcomes = self._ended(begun[term.name]) if term.name in begun else self._scored_here(term, sheets)
            for sheet, outcome in zip(sheets, outcomes, strict=True):
                self._note(sheet, term, outcome)

    def _begun(self, term: Term, sheets: Seq[_Sheet]) -> list[Future[list[Outcome]]]:
        if not sheets:
            return []
        if service := self._services.get(term.name):
            return service.submit([s.arguments(service.takes) for s in sheets], [s.rollout.id for s in sheets])
        called = self._called[term.name]
        calls = [sheets] if called.batch or called.is_async else [[sheet] for sheet in sheets]
        return [
            self._pool.submit(term.name, [s.arguments(called.takes) for s in call], [s.rollout.id for s in call])
            for call in calls
        ]

    def _ended(self, calls: Seq[Future[list[Outcome]]]) -> list[Outcome]:
        return [outcome for call in calls for outcome in call.result()]

    def _scored_here(self, term: Term, sheets: Seq[_Sheet]) -> list[Outcome]:
        function = self._here[term.name]
        items = [sheet.arguments(function.takes) for sheet in sheets]
        if not term.is_users or not sheets:
            return self._call(function, items) if items else []
        # Where other terms are waited for, groups are scored in several threads; a user's function may not be made for
        # that.
        with self._one_at_a_time, contained():
            return self._call(function, items)

    def _note(self, sheet: _Sheet, term: Term, outcome: Outcome) -> None:
        for part, value in outcome.values.items():
            sheet.terms[term.name if part == SCORE else f"{term.name}/{part}"] = value
        sheet.lost |= outcome.lost
        if outcome.error:
            sheet.errors.append(f"reward {term.name!r} failed: {outcome.error}")
            unscored = outcome.stops or (self._stop and not outcome.lost)
            sheet.terms[term.name] = math.nan if unscored else 0.0
        sheet.passed = not term.gate or sheet.terms[term.name] >= 1

    def _total(self, sheet: _Sheet) -> Score:
        terms = {term.name: sheet.terms.get(term.name, 0.0) for term in self.terms}
        total = sum(term.weight * terms[term.name] for term in self.terms)
        return Score(total, {**terms, **sheet.terms}, "; ".join(sheet.errors), sheet.lost)

    def check_answer(self, prompt: Prompt) -> None:
        """Whether the rewards by rule can read a prompt's answer. A user's own are not called for every prompt.

        Raises:
            DataError: one cannot.
        """
        asked = Rollout(0, prompt, [], [], False, 0)
        for term in self.terms:
            if not term.is_users and term.name in self._here:
                (outcome,) = self._scored_here(term, [_Sheet(asked)])
                if outcome.error:
                    raise DataError(
                        f"prompt {prompt.id} ({prompt.text[:60]!r}): reward {term.name!r} cannot judge it: "
                        f"{outcome.error}; use another reward, correct the answer, or set reward.on_error=count"
                    )

    @property
    def judged_by(self) -> str:
        """The function that decides whether a response is correct."""
        return next(term.function for term in self.terms if term.name == self._accuracy)

    def accuracy(self, rollout: Rollout) -> float:
        """1 when the accuracy reward's raw value is at least 1, else 0."""
        return float(rollout.reward_terms[self._accuracy] >= 1)


@dataclass
class _Sheet:
    """What is known of a rollout's score. `passed`: every gate so far."""

    rollout: Rollout
    terms: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    lost: bool = False
    passed: bool = True

    def arguments(self, takes: Seq[str]) -> Arguments:
        return {name: ARGUMENTS[name](self.rollout) for name in takes}


def _takes_any_time(term: Term) -> bool:
    """A rule that may run for hours on a hostile response: it is called where it can be ended."""
    return term.function in IN_WORKERS or "pattern" in term.parameters


def score_rollouts(reward: Reward, rollouts: Seq[Rollout]) -> None:
    """Fills in what the rollouts say of their rewards, in place."""
    for rollout, score in zip(rollouts, reward.score(rollouts), strict=True):
        rollout.reward, rollout.reward_terms, rollout.reward_error, rollout.reward_lost = score


def refuse_unscored(rollouts: Seq[Rollout], most_lost: float = 0.5) -> None:
    """Stops the run when a rollout could not be scored, or too many are lost for the reward to be working.

    Separate from `score`, so that all ranks can gather their rollouts first and then stop together.

    Raises:
        DataError: a rollout has an error and a reward of NaN, or a larger share than `most_lost` are lost.
    """
    failed = [rollout for rollout in rollouts if rollout.reward_error and math.isnan(rollout.reward)]
    lost = [rollout for rollout in rollouts if rollout.reward_lost]
    if failed:
        raise DataError(
            f"{plural(len(failed), 'rollout')} could not be scored; fix the reward or the data "
            "(reward.on_error=count counts a reward that fails as 0, but not where a service refuses every request). "
            f"The first of them:\n{listed(failed)}"
        )
    if len(lost) > most_lost * len(rollouts):
        raise DataError(
            f"the rewards of {len(lost)} of {plural(len(rollouts), 'rollout')} were lost with the processes or "
            f"services that were to compute them, a larger share than reward.most_lost={most_lost:g}; fix the reward, "
            f"or, where it ran into a limit, raise that. The first of them:\n{listed(lost)}"
        )


def listed(rollouts: Seq[Rollout]) -> str:
    """A line for each of the first few, with its error."""
    return "\n".join(
        f"  rollout {rollout.id}, prompt {rollout.prompt.id} {rollout.prompt.text[:60]!r}: {rollout.reward_error}"
        for rollout in rollouts[:LISTED_ERRORS]
    )
