"""A reward that takes its time: a run of a tiny model then lasts as long on a fast machine as on a slow one."""

from __future__ import annotations

import time


def slow_share(*, prompt: str, response: str, answer: str) -> float:
    """Share of the answer's characters that the response has at their places."""
    time.sleep(0.12)
    return sum(a == b for a, b in zip(response, answer, strict=False)) / len(answer)
