"""Dynamic sampling: groups that teach nothing are replaced by those of further prompts (2503.14476, DAPO, Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from gspo_megatron.base.batches import Held, Prompt, Rollout, RolloutGroup, Sampling, Taken
from gspo_megatron.objective import rewards_differ
from gspo_megatron.rewards.rewards import Reward
from gspo_megatron.rollout.source import RolloutSource


@dataclass
class DynamicSampling:
    """`RolloutSource` around another one: `count` groups whose rewards differ, out of 1 + `most_rounds` rounds.

    The first round has `count` prompts. A further one has as many as are missing divided by the share kept so far, at
    most `count`, so that one is enough on average. Surplus groups, the last in the order of prompts, are dropped. What
    is still missing after `most_rounds` is filled with the first groups that were dropped: a batch keeps its size, and
    so does what a learning rate means.

    All of it follows from rewards that are equal on all ranks, so it does not depend on the layout.

    Attributes:
        accuracy: 1 for a right rollout, else less.
    """

    source: RolloutSource
    count: int
    most_rounds: int
    accuracy: Callable[[Rollout], float]
    _before: Taken | None = None
    _found: dict[str, float] = field(default_factory=dict)

    @property
    def taken(self) -> Taken:
        """See `RolloutSource.taken`. A step whose sampling was interrupted has taken nothing: its first round, and so
        every other, is sampled again."""
        return self._before or self.source.taken

    def held(self) -> Held | None:
        """See `RolloutSource.held`."""
        return self.source.held()

    def close(self) -> None:
        """See `RolloutSource.close`."""
        self.source.close()

    @property
    def metrics(self) -> Mapping[str, float]:
        """See `RolloutSource.metrics`."""
        return {**self.source.metrics, **self._found}

    def groups(self, step: int, count: int | None = None) -> list[RolloutGroup]:
        """See `RolloutSource.groups`."""
        wanted = self.count if count is None else count
        self._before = self.source.taken
        kept, dropped = list[RolloutGroup](), list[RolloutGroup]()
        rounds, asked = 0, wanted
        while asked and rounds <= self.most_rounds:
            for group in self.source.groups(step, asked):
                (kept if rewards_differ([r.reward for r in group.rollouts]) else dropped).append(group)
            rounds += 1
            share = len(kept) / (len(kept) + len(dropped))
            missing = max(wanted - len(kept), 0)
            asked = min(math.ceil(missing / share), wanted) if share else wanted
        self._before, self._found = None, self._metrics(kept, dropped, wanted, rounds)
        return [*kept, *dropped][:wanted]

    def held_out(self, prompts: Seq[Prompt], n: int, sampling: Sampling, reward: Reward) -> list[RolloutGroup]:
        """See `RolloutSource.held_out`."""
        return self.source.held_out(prompts, n, sampling, reward)

    def _metrics(
        self, kept: Seq[RolloutGroup], dropped: Seq[RolloutGroup], wanted: int, rounds: int
    ) -> dict[str, float]:
        right = [[self.accuracy(rollout) >= 1 for rollout in group.rollouts] for group in dropped]
        filled = max(wanted - len(kept), 0)
        unused = [*kept[wanted:], *dropped[filled:]]
        return {
            "groups/rounds": rounds,
            "groups/kept_fraction": len(kept) / (len(kept) + len(dropped)),
            "groups/dropped_all_right": sum(map(all, right)),
            "groups/dropped_all_wrong": sum(not any(of_group) for of_group in right),
            "groups/surplus": len(kept) - wanted + filled,
            "groups/filled": filled,
            "groups/unused_tokens": sum(len(r.tokens) for group in unused for r in group.rollouts),
        }
