"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by part. Parts may be nested; repeats of a part add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def restart(self, **seconds: float) -> None:
        """Forgets all parts but these."""
        self.seconds = dict(seconds)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
