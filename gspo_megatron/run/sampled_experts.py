"""The experts that a sampler chose: checked, and brought to the ranks that train on their tokens.

The ranks that sampled a rollout have its experts. All ranks learn who that is; the plan of a mini-batch says who needs
them, and they go there, and nowhere else: of a model with 30B parameters they are 384 bytes a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.base.batches import NO_EXPERT, Rollout, Sequence
from gspo_megatron.base.errors import DataError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.base.replay import expert_dtype
from gspo_megatron.data.packing import Plan
from gspo_megatron.models.shape import ModelShape

COLUMN = "routed_experts"


@dataclass(frozen=True)
class SampledExperts:
    """Those of a step's rollouts.

    Attributes:
        holders: who has those of each rollout, as `Ranks.exchange` counts.
    """

    rollouts: Seq[Rollout]
    holders: Seq[int]
    shape: ModelShape
    ranks: Ranks

    @classmethod
    def of(cls, rollouts: Seq[Rollout], shape: ModelShape, ranks: Ranks, *, needed: bool) -> SampledExperts | None:
        """None where no rollout has any and they are not `needed`. Collective, with the same result or error
        everywhere.

        Raises:
            DataError: those of a rollout are missing, or cannot be those of its tokens in this model.
        """
        own = _own(ranks)
        mine = [(r.id, own, problem_of(r, r.routed_experts, shape)) for r in rollouts if r.routed_experts is not None]
        said: dict[int, tuple[int, str]] = {number: (holder, problem) for number, holder, problem in ranks.gather(mine)}
        if not said and not needed:
            return None
        for rollout in rollouts:
            _, problem = said.get(rollout.id, (0, "comes without the experts that its sampler chose for its tokens"))
            if problem:
                raise DataError(f"rollout {rollout.id} {problem}; set algorithm.routing_replay=R2, or none")
        return cls(rollouts, [said[rollout.id][0] for rollout in rollouts], shape, ranks)

    def deliver(self, plan: Plan, members: Seq[int], sequences: Seq[Sequence]) -> None:
        """Fills in the column `routed_experts` of the sequences that this rank trains on, whose last tokens have none.
        `plan` is that of sequences[i], i in `members`. The ranks of a context-parallel group get whole sequences.
        Collective."""
        own, dtype = _own(self.ranks), expert_dtype(self.shape.num_experts)
        readers = [sorted(members[i] for micro_batch in of_rank for i in micro_batch) for of_rank in plan]
        parts = []
        for wanted in readers:
            sent = [self.rollouts[i].routed_experts for i in wanted if self.holders[i] == own]
            flat = [experts.to(dtype).flatten() for experts in sent if experts is not None]
            parts += [torch.cat([torch.empty(0, dtype=dtype), *flat])] * self.ranks.cp_size
        size = self.shape.num_layers, self.shape.experts_per_token
        unknown = torch.full((1, *size), NO_EXPERT, dtype=dtype)
        for holder, received in enumerate(self.ranks.exchange(parts)):
            held = [i for i in readers[self.ranks.dp_rank] if self.holders[i] == holder]
            split = received.view(-1, *size).split([len(sequences[i]) - 1 for i in held])
            for i, experts in zip(held, split, strict=True):
                sequences[i].columns[COLUMN] = torch.cat([experts, unknown])

    def release(self, sequences: Seq[Sequence]) -> None:
        """Forgets them, once the micro-batches have copies."""
        for rollout, sequence in zip(self.rollouts, sequences, strict=True):
            rollout.routed_experts = None
            sequence.columns.pop(COLUMN, None)


def _own(ranks: Ranks) -> int:
    return ranks.dp_rank * ranks.cp_size + ranks.cp_rank


def problem_of(rollout: Rollout, experts: Tensor, shape: ModelShape) -> str:
    """What is wrong with the experts of a rollout, in words; empty where nothing is."""
    processed = len(rollout.prompt.tokens) + len(rollout.tokens) - 1
    wanted = (processed, shape.num_layers, shape.experts_per_token)
    if tuple(experts.shape) != wanted:
        found, right = (" x ".join(map(str, size)) for size in (experts.shape, wanted))
        return f"has {found} experts; tokens before the last x layers x experts of a token are {right}"
    if experts.numel() and not (int(experts.min()) >= NO_EXPERT and int(experts.max()) < shape.num_experts):
        bad = experts[(experts < NO_EXPERT) | (experts >= shape.num_experts)]
        return f"has expert {int(bad[0])}, and the model has the experts 0 to {shape.num_experts - 1}"
    return ""
