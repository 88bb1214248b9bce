"""Rollouts with their rewards, in numbered groups; and those that the model under training samples: every data-parallel
rank samples a share of the prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

from gspo_megatron.base.batches import Held, Prompt, Rollout, RolloutGroup, Sampling, Taken
from gspo_megatron.base.protocols import Ranks, Sampler
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.data.token_ids import Tokenizer, text_of
from gspo_megatron.rewards.rewards import Reward, refuse_unscored
from gspo_megatron.rollout.group_scores import GroupScores

Asked = Seq[tuple[Prompt, int]]
"""(prompt, id) of each rollout, in the order of the ids. Consecutive ones are a group."""


@dataclass
class ScoredSource(ABC):
    """Rollouts with their rewards, whoever samples them.

    Attributes:
        vocab_size: number of ids that the embedding has.
    """

    ranks: Ranks
    tokenizer: Tokenizer
    vocab_size: int

    def held_out(self, prompts: Seq[Prompt], n: int, sampling: Sampling, reward: Reward) -> list[RolloutGroup]:
        """See `RolloutSource.held_out`. Ids count from 0: the seed is another than that of `groups`."""
        return self._scored([(p, i * n + j) for i, p in enumerate(prompts) for j in range(n)], n, reward, sampling)

    def _scored(
        self, asked: Asked, together: int, reward: Reward, sampling: Sampling | None = None
    ) -> list[RolloutGroup]:
        """A rollout for each (prompt, id), with its reward. Each `together` of them are a group."""
        for prompt in {prompt.id: prompt for prompt, _ in asked}.values():
            checked_tokens(prompt, (), self.vocab_size)
        rollouts = sorted(self._rollouts(asked, together, reward, sampling), key=lambda r: r.id)
        refuse_unscored(rollouts, reward.most_lost)
        return [RolloutGroup(asked[i][0], rollouts[i : i + together]) for i in range(0, len(asked), together)]

    @abstractmethod
    def _rollouts(self, asked: Asked, together: int, reward: Reward, sampling: Sampling | None) -> list[Rollout]:
        """The rollouts, scored, in any order, the same on all ranks."""

    def _decode(self, rollout: Rollout) -> None:
        rollout.text = text_of(self.tokenizer, rollout.last_turn)


@dataclass
class HeldOutSource(ScoredSource):
    """Responses to held-out prompts, over a `Sampler`. A group goes to one rank."""

    sampler: Sampler

    def _rollouts(self, asked: Asked, together: int, reward: Reward, sampling: Sampling | None) -> list[Rollout]:
        mine = [asked[i + j] for i in self._share(len(asked), together) for j in range(together)]
        prompts, ids = [prompt for prompt, _ in mine], [number for _, number in mine]
        greedy = sampling is not None and sampling.temperature == 0
        generate = partial(self.sampler.generate, prompts, ids, greedy=greedy, sampling=sampling)
        if self.ranks.is_reporter:
            with GroupScores(reward, self._decode, first_id=asked[0][1], size=together) as scores:
                rollouts = generate(ended=scores.add)
                scores.finish()
        else:
            rollouts = generate()
        experts = {rollout.id: rollout.routed_experts for rollout in rollouts}
        gathered = self.ranks.gather(rollouts)
        for rollout in gathered:
            rollout.routed_experts = experts.get(rollout.id)
        return gathered

    def _share(self, stop: int, stride: int) -> range:
        """What this rank samples: every n-th item of range(0, stop, stride), where n counts data-parallel and
        context-parallel ranks: while sampling, each of them holds whole responses."""
        ranks = self.ranks
        rank, count = ranks.dp_rank * ranks.cp_size + ranks.cp_rank, ranks.dp_size * ranks.cp_size
        return range(rank * stride, stop, count * stride)


@dataclass
class TrainingSource(ScoredSource):
    """`RolloutSource`: numbered groups of the training prompts.

    Attributes:
        next_id: the id of the next rollout.
    """

    reward: Reward
    prompts: OrderedPrompts
    next_id: int
    prompts_per_step: int
    group_size: int

    @property
    def taken(self) -> Taken:
        """See `RolloutSource.taken`."""
        curriculum = self.prompts.curriculum
        return Taken(self.prompts.taken, self.next_id, curriculum.state() if curriculum else {})

    def held(self) -> Held | None:
        """See `RolloutSource.held`."""
        return None

    def close(self) -> None:
        """See `RolloutSource.close`: nothing is under way between two calls."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """See `RolloutSource.metrics`."""
        curriculum = self.prompts.curriculum
        return {"prompts/set_aside": curriculum.set_aside} if curriculum else {}

    def groups(self, step: int, count: int | None = None) -> list[RolloutGroup]:
        """See `RolloutSource.groups`. Rollouts are numbered through the run; the number seeds a rollout's random
        numbers."""
        prompts, size = self.prompts.next(count or self.prompts_per_step), self.group_size
        asked = [(p, self.next_id + i * size + j) for i, p in enumerate(prompts) for j in range(size)]
        groups = self._scored(asked, size, self.reward)
        # Not before: a run that is stopped in between samples the same again.
        self.prompts.pass_on(groups)
        self.next_id += len(asked)
        return groups


@dataclass
class CollectiveSource(TrainingSource, HeldOutSource):
    """`RolloutSource` over a `Sampler`."""
