"""Scores groups of rollouts while others are still sampled."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from gspo_megatron.base.batches import Rollout
from gspo_megatron.rewards.rewards import Reward, score_rollouts

TURN_S = 0.1
"""How soon a stop is noticed."""


class GroupScores:
    """Scores a group as soon as its last rollout has ended.

        with GroupScores(reward, decode, first_id=64, size=8) as scores:
            rollouts = sampler.generate(prompts, ids, ended=scores.add)
            scores.finish()

    Rollouts `first_id + i * size` to `first_id + (i + 1) * size - 1` are a group. `decode` sets a rollout's text.
    """

    def __init__(self, reward: Reward, decode: Callable[[Rollout], None], *, first_id: int, size: int) -> None:
        self._reward, self._decode, self._first_id, self._size = reward, decode, first_id, size
        self._ended: dict[int, list[Rollout]] = {}
        self._threads = ThreadPoolExecutor(reward.groups_at_once, "reward") if reward.groups_at_once else None
        self._scores: list[Future[None]] = []

    def add(self, rollout: Rollout) -> None:
        """A rollout has ended."""
        self._decode(rollout)
        number = (rollout.id - self._first_id) // self._size
        group = self._ended.setdefault(number, [])
        group.append(rollout)
        if len(group) == self._size:
            self._score(sorted(self._ended.pop(number), key=lambda r: r.id))

    def _score(self, group: Seq[Rollout]) -> None:
        if self._threads is None:
            score_rollouts(self._reward, group)
        else:
            self._scores.append(self._threads.submit(score_rollouts, self._reward, group))

    def finish(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits for the scores of all groups, unless `stop` says otherwise."""
        if stop():
            return
        assert not self._ended, "a sampler gives whole groups"
        for score in self._scores:
            while not score.done() and not stop():
                wait([score], TURN_S)
            if stop():
                return
            score.result()

    def __enter__(self) -> GroupScores:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._threads is not None:
            # A run that was asked to stop does not wait for scores that nobody will see.
            self._threads.shutdown(wait=error is None, cancel_futures=True)
