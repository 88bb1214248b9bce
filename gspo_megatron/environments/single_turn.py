"""No conversation: a rollout is one response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspo_megatron.environments.environment import DONE, Turn

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout


class SingleTurn:
    """Every response is the last."""

    stop: Sequence[str] = ()

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """See `Environment.replies`."""
        return [DONE for _ in rollouts]

    def close(self) -> None:
        """Nothing to end."""
