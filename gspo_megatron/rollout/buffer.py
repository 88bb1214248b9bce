"""Groups of rollouts that engines sample ahead of the trainer, up to an age.

Steps are counted from 1, and L = rollout.max_lag. A group begins in a step and is trained on in the same or a later
one; the difference is its lag. Three rules bound it:

    capacity  before a step takes its groups, at most L * prompts_per_step + (what the step takes) are under way or
              wait; afterwards L * prompts_per_step (Fu et al. 2505.24298, Eq. 3, in groups)
    order     a step takes the groups that began first, of those that are whole
    sweep     when a step begins, groups that began more than L steps before are dropped; their prompts are sampled anew

New weights reach a group under way: it goes on with them, and spans tell which tokens come from which. With L = 0 a
step takes what it began, with its own weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup
from gspo_megatron.base.errors import EnginesDown
from gspo_megatron.rewards.rewards import Reward, score_rollouts
from gspo_megatron.rollout.answers import Answer
from gspo_megatron.rollout.engine import Piece, Request
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.flights import Flight, Heard

END = (Flight((), SimpleQueue()), None)
"""Nothing more will be heard."""
LANDING_S = 10.0
"""How long flights may take to notice that no engine is left."""


@dataclass(eq=False)
class BufferedGroup:
    """A group that is sampled, or waits to be trained on.

    Attributes:
        step: the one in which it began.
        answers: one for each rollout, in the order of the ids.
        flight: while it is sampled.
        scoring: whether its rewards are computed now.
        rollouts: with their rewards, once all of them have ended.
    """

    prompt: Prompt
    step: int
    answers: list[Answer]
    flight: Flight | None = None
    scoring: bool = False
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def rests(self) -> bool:
        """Whether nothing carries it on, and it is not done."""
        return self.flight is None and not self.scoring and not self.rollouts

    def finished(self) -> list[Rollout]:
        """The rollouts of the answers."""
        return [
            Rollout(
                id=answer.request.id,
                prompt=self.prompt,
                tokens=list(answer.tokens),
                log_probs=list(answer.log_probs),
                truncated=answer.finish != "stop",
                policy_version=min(span.version for span in answer.versions),
                versions=[(span.version, span.begin, span.end) for span in answer.versions],
            )
            for answer in self.answers
        ]


class RolloutBuffer:
    """The groups under way, and those that wait, in the order in which they began.

    Args:
        decode: sets a rollout's text.
    """

    def __init__(self, pool: EnginePool, reward: Reward, decode: Callable[[Rollout], None], *, max_lag: int) -> None:
        self.groups: list[BufferedGroup] = []
        self._pool, self._reward, self._decode, self._max_lag = pool, reward, decode, max_lag
        self._heard: SimpleQueue[Heard] = SimpleQueue()
        self._changed = threading.Condition()
        """Of the groups, which three kinds of threads share: the run's own, the one that listens, those that score."""
        self._error: BaseException | None = None
        self._scoring = ThreadPoolExecutor(max(1, reward.groups_at_once), "reward")
        self._listener = threading.Thread(target=self._listen, name="buffer", daemon=True)
        self._listener.start()

    def begin(self, prompt: Prompt, requests: Seq[Request], step: int) -> None:
        """Samples a group."""
        with self._changed:
            self.groups.append(group := BufferedGroup(prompt, step, [Answer(request) for request in requests]))
        self._go_on(group)

    def go_on(self) -> None:
        """Carries on what rests: groups of a checkpoint, and those that an error has stopped."""
        with self._changed:
            self._error = None
            resting = [group for group in self.groups if group.rests]
        for group in resting:
            self._go_on(group)

    def _go_on(self, group: BufferedGroup) -> None:
        with self._changed:
            if rest := [answer.rest for answer in group.answers if not answer.finish]:
                group.flight = self._pool.submit(rest, self._heard)
            else:
                self._score(group)

    def sweep(self, step: int) -> list[Prompt]:
        """Drops the groups that would be too old in this step; their prompts."""
        with self._changed:
            old = [group for group in self.groups if step - group.step > self._max_lag]
            self.groups = [group for group in self.groups if group not in old]
        for group in old:
            if group.flight:
                self._pool.cancel(group.flight)
        return [group.prompt for group in old]

    def wait(self, count: int, stopped: threading.Event, *, poll_s: float = 0.05) -> list[RolloutGroup]:
        """The first `count` groups that are whole, once there are so many, or fewer if the run was asked to stop. They
        stay here until `remove`.

        Raises:
            BaseException: what sampling or scoring raised.
        """
        with self._changed:
            while not stopped.is_set():
                if isinstance(self._error, EnginesDown):
                    # Every flight ends with it; none of them is to tell of it when engines are back.
                    self._changed.wait_for(lambda: not any(group.flight for group in self.groups), LANDING_S)
                if self._error:
                    raise self._error
                if len(ready := [group for group in self.groups if group.rollouts]) >= count:
                    return [RolloutGroup(group.prompt, group.rollouts) for group in ready[:count]]
                self._changed.wait(poll_s)
        return []

    def remove(self, groups: Seq[RolloutGroup]) -> list[int]:
        """Takes out what `wait` returned; the steps in which they began."""
        first = {group.rollouts[0].id for group in groups}
        with self._changed:
            taken = [group for group in self.groups if group.answers[0].request.id in first]
            self.groups = [group for group in self.groups if group not in taken]
        return [group.step for group in taken]

    def at_rest(self) -> list[BufferedGroup]:
        """Copies of the groups as they are at this moment, without what carries them on."""
        with self._changed:
            return [
                BufferedGroup(
                    group.prompt,
                    group.step,
                    [
                        Answer(a.request, list(a.tokens), list(a.log_probs), list(a.versions), a.finish)
                        for a in group.answers
                    ],
                )
                for group in self.groups
            ]

    def close(self) -> None:
        """Ends what is under way."""
        self._heard.put(END)
        self._listener.join()
        self._scoring.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------------------------------------- other threads

    def _listen(self) -> None:
        while (heard := self._heard.get()) is not END:
            flight, piece = heard
            with self._changed:
                group = next((group for group in self.groups if group.flight is flight), None)
                if group is not None:
                    try:
                        self._hear(group, piece)
                    except BaseException as error:
                        self._error = error
                self._changed.notify_all()

    def _hear(self, group: BufferedGroup, piece: Piece | BaseException | None) -> None:
        if isinstance(piece, BaseException):
            group.flight, self._error = None, piece
        elif piece is None:
            group.flight = None
            self._score(group)
        else:
            answer = next(answer for answer in group.answers if answer.request.id == piece.id)
            answer.add(piece, range(self._pool.version + 1))

    def _score(self, group: BufferedGroup) -> None:
        group.scoring = True
        self._scoring.submit(self._scored, group)

    def _scored(self, group: BufferedGroup) -> None:
        rollouts, error = list[Rollout](), None
        try:
            rollouts = group.finished()
            for rollout in rollouts:
                self._decode(rollout)
            score_rollouts(self._reward, rollouts)
        except BaseException as caught:
            rollouts, error = [], caught
        with self._changed:
            group.scoring, group.rollouts = False, rollouts
            self._error = self._error or error
            self._changed.notify_all()
