"""The protocol of a source of rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from gspo_megatron.base.batches import Held, Prompt, RolloutGroup, Sampling, Taken
from gspo_megatron.rewards.rewards import Reward


class RolloutSource(Protocol):
    """Rollouts with their rewards. All ranks call every method together and get the same result."""

    @property
    def taken(self) -> Taken:
        """What the groups so far have used up. A checkpoint holds it; the source of a continued run begins there."""

    def held(self) -> Held | None:
        """What was sampled for steps to come, if anything can be. A checkpoint holds it. Collective."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the last groups do not tell of how they were found."""

    def groups(self, step: int, count: int | None = None) -> list[RolloutGroup]:
        """The rollout groups of a step: those of `count` prompts, by default rollout.prompts_per_step.

        Raises:
            StopRequested: the run was asked to stop.
            DataError: a rollout could not be scored, or a prompt has an id that the embedding does not have.
        """

    def close(self) -> None:
        """Ends what is under way. Nothing is asked of it after that."""

    def held_out(self, prompts: Seq[Prompt], n: int, sampling: Sampling, reward: Reward) -> list[RolloutGroup]:
        """`n` responses to each prompt, in order, scored by `reward`. Takes nothing of what `groups` takes; raises as
        it does."""
