"""Rollouts that engines sample while the trainer trains: rollout.max_lag above 0.

One call of `groups`:
1. The engines get the policy's weights; what is under way goes on with them.
2. The buffer drops what grew too old, and begins new groups as far as its rules allow.
3. Once enough groups are whole, every rank gets them. The others are sampled on during the updates.

Which weights sample which token depends on time, and so does what a step gets: a run that is continued goes on with its
groups where they were cut, but not with the bits that it would have had. rollouts/step_*.jsonl has what it got.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple

import torch

from gspo_megatron.base.batches import Held, Prompt, RolloutGroup, Taken
from gspo_megatron.base.errors import CheckpointError, plural
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.rewards.rewards import refuse_unscored
from gspo_megatron.rollout.answers import Answer
from gspo_megatron.rollout.buffer import BufferedGroup, RolloutBuffer
from gspo_megatron.rollout.engine import PauseMode, Span
from gspo_megatron.rollout.served import ServedSource


class Found(NamedTuple):
    """What the main process tells the others of the last step's groups."""

    taken: Taken
    metrics: dict[str, float]


@dataclass
class BufferedSource(ServedSource):
    """`RolloutSource` over engines that sample ahead.

    Attributes:
        max_lag: the most steps between the beginning of a group and the step that trains on it.
        saved: what a checkpoint held of `held`.
        warn: called with a line for the user.
    """

    max_lag: int = 1
    saved: Held | None = None
    warn: Callable[[str], None] = lambda line: None
    pause_mode: PauseMode = "keep"
    _buffer: RolloutBuffer | None = field(default=None, init=False)
    _again: deque[Prompt] = field(default_factory=deque, init=False)
    _swept: int = field(default=0, init=False)
    """Groups, since the last step."""
    _found: Found | None = field(default=None, init=False)

    def _open(self, stopped: Event) -> None:
        super()._open(stopped)
        if self._pool is not None and self._buffer is None:
            self._buffer = RolloutBuffer(self._pool, self.reward, self._decode, max_lag=self.max_lag)
            self._buffer.groups, self._again = self._restored()

    def close(self) -> None:
        """See `RolloutSource.close`."""
        if self._buffer is not None:
            self._buffer.close()

    @property
    def taken(self) -> Taken:
        """See `RolloutSource.taken`: groups under way have taken their prompts, also in a step that was interrupted.
        Only the main process knows of those."""
        return self._found.taken if self._found and not self.ranks.is_main else super().taken

    @property
    def metrics(self) -> Mapping[str, float]:
        """See `RolloutSource.metrics`."""
        return {**super().metrics, **(self._found.metrics if self._found else {})}

    def groups(self, step: int, count: int | None = None) -> list[RolloutGroup]:
        """See `RolloutSource.groups`."""
        wanted = count or self.prompts_per_step
        found = self._sampled(lambda stopped: self._next(step, wanted, stopped))
        # Not before: of a run that is stopped in between, a checkpoint holds them.
        self._found = self.ranks.from_main(lambda stopped: self._take(step, found), lambda: False)
        return found

    # -------------------------------------------------------------------------------------- on the main process

    def _next(self, step: int, count: int, stopped: Event) -> list[RolloutGroup]:
        """The groups of a step, which stay in the buffer; none if the run is to stop."""
        assert self._buffer is not None, "the main process has the buffer"
        swept = self._buffer.sweep(step)
        self._again += swept
        self._swept += len(swept)
        self._buffer.go_on()
        self._begin(step, self.max_lag * self.prompts_per_step + count)
        groups = self._buffer.wait(count, stopped)
        refuse_unscored([rollout for group in groups for rollout in group.rollouts], self.reward.most_lost)
        return groups

    def _take(self, step: int, groups: Seq[RolloutGroup]) -> Found:
        """Every process has the groups: they are the step's."""
        assert self._buffer is not None
        began, swept, self._swept = self._buffer.remove(groups), self._swept, 0
        if self.prompts.curriculum:
            self.prompts.curriculum.observe(groups, ())
        return Found(super().taken, self._metrics(step, groups, began, swept))

    def _begin(self, step: int, most: int) -> None:
        """Begins groups until `most` are under way or wait.

        Raises:
            DataError: a prompt cannot be asked. It stays in `_again`, with those behind it.
        """
        assert self._buffer is not None
        room = max(most - len(self._buffer.groups), 0)
        self._again += self.prompts.begin(max(room - len(self._again), 0))
        for _ in range(room):
            checked_tokens(self._again[0], (), self.vocab_size)
            prompt, first = self._again.popleft(), self.next_id
            self.next_id += self.group_size
            requests = [self._request(prompt, first + i, self.as_in_training) for i in range(self.group_size)]
            self._buffer.begin(prompt, requests, step)

    def _metrics(self, step: int, groups: Seq[RolloutGroup], began: Seq[int], swept: int) -> dict[str, float]:
        spans = [span for group in groups for rollout in group.rollouts for span in rollout.versions]
        older = sum(end - begin for version, begin, end in spans if version < self.policy.version)
        lags = [step - first for first in began]
        return {
            "lag/mean": sum(lags) / len(lags),
            "lag/max": max(lags),
            "lag/swept": swept,
            "lag/older_tokens": older / sum(end - begin for _, begin, end in spans),
        }

    # ------------------------------------------------------------------------------------------ in a checkpoint

    def held(self) -> Held | None:
        """See `RolloutSource.held`."""
        mine = self._held() if self.ranks.is_main else None
        about = self.ranks.from_main(lambda stopped: mine and mine.about, lambda: False)
        return None if about is None else Held(about, mine.tensors if mine else {})

    def _held(self) -> Held | None:
        if self._buffer is None:
            return self.saved
        groups = self._buffer.at_rest()
        answers = [answer for group in groups for answer in group.answers]
        about = {
            "groups": [
                {
                    "prompt": group.prompt.id,
                    "tokens": digest_of(group.prompt),
                    "step": group.step,
                    "rollouts": [
                        {"id": a.request.id, "versions": [list(span) for span in a.versions], "finish": a.finish}
                        for a in group.answers
                    ],
                }
                for group in groups
            ],
            "again": [prompt.id for prompt in self._again],
        }
        tensors = {
            "lengths_S": torch.tensor([len(a.tokens) for a in answers], dtype=torch.int64),
            "tokens_R": torch.tensor([t for a in answers for t in a.tokens], dtype=torch.int32),
            "log_probs_R": torch.tensor([p for a in answers for p in a.log_probs], dtype=torch.float64),
        }
        return Held(about, tensors)

    def _restored(self) -> tuple[list[BufferedGroup], deque[Prompt]]:
        """What `saved` has: groups go on where they were cut, and prompts that are to be sampled again. A group of
        another rollout.group_size, or of a prompt that the data no longer has, is dropped with a warning; what the data
        has in its place is sampled. Every checkpoint of a run with a lag holds groups: to refuse such settings would be
        to forbid them for good.

        Raises:
            CheckpointError: something is missing, or does not fit the rest.
        """
        if self.saved is None:
            return [], deque()
        about, tensors = self.saved
        groups, again, dropped = list[BufferedGroup](), list[int](), dict[str, int]()
        try:
            lengths = tensors["lengths_S"].tolist()
            tokens, log_probs = (iter(tensors[name].split(lengths)) for name in ("tokens_R", "log_probs_R"))
            for group in about["groups"]:
                sampled = [(one, next(tokens).tolist(), next(log_probs).tolist()) for one in group["rollouts"]]
                prompt = self._prompt(group["prompt"])
                if why := self._misfit(group, prompt):
                    dropped[why] = dropped.get(why, 0) + 1
                    again.append(group["prompt"])
                else:
                    assert prompt is not None, "it fits"
                    answers = [self._answer(prompt, *one) for one in sampled]
                    groups.append(BufferedGroup(prompt, group["step"], answers))
            waiting = [self._prompt(index) for index in [*again, *about["again"]]]
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, StopIteration) as error:
            raise CheckpointError(
                f"the rollouts under way of the checkpoint do not fit together ({type(error).__name__}: {error}): its "
                "files were edited, or are not this program's; continue from an earlier checkpoint"
            ) from error
        for why, count in dropped.items():
            self.warn(f"{plural(count, 'group')} that the run had sampled ahead are dropped: {why}")
        return groups, deque(prompt for prompt in waiting if prompt is not None)

    def _prompt(self, index: int) -> Prompt | None:
        """Of the training data; None where it has become smaller."""
        source = self.prompts.source
        return None if source.size is not None and index >= source.size else source[index]

    def _misfit(self, group: Mapping[str, Any], prompt: Prompt | None) -> str:
        """Why a saved group cannot go on; empty if it can."""
        # Checkpoints of earlier versions lack the digest.
        if prompt is None or group.get("tokens") not in (None, digest_of(prompt)):
            return "data.train has other prompts in their place"
        if (size := len(group["rollouts"])) != self.group_size:
            return f"they have {plural(size, 'rollout')}, and rollout.group_size={self.group_size}"
        return ""

    def _answer(self, prompt: Prompt, about: Mapping[str, Any], tokens: list[int], log_probs: list[float]) -> Answer:
        request = self._request(prompt, about["id"], self.as_in_training)
        answer = Answer(request, tokens, log_probs, [Span(*span) for span in about["versions"]], about["finish"])
        # It was cut where rollout.max_new_tokens or a stop is now.
        if not answer.finish:
            answer.close_if_whole()
        return answer


def digest_of(prompt: Prompt) -> str:
    """Of the prompt's tokens: its place in the data does not tell whether it is still the same."""
    return hashlib.sha256(repr(prompt.tokens).encode()).hexdigest()[:16]
