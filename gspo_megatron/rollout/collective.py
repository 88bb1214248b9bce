"""Rollouts sampled by the model under training; every data-parallel rank samples a share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Taken
from gspo_megatron.base.protocols import Ranks, Sampler
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.data.token_ids import Tokenizer, text_of
from gspo_megatron.rewards.rewards import Reward, refuse_unscored
from gspo_megatron.rollout.group_scores import GroupScores


@dataclass
class CollectiveSource:
    """`RolloutSource` over a `Sampler`.

    Attributes:
        next_id: the id of the next rollout.
        vocab_size: number of ids that the embedding has.
    """

    sampler: Sampler
    ranks: Ranks
    reward: Reward
    tokenizer: Tokenizer
    prompts: OrderedPrompts
    next_id: int
    prompts_per_step: int
    group_size: int
    vocab_size: int

    @property
    def taken(self) -> Taken:
        """See `RolloutSource.taken`."""
        curriculum = self.prompts.curriculum
        return Taken(self.prompts.taken, self.next_id, curriculum.state() if curriculum else {})

    @property
    def set_aside(self) -> int | None:
        """See `RolloutSource.set_aside`."""
        return self.prompts.curriculum.set_aside if self.prompts.curriculum else None

    def groups(self, step: int) -> list[RolloutGroup]:
        """See `RolloutSource.groups`. Rollouts are numbered through the run; the number seeds a rollout's random
        numbers."""
        prompts, size = self.prompts.next(self.prompts_per_step), self.group_size
        asked = [(p, self.next_id + i * size + j) for i, p in enumerate(prompts) for j in range(size)]
        rollouts = self._scored(asked, size, greedy=False)
        groups = [RolloutGroup(prompt, rollouts[i * size : (i + 1) * size]) for i, prompt in enumerate(prompts)]
        # Not before: a run that is stopped in between samples the same again.
        self.prompts.pass_on(groups)
        self.next_id += len(asked)
        return groups

    def greedy(self, prompts: Seq[Prompt]) -> list[Rollout]:
        """See `RolloutSource.greedy`."""
        return self._scored([(p, i) for i, p in enumerate(prompts)], 1, greedy=True)

    def _scored(self, asked: Seq[tuple[Prompt, int]], together: int, *, greedy: bool) -> list[Rollout]:
        """A rollout for each (prompt, id), with its reward, in the order of the ids. Each `together`
        consecutive items go to one rank."""
        for prompt in {prompt.id: prompt for prompt, _ in asked}.values():
            checked_tokens(prompt, (), self.vocab_size)
        mine = [asked[i + j] for i in self._share(len(asked), together) for j in range(together)]
        generate = partial(self.sampler.generate, [p for p, _ in mine], [i for _, i in mine], greedy=greedy)
        if self.ranks.is_reporter:
            with GroupScores(self.reward, self._decode, first_id=asked[0][1], size=together) as scores:
                rollouts = generate(ended=scores.add)
                scores.finish()
        else:
            rollouts = generate()
        gathered = sorted(self.ranks.gather(rollouts), key=lambda r: r.id)
        refuse_unscored(gathered)
        return gathered

    def _decode(self, rollout: Rollout) -> None:
        rollout.text = text_of(self.tokenizer, rollout.last_turn)

    def _share(self, stop: int, stride: int) -> range:
        """What this rank samples: every n-th item of range(0, stop, stride), where n counts data-parallel and
        context-parallel ranks: while sampling, each of them holds whole responses."""
        ranks = self.ranks
        rank, count = ranks.dp_rank * ranks.cp_size + ranks.cp_rank, ranks.dp_size * ranks.cp_size
        return range(rank * stride, stop, count * stride)
