"""One stream of weights for several engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue

from torch import Tensor

from gspo_megatron.rollout.engine import Weights

AHEAD = 2
"""Tensors that wait for the slowest engine: so many whole tensors are held besides those in use."""
TURN_S = 0.1
"""How soon the stream notices that nobody reads it any more."""
Item = tuple[str, Tensor] | BaseException | None


def fan_out(weights: Weights, takers: Seq[Callable[[Weights], None]]) -> None:
    """Calls every taker with these weights, each in a thread of its own. The tensors are read once, in this thread,
    and to the end even if every taker has failed: to make them, all ranks work together.

    Raises:
        BaseException: what reading the tensors raised. Every taker's stream raises it, too.
    """
    feeds = [_Feed() for _ in takers]
    with ThreadPoolExecutor(max(1, len(takers)), "weights") as threads:
        taken = [
            threads.submit(feed.give_to, taker, weights.version) for feed, taker in zip(feeds, takers, strict=True)
        ]
        end: BaseException | None = None
        try:
            for item in weights.tensors:
                for feed in feeds:
                    feed.put(item)
        except BaseException as error:
            end = error
            raise
        finally:
            for feed in feeds:
                feed.put(end)
        for each in taken:
            each.result()


class _Feed:
    """The stream of one taker."""

    def __init__(self) -> None:
        self._items: Queue[Item] = Queue(AHEAD)
        self._read = True

    def put(self, item: Item) -> None:
        while self._read:
            try:
                return self._items.put(item, timeout=TURN_S)
            except Full:
                continue

    def give_to(self, taker: Callable[[Weights], None], version: int) -> None:
        try:
            taker(Weights(version, self._tensors()))
        finally:
            self._read = False

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
