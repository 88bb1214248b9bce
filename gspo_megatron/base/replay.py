"""Whose experts a step of a mixture-of-experts model records, and where it uses them again."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Replay(NamedTuple):
    """What a value of algorithm.routing_replay does.

    Attributes:
        of_sampler: the sampler records its experts.
        in_scoring: the pass that scores old log-probs uses those.
        of_old: that pass records the experts that it uses.
        in_updates: updates use what was recorded last.
        log_probs: that pass also records the log-probs that its routers give those experts.
    """

    of_sampler: bool = False
    in_scoring: bool = False
    of_old: bool = False
    in_updates: bool = False
    log_probs: bool = False


REPLAYS = {
    "none": Replay(),
    "compare": Replay(of_sampler=True, of_old=True, log_probs=True),
    "R2": Replay(of_old=True, in_updates=True),
    "R3": Replay(of_sampler=True, in_scoring=True, in_updates=True),
}


def expert_dtype(num_experts: int) -> torch.dtype:
    """Of recorded experts: the smallest that holds all of them, and NO_EXPERT."""
    return torch.int8 if num_experts <= 128 else torch.int16


def replay_of(routing_replay: str, router_shift_floor: float | None) -> Replay:
    """What a run with these settings of algorithm records, and where it uses that again."""
    replay = REPLAYS[routing_replay]
    # A shift is that of the experts which the old policy has used.
    return replay if router_shift_floor is None else replay._replace(of_old=True, log_probs=True)
