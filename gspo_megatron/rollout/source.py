"""Where a step's rollouts come from, whoever samples them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup


class RolloutSource(Protocol):
    """Rollouts with their rewards. All ranks call every method together and get the same."""

    def groups(self, step: int) -> list[RolloutGroup]:
        """The rollout groups of a step.

        Raises:
            StopRequested: the run is to stop.
            DataError: a rollout could not be judged, or a prompt has an id that the embedding does not have.
        """

    def greedy(self, prompts: Seq[Prompt]) -> list[Rollout]:
        """The most likely response to each prompt, in order. Raises as `groups` does."""
