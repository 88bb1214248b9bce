"""Prompts that teach nothing are set aside: those whose rollouts were all right, or all wrong, visit after visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gspo_megatron.base.batches import Rollout, RolloutGroup

State = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass
class Curriculum:
    """A prompt is set aside when it taught nothing in each of its last `visits` visits. After being skipped `retry`
    times it is visited once more, and comes back if it teaches something then; with retry=0 it stays away.

    Attributes:
        accuracy: 1 for a right rollout, else less.
        streaks: by prompt, the visits in a row up to the last one that taught nothing.
        skips: by prompt, how often it was skipped since its last visit.
    """

    visits: int
    retry: int
    accuracy: Callable[[Rollout], float]
    streaks: dict[int, int] = field(default_factory=dict)
    skips: dict[int, int] = field(default_factory=dict)

    def wants(self, prompt: int) -> bool:
        if self.streaks.get(prompt, 0) < self.visits:
            return True
        return 0 < self.retry <= self.skips.get(prompt, 0)

    def observe(self, groups: Sequence[RolloutGroup], skipped: Iterable[int]) -> None:
        """Notes the groups of a step, and the prompts that were skipped to find them."""
        for prompt in skipped:
            self.skips[prompt] = self.skips.get(prompt, 0) + 1
        for group in groups:
            prompt, right = group.prompt.id, [self.accuracy(rollout) >= 1 for rollout in group.rollouts]
            self.skips.pop(prompt, None)
            if all(right) or not any(right):
                self.streaks[prompt] = min(self.streaks.get(prompt, 0) + 1, self.visits)
            else:
                self.streaks.pop(prompt, None)

    @property
    def set_aside(self) -> int:
        """How many prompts are set aside now."""
        return sum(streak == self.visits for streak in self.streaks.values())

    def state(self) -> State:
        """As JSON: prompts by their streak, and by their skips."""
        return {"streaks": _by_value(self.streaks), "skips": _by_value(self.skips)}

    def restore(self, state: State) -> None:
        """What `state` returned. A run may have been saved with more visits."""
        self.streaks = {p: min(streak, self.visits) for p, streak in _by_prompt(state.get("streaks", {})).items()}
        self.skips = _by_prompt(state.get("skips", {}))


def _by_value(counts: Mapping[int, int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for prompt, count in sorted(counts.items()):
        found.setdefault(str(count), []).append(prompt)
    return found


def _by_prompt(state: Mapping[str, Sequence[int]]) -> dict[int, int]:
    return {prompt: int(count) for count, prompts in state.items() for prompt in prompts}
