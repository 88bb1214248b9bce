"""The rewards of a run: one for all prompts, or another for those of some sources."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.build.data import sources_of
from gspo_megatron.build.programs import CODE, check_programs, sandbox_of
from gspo_megatron.config.sections import Config
from gspo_megatron.rewards.rewards import Reward, Rewards, Score


class RunRewards(Reward, Protocol):
    """What a run asks of its rewards in addition to scores; see `Rewards`."""

    def check_answer(self, prompt: Prompt) -> None: ...

    @property
    def judged_by(self) -> str: ...

    def accuracy(self, rollout: Rollout) -> float: ...

    @property
    def longest_s(self) -> Mapping[str, float]: ...

    def use_workers(self, count: int) -> None: ...

    def check_services(self) -> None: ...

    def try_functions(self, rollout: Rollout) -> Score: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RewardsBySource:
    """The rewards of the sources that have their own, by name, and those of all other prompts."""

    others: Rewards
    by_source: Mapping[str, Rewards]

    @property
    def groups_at_once(self) -> int:
        return max(rewards.groups_at_once for rewards in self._all)

    @property
    def most_lost(self) -> float:
        return self.others.most_lost

    def score(self, rollouts: Seq[Rollout]) -> list[Score]:
        """See `Reward.score`."""
        found: dict[int, Score] = {}
        for rewards in self._all:
            own = [r for r in rollouts if self._of(r.prompt) is rewards]
            found |= {id(r): score for r, score in zip(own, rewards.score(own) if own else [], strict=True)}
        return [found[id(rollout)] for rollout in rollouts]

    def check_answer(self, prompt: Prompt) -> None:
        self._of(prompt).check_answer(prompt)

    @property
    def judged_by(self) -> str:
        return self.others.judged_by

    def accuracy(self, rollout: Rollout) -> float:
        return self._of(rollout.prompt).accuracy(rollout)

    @property
    def longest_s(self) -> dict[str, float]:
        return {name: longest for rewards in self._all for name, longest in rewards.longest_s.items()}

    def use_workers(self, count: int) -> None:
        for rewards in self._all:
            rewards.use_workers(count)

    def try_functions(self, rollout: Rollout) -> Score:
        return self._of(rollout.prompt).try_functions(rollout)

    def check_services(self) -> None:
        with ThreadPoolExecutor(len(self._all)) as threads:
            list(threads.map(Rewards.check_services, self._all))

    def close(self) -> None:
        for rewards in self._all:
            rewards.close()

    @property
    def _all(self) -> list[Rewards]:
        return [self.others, *self.by_source.values()]

    def _of(self, prompt: Prompt) -> Rewards:
        return self.by_source.get(prompt.source, self.others)


def rewards_of(config: Config) -> RunRewards:
    """With one process for functions that need processes; `build.trainer` has as many started as a run uses.

    Raises:
        ConfigError: a reward that cannot be used.
    """
    r = config.reward
    check_programs(config)
    names = [*r.functions, *(term.get("function") for term in r.terms)]
    others = Rewards(r.functions, r.accuracy, r.on_error, terms=r.terms, **_how(config, names))
    own = {source.name: source.reward for source in sources_of(config, "train") if source.reward}
    if not own:
        return others
    return RewardsBySource(others, {name: own_rewards(config, functions) for name, functions in own.items()})


def slow_rewards(config: Config, rewards: Iterable[RunRewards]) -> list[str]:
    """Warnings about rewards that may take longer than the ranks wait for the one that scores."""
    wait = config.parallel.timeout_s
    slow = {name: longest for each in rewards for name, longest in each.longest_s.items() if longest >= wait}
    return [
        f"reward {name!r} may take {longest:g} s, and ranks give up on the one that waits for it after "
        f"parallel.timeout_s={wait:g}; lower its timeout_s or retries (of a function, reward.timeout_s), or raise that"
        for name, longest in slow.items()
    ]


def own_rewards(config: Config, functions: Mapping[str, float]) -> Rewards:
    """Of a source, or a held-out set, that has its own. Raises as `rewards_of` does."""
    return Rewards(functions, None, config.reward.on_error, **_how(config, functions))


def _how(config: Config, functions: Iterable[Any]) -> dict[str, Any]:
    """How functions that need processes are called."""
    r = config.reward
    how: dict[str, Any] = {"isolate": r.isolate, "timeout_s": r.timeout_s, "memory_gib": r.memory_gib}
    how |= {"seed": config.run.seed, "most_lost": r.most_lost, "environment": os.environ}
    if CODE in functions:
        how["defaults"] = {CODE: {"sandbox": sandbox_of(config)}}
    return how
