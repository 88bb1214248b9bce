"""Which rollouts are being decoded, which wait, and what has been drawn, on the host.

A rollout that ends gives its row of the cache back, and waiting ones take over, in order, in any forward that finds
room for them. Rollouts of a prompt enter together, as long as they are no more than a quarter of all rows; more of them
enter a quarter at a time where there is no room for all. Those that enter in one forward share one prefill.

How many tokens a forward has then depends on the number of rollouts that go on, and on nothing else that is drawn.

Shapes: W entries that may follow next, P parts that a forward is cut into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.base.batches import IntArray, Prompt, Rollout

Numbers = TypeVar("Numbers", IntArray, Tensor)


class Admission(NamedTuple):
    """A prompt, those of its rollouts that enter together, and the rows that they get."""

    tokens: tuple[int, ...]
    rollout_index: IntArray
    rows: range


class Move(NamedTuple):
    """The first `length` positions of `from_rows` are needed in `to_rows`."""

    from_rows: IntArray
    to_rows: IntArray
    length: int


class Part(NamedTuple):
    """A part of a forward: `going_on` have the rows from `first_row` on."""

    first_row: int
    going_on: IntArray
    entering: list[Admission]


def tokens_of_forward(going_on: Any, max_going_on_W: Numbers, prompt_tokens_WP: Numbers) -> Numbers:
    """[P] tokens of a forward: ceil(going_on / P) + sum_w prompt_tokens_WP [going_on <= max_going_on_W].

    Admission w of those that wait follows when at most max_going_on_W rollouts go on. `going_on` is an int, or [] on
    the device that has the others.
    """
    enters_W = going_on <= max_going_on_W
    return -(-going_on // prompt_tokens_WP.shape[1]) + (prompt_tokens_WP * enters_W[:, None]).sum(0)


class DecodeScheduler:
    """Rollouts 0, 1, ... N - 1 of one `generate`. Rollout `active[i]` has row i of the cache: rows in use come first.

    A forward is cut into `num_parts`, of at most `max_prompt_tokens` prompt tokens (or one prompt) each.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[int],
        *,
        max_rows: int,
        max_new_tokens: int,
        max_prompt_tokens: int,
        num_parts: int,
        eos_id: int,
    ) -> None:
        self.prompts, self.max_prompt_tokens, self.num_parts = prompts, max_prompt_tokens, num_parts
        self.max_new_tokens, self.eos_id = max_new_tokens, eos_id
        self.num_rows = min(max_rows, len(prompts))
        self.num_positions = max((len(p.tokens) for p in prompts), default=0) + max_new_tokens
        self.ids = np.array(ids, dtype=np.int64)
        self.counts = np.zeros(len(prompts), dtype=np.int64)
        """Tokens drawn of each rollout."""
        self.newest = np.zeros(len(prompts), dtype=np.int64)
        self.prompt_lengths = np.array([len(p.tokens) for p in prompts], dtype=np.int64)
        self.active = np.zeros(0, dtype=np.int64)
        self.move = Move(self.active, self.active, 0)
        """What has to be done in the cache before the next forward."""
        self._drawn: list[tuple[IntArray, IntArray, NDArray[np.float64]]] = []
        at_once = max(1, max_rows // 4)
        together: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            together.setdefault(prompt.tokens, []).append(i)
        self._waiting = deque(
            (tokens, np.array(rollout_index[start : start + at_once]))
            for tokens, rollout_index in together.items()
            for start in range(0, len(rollout_index), at_once)
        )
        self._look_ahead()

    def _look_ahead(self) -> None:
        """What the next entries bring that could follow together if all rows were free: prompts go to the part that has
        fewest of their tokens, entries of one prompt go together."""
        in_part, num_rows = np.zeros(self.num_parts, dtype=np.int64), 0
        self._part_of: list[int] = []
        max_going_on, prompt_tokens = [], []
        prompt, part = None, 0
        for tokens, rollout_index in self._waiting:
            num_rows += len(rollout_index)
            brought = 0 if tokens == prompt else len(tokens)
            if brought:
                prompt, part = tokens, int(in_part.argmin())
            full = brought and in_part[part] and in_part[part] + brought > self.max_prompt_tokens
            if full or num_rows > self.num_rows:
                break
            in_part[part] += brought
            self._part_of.append(part)
            max_going_on.append(self.num_rows - num_rows)
            prompt_tokens.append(np.eye(self.num_parts, dtype=np.int64)[part] * brought)
        self.max_going_on_W = np.array(max_going_on, dtype=np.int64)
        self.prompt_tokens_WP = np.array(prompt_tokens, dtype=np.int64).reshape(-1, self.num_parts)

    def next_tokens(self) -> IntArray:
        """[P] tokens of the next forward, all 0 when everything has been drawn."""
        return tokens_of_forward(len(self.active), self.max_going_on_W, self.prompt_tokens_WP)

    def next_parts(self) -> list[Part]:
        """Who draws in the next forward. Those that enter take the rows behind those in use, and are active from here
        on."""
        num_rows = len(self.active)
        size = -(-num_rows // self.num_parts)
        parts = [Part(i * size, self.active[i * size : (i + 1) * size], []) for i in range(self.num_parts)]
        num_entering = int((num_rows <= self.max_going_on_W).sum())
        for part in self._part_of[:num_entering]:
            tokens, rollout_index = self._waiting.popleft()
            self.active = np.concatenate([self.active, rollout_index])
            entering = parts[part].entering
            if entering and entering[-1].tokens == tokens:
                rollout_index = np.concatenate([entering.pop().rollout_index, rollout_index])
            entering.append(
                Admission(tokens, rollout_index, range(len(self.active) - len(rollout_index), len(self.active)))
            )
        if num_entering:
            self._look_ahead()
        return parts

    def record(self, rollout_index: IntArray, tokens: IntArray, log_probs: NDArray[np.float64]) -> None:
        """Notes what was drawn for `rollout_index`, all that are active in any order. The last of those that go on
        move into the rows that have become free."""
        self._drawn.append((rollout_index, tokens, log_probs))
        self.newest[rollout_index] = tokens
        self.counts[rollout_index] += 1
        goes_on = (self.newest[self.active] != self.eos_id) & (self.counts[self.active] < self.max_new_tokens)
        num_rows = int(goes_on.sum())
        free = np.flatnonzero(~goes_on[:num_rows])
        left = num_rows + np.flatnonzero(goes_on[num_rows:])
        self.active[free] = self.active[left]
        self.active = self.active[:num_rows]
        self.move = Move(left, free, int(self.positions(self.active[free]).max(initial=0)))

    def positions(self, rollout_index: IntArray) -> IntArray:
        """Where the newest token of each stands in its sequence: so many tokens of it are in the cache."""
        return self.prompt_lengths[rollout_index] + self.counts[rollout_index] - 1

    def rollouts(self, policy_version: int) -> list[Rollout]:
        """All rollouts, in order."""
        if not self._drawn:
            return []
        rollout_index, tokens, log_probs = (np.concatenate(x) for x in zip(*self._drawn, strict=True))
        order = np.argsort(rollout_index, kind="stable")
        of_each = [np.split(x[order], np.cumsum(self.counts))[:-1] for x in (tokens, log_probs)]
        return [
            Rollout(int(i), prompt, t.tolist(), p.tolist(), bool(t[-1] != self.eos_id), policy_version)
            for i, prompt, t, p in zip(self.ids, self.prompts, *of_each, strict=True)
        ]
