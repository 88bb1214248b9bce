"""The protocol of a source of rollouts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Taken


class RolloutSource(Protocol):
    """Rollouts with their rewards. All ranks call every method together and get the same result."""

    @property
    def taken(self) -> Taken:
        """What the groups so far have used up. A checkpoint holds it; the source of a continued run begins there."""

    @property
    def set_aside(self) -> int | None:
        """How many prompts are set aside by data.curriculum; None without one."""

    def groups(self, step: int) -> list[RolloutGroup]:
        """The rollout groups of a step.

        Raises:
            StopRequested: the run was asked to stop.
            DataError: a rollout could not be scored, or a prompt has an id that the embedding does not have.
        """

    def greedy(self, prompts: Seq[Prompt]) -> list[Rollout]:
        """The most likely response to each prompt, in order. Raises as `groups` does."""
