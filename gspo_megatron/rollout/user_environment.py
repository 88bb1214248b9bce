"""A user's own environment: a function of the conversation, called in processes that can be replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gspo_megatron.base.batches import Rollout
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.environments.environment import Turn, turn_of
from gspo_megatron.rewards.functions import ARGUMENTS, REPLY, Outcome
from gspo_megatron.rewards.user_code import described
from gspo_megatron.rewards.workers import WorkerPool

TERM = "environment"
"""What the processes call the function."""


class UserEnvironment:
    """`Environment` that calls `module:function` with what its parameters name of `rewards.functions.ARGUMENTS`: of
    these, `response` is the last turn and `messages` the whole conversation.

    The function is called in processes of its own, as a reward is (`rewards/workers.py`). One that raises, hangs, ends
    its process, or returns something other than a `Turn` ends that conversation.

    Raises:
        ConfigError: the function cannot be imported or called.
    """

    stop: Sequence[str] = ()

    def __init__(
        self, name: str, parameters: Mapping[str, Any], *, timeout_s: float, memory_gib: float, seed: int
    ) -> None:
        self._pool = WorkerPool(
            {TERM: (name, parameters)},
            timeout_s=timeout_s,
            memory_gib=memory_gib,
            seed=seed,
            limit="rollout.reply_timeout_s",
            returns=REPLY,
        )
        called = self._pool.functions[TERM]
        if called.batch:
            raise ConfigError(
                f"rollout.environment={name} takes `responses`, and an environment answers one conversation at a time; "
                "take `response`, or `messages`"
            )
        self._takes = called.takes

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """See `Environment.replies`."""
        calls = [
            # The number of the turn, too, decides what the function's random numbers are.
            self._pool.submit(TERM, [{name: ARGUMENTS[name](r) for name in self._takes}], [r.id, len(r.outside)])
            for r in rollouts
        ]
        return [_turn_of(call.result()[0]) for call in calls]

    def use_workers(self, count: int) -> None:
        """See `Environment.use_workers`."""
        self._pool.grow(count)

    def close(self) -> None:
        """See `Environment.close`."""
        self._pool.close()


def _turn_of(outcome: Outcome) -> Turn:
    if outcome.error:
        return Turn(error=outcome.error)
    try:
        return turn_of(outcome.values[REPLY])
    except (TypeError, ValueError) as error:
        return Turn(error=described(error))
