"""No conversation: a rollout is one response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspo_megatron.environments.environment import DONE, InProcess, Turn

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout


class SingleTurn(InProcess):
    """Every response is the last."""

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """See `Environment.replies`."""
        return [DONE for _ in rollouts]
