"""Tools that the model calls in its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspo_megatron.environments.arithmetic import evaluate, written
from gspo_megatron.environments.environment import DONE, InProcess, Turn

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout


class Calculator(InProcess):
    """Writes the result behind a call: `<<48/2>>` becomes `<<48/2>>24`, and the model goes on. A turn that does not end
    with a call is the last.

    Args:
        begin, end: the marks of a call.
        error: what is written where the expression has no value.

    Raises:
        ValueError: an empty mark.
    """

    def __init__(self, begin: str = "<<", end: str = ">>", error: str = "error") -> None:
        if not begin or not end:
            raise ValueError(f"begin={begin!r} and end={end!r} must not be empty")
        self.begin, self.end, self.error = begin, end, error
        self.stop = (end,)

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """See `Environment.replies`."""
        return [self._reply(rollout.text) for rollout in rollouts]

    def _reply(self, text: str) -> Turn:
        _, found, expression = text.removesuffix(self.end).rpartition(self.begin)
        if not found or not text.endswith(self.end):
            return DONE
        try:
            return Turn(written(evaluate(expression)), "assistant", calls=1)
        except (ValueError, ZeroDivisionError):
            return Turn(self.error, "assistant", calls=1, failed=1)
