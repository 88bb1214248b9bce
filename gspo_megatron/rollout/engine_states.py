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


@dataclass
class Member:
    """An engine of the pool.

    Attributes:
        in_flight: requests that it samples.
        lives: how often it was started. An error of an earlier life tells nothing of this one.
        returning: whether a thread is about to bring it back.
        why: of its last death.
    """

    engine: Engine
    state: State = "stale"
    in_flight: int = 0
    lives: int = 1
    returning: bool = False
    why: str = ""

    @property
    def answers(self) -> bool:
        return self.state in ("alive", "stale")

    def to(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.engine.name}: {self.state} -> {state}"
        self.state = state
