"""Context parallelism without processes: the parts of a batch in threads, which synchronise where ranks would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from torch import Tensor

from gspo_megatron.testing.time_limits import time_factor

Result = TypeVar("Result")


def in_parts(size: int, function: Callable[[int, Callable[[Tensor], Tensor]], Result]) -> list[Result]:
    """[function(part, over_ranks) for each part]. over_ranks waits for all parts and returns the sum of what they
    passed; each gets a sum of its own, so that a gradient comes back from all of them, as an all-reduce brings it."""
    meeting = threading.Barrier(size, timeout=10 * time_factor())
    passed: list[Tensor | None] = [None] * size

    def over_ranks(part: int, partial_S: Tensor) -> Tensor:
        passed[part] = partial_S
        meeting.wait()
        total_S = sum(passed)
        meeting.wait()  # nobody passes the next ones before all have added these up
        return total_S

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, part, partial(over_ranks, part)) for part in range(size)]
        return [future.result() for future in futures]
