"""The states of an engine in a pool, and the ways between them.

alive       it has the current weights, and its log-probs are the trainer's: it samples
stale       it answers, with weights that are not, or not known to be, the current ones
dead        it does not answer, or answers nonsense
restarting  it is being started again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.rollout.engine import Engine

State = Literal["alive", "stale", "dead", "restarting"]
NEXT: dict[State, tuple[State, ...]] = {
    "alive": ("stale", "dead"),
    "stale": ("alive", "dead"),
    "dead": ("restarting",),
    "restarting": ("stale", "dead"),
}
"""The states that may follow a state: a dead engine samples only after it was started, loaded and probed."""

FORGIVEN = 10
"""Updates of weights after which an engine that was started again is as good as new."""


@dataclass
class Member:
    """An engine of the pool.

    Attributes:
        in_flight: requests that it samples.
        lives: how often it was started. An error of an earlier life tells nothing of this one.
        updates: of weights that it has taken in this life.
        starts: how often it was started again, since it last took FORGIVEN updates in one life.
        returning: whether a thread is about to bring it back.
        why: of its last death.
    """

    engine: Engine
    state: State = "stale"
    in_flight: int = 0
    lives: int = 1
    updates: int = 0
    starts: int = 0
    returning: bool = False
    why: str = ""

    @property
    def answers(self) -> bool:
        return self.state in ("alive", "stale")

    def begin_life(self) -> None:
        self.to("restarting")
        self.lives, self.starts, self.updates = self.lives + 1, self.starts + 1, 0

    def has_taken_weights(self) -> None:
        self.updates += 1
        if self.updates >= FORGIVEN:
            self.starts = 0

    def to(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.engine.name}: {self.state} -> {state}"
        self.state = state
