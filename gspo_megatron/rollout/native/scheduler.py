"""Continuous batching: which rollouts are being decoded, which wait, and what has been drawn. Runs on the host.

A rollout that ends frees its row of the cache, and waiting ones are admitted, in order, to any forward that has room
for them. The rollouts of a prompt are admitted together, up to a quarter of all rows; a prompt with more of them is
admitted a quarter at a time where there is no room for all. All rollouts of a prompt that are admitted to one forward
share one prefill.

So the number of tokens of a forward depends on the number of rollouts that continue, and on nothing else that is drawn.

Shapes: W candidates that may be admitted next, M micro-batches of a forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.base.batches import IntArray, Prompt, Rollout
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.rollout.native.stopping import StopTable

Integers = TypeVar("Integers", IntArray, Tensor)


class Candidate(NamedTuple):
    """Waiting rollouts of a prompt, which are admitted together."""

    prompt_tokens: tuple[int, ...]
    rollout_index: IntArray


class Admission(NamedTuple):
    """A prompt, the rollouts of it that are admitted to a forward, and the rows of the cache that they get."""

    prompt_tokens: tuple[int, ...]
    rollout_index: IntArray
    rows: range


class DecodeMicroBatch(NamedTuple):
    """A micro-batch of one forward: a token of each rollout in `continuing`, which have the rows from `first_row` on,
    and the prompts of `admissions`."""

    first_row: int
    continuing: IntArray
    admissions: list[Admission]

    @property
    def rollout_index(self) -> IntArray:
        """The rollouts that draw a token in this micro-batch: those that continue, then the admitted ones."""
        return np.concatenate([self.continuing, *(admission.rollout_index for admission in self.admissions)])


class RowCopy(NamedTuple):
    """Rollouts have moved from `from_rows` to `to_rows`: the cache has to copy the first `length` positions."""

    from_rows: IntArray
    to_rows: IntArray
    length: int


def num_tokens_of_forward(
    num_continuing: int | Tensor, max_continuing_W: Integers, prompt_tokens_WM: Integers
) -> Integers:
    """[M] tokens of a forward: ceil(num_continuing / M) + sum_w prompt_tokens_WM [num_continuing <= max_continuing_W].

    Candidate w is admitted when at most max_continuing_W[w] rollouts continue. `num_continuing` is an int, or a tensor
    [] on the device of the others.
    """
    is_admitted_W = num_continuing <= max_continuing_W
    return -(-num_continuing // prompt_tokens_WM.shape[1]) + (prompt_tokens_WM * is_admitted_W[:, None]).sum(0)


class DecodeScheduler:
    """Rollouts 0, 1, ... N - 1 of one `generate`. Rollout `active[i]` has row i of the cache: rows in use come first.

    A forward consists of `num_micro_batches`, of at most `max_prompt_tokens` prompt tokens (or one prompt) each.

    Call `next_micro_batches` for what the next forward computes and `record` with what it drew, alternately, until
    `next_num_tokens` is 0. Before each forward, the cache performs `row_copy`.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[int],
        *,
        max_rows: int,
        max_new_tokens: int,
        max_prompt_tokens: int,
        num_micro_batches: int,
        stops: StopTable,
        begun: Sequence[int] = (),
    ) -> None:
        self.prompts, self.max_prompt_tokens, self.num_micro_batches = prompts, max_prompt_tokens, num_micro_batches
        self.stops = stops
        self.num_rows = min(max_rows, len(prompts))
        self.begun = np.array(begun if len(begun) else [0] * len(prompts), dtype=np.int64)
        """Tokens of each response that its prompt ends with."""
        self.limits = max_new_tokens - self.begun
        """The most tokens that may be drawn of each rollout."""
        assert (self.limits > 0).all(), "a rollout has room for a token"
        self.num_positions = max((len(p.tokens) - b for p, b in zip(prompts, self.begun, strict=True)), default=0)
        self.num_positions += max_new_tokens
        self.ids = np.array(ids, dtype=np.int64)
        self.counts = np.zeros(len(prompts), dtype=np.int64)
        """Tokens drawn of each rollout."""
        self.newest = np.zeros(len(prompts), dtype=np.int64)
        """The last token drawn of each rollout."""
        self.states = np.zeros(len(prompts), dtype=np.int64)
        """State of each response in `stops`."""
        self.prompt_lengths = np.array([len(p.tokens) for p in prompts], dtype=np.int64)
        self.active = np.zeros(0, dtype=np.int64)
        self.row_copy = RowCopy(self.active, self.active, 0)
        # One row per rollout, as long as the longest response: memory that is never written to is never taken.
        self._tokens = np.empty((len(prompts), max_new_tokens), dtype=np.int64)
        self._log_probs = np.empty((len(prompts), max_new_tokens))
        self._supports: dict[int, list[Ragged]] = {}
        largest_candidate = max(1, max_rows // 4)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt.tokens, []).append(i)
        self._waiting = deque(
            Candidate(tokens, np.array(rollout_index[start : start + largest_candidate]))
            for tokens, rollout_index in by_prompt.items()
            for start in range(0, len(rollout_index), largest_candidate)
        )
        self._plan_admissions()

    def progress(self) -> str:
        """How far the rollouts are, in words."""
        waiting = sum(len(candidate.rollout_index) for candidate in self._waiting)
        done, num = len(self.ids) - len(self.active) - waiting, len(self.ids)
        return f"sampling: {done} of {num} rollouts of this process have ended, {self.counts.sum():,} tokens so far"

    def _plan_admissions(self) -> None:
        """Lists the next candidates that could be admitted together if all rows were free: the most rollouts that may
        continue when each is admitted, its micro-batch, and the prompt tokens that it adds there.

        A prompt goes to the micro-batch with the fewest prompt tokens, and candidates of one prompt go together.
        """
        tokens_M, num_rows = np.zeros(self.num_micro_batches, dtype=np.int64), 0
        self._micro_batch_W: list[int] = []
        max_continuing, prompt_tokens = [], []
        prompt, chosen = None, 0
        for candidate in self._waiting:
            num_rows += len(candidate.rollout_index)
            added = 0 if candidate.prompt_tokens == prompt else len(candidate.prompt_tokens)
            if added:
                prompt, chosen = candidate.prompt_tokens, int(tokens_M.argmin())
            is_full = added and tokens_M[chosen] and tokens_M[chosen] + added > self.max_prompt_tokens
            if is_full or num_rows > self.num_rows:
                break
            tokens_M[chosen] += added
            self._micro_batch_W.append(chosen)
            max_continuing.append(self.num_rows - num_rows)
            prompt_tokens.append(np.eye(self.num_micro_batches, dtype=np.int64)[chosen] * added)
        self.max_continuing_W = np.array(max_continuing, dtype=np.int64)
        self.prompt_tokens_WM = np.array(prompt_tokens, dtype=np.int64).reshape(-1, self.num_micro_batches)

    def next_num_tokens(self) -> IntArray:
        """[M] tokens of the next forward, all 0 when everything has been drawn."""
        return num_tokens_of_forward(len(self.active), self.max_continuing_W, self.prompt_tokens_WM)

    def next_micro_batches(self) -> list[DecodeMicroBatch]:
        """The next forward. The rollouts that it admits get the rows after those in use, and are active from here
        on."""
        num_rows = len(self.active)
        size = -(-num_rows // self.num_micro_batches)
        micro_batches = [
            DecodeMicroBatch(i * size, self.active[i * size : (i + 1) * size], [])
            for i in range(self.num_micro_batches)
        ]
        num_admitted = int((num_rows <= self.max_continuing_W).sum())
        for chosen in self._micro_batch_W[:num_admitted]:
            tokens, rollout_index = self._waiting.popleft()
            self.active = np.concatenate([self.active, rollout_index])
            admissions = micro_batches[chosen].admissions
            if admissions and admissions[-1].prompt_tokens == tokens:
                rollout_index = np.concatenate([admissions.pop().rollout_index, rollout_index])
            rows = range(len(self.active) - len(rollout_index), len(self.active))
            admissions.append(Admission(tokens, rollout_index, rows))
        if num_admitted:
            self._plan_admissions()
        return micro_batches

    def record(
        self,
        rollout_index: IntArray,
        tokens: IntArray,
        log_probs: NDArray[np.float64],
        support: Ragged | None = None,
    ) -> IntArray:
        """Records what was drawn for `rollout_index`, all active rollouts in any order, and the ids that each token was
        drawn from. Of those that continue, the last move to the rows that have become free. Returns those that have
        ended."""
        at = rollout_index, self.counts[rollout_index]
        self._tokens[at], self._log_probs[at] = tokens, log_probs
        if support is not None:
            for index, of_token in zip(rollout_index.tolist(), support.each(), strict=True):
                self._supports.setdefault(index, []).append(of_token)
        self.newest[rollout_index] = tokens
        self.counts[rollout_index] += 1
        self.states[rollout_index] = self.stops.after[self.states[rollout_index], tokens]
        is_ended = self.states[self.active] == self.stops.end
        continues = ~is_ended & (self.counts[self.active] < self.limits[self.active])
        num_rows = int(continues.sum())
        free = np.flatnonzero(~continues[:num_rows])
        moved = num_rows + np.flatnonzero(continues[num_rows:])
        ended = self.active[~continues]
        self.active[free] = self.active[moved]
        self.active = self.active[:num_rows]
        self.row_copy = RowCopy(moved, free, int(self.positions(self.active[free]).max(initial=0)))
        return ended

    def positions(self, rollout_index: IntArray) -> IntArray:
        """The position of each one's newest token in its sequence, which is also the number of its tokens in the
        cache."""
        return self.prompt_lengths[rollout_index] + self.counts[rollout_index] - 1

    def response_positions(self, rollout_index: IntArray) -> IntArray:
        """The position in its response of the token that each one draws next."""
        return self.begun[rollout_index] + self.counts[rollout_index]

    def rollout(self, index: int, policy_version: int) -> Rollout:
        """What was drawn of rollout `index`."""
        count = self.counts[index]
        return Rollout(
            int(self.ids[index]),
            self.prompts[index],
            self._tokens[index, :count].tolist(),
            self._log_probs[index, :count].tolist(),
            bool(self.states[index] != self.stops.end),
            policy_version,
            support=Ragged.join(self._supports.pop(index)) if index in self._supports else None,
        )
