"""The experts that the routers choose while rollouts are sampled, put together when all have ended.

Each rank keeps what it sees: its own layers, and under sequence parallel its part of the tokens. The ranks of a model
exchange that once, not at every token.

Shapes: T tokens of a micro-batch, N those of all micro-batches of all forwards; L layers, k experts of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.batches import IntArray
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.routing import Recording, from_parts
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.rollout.native.scheduler import DecodeMicroBatch


class SampledRouting:
    """Of one `generate`. The token that a rollout ends with has no experts: it is never processed."""

    def __init__(self, shape: ModelShape, groups: Groups) -> None:
        self.shape, self.groups = shape, groups
        self._running: list[tuple[Recording, int]] = []
        self._seen: list[Tensor] = []
        self._sizes: list[int] = []
        self._num_tokens = 0
        self._prompts: dict[int, range] = {}
        """Of each rollout, the places of its prompt among the N tokens."""
        self._rollouts: list[IntArray] = []
        self._places: list[IntArray] = []
        """Rollouts that continued, and the places of their tokens."""

    def recording(self, micro_batch: DecodeMicroBatch, num_tokens: int) -> Recording:
        """Takes part in the forward of a micro-batch of T = `num_tokens`: the newest token of each rollout that
        continues, then prompts, then padding."""
        self._rollouts.append(micro_batch.continuing.copy())  # the scheduler goes on with the array
        self._places.append(self._num_tokens + np.arange(len(micro_batch.continuing)))
        begin = self._num_tokens + len(micro_batch.continuing)
        for prompt_tokens, rollout_index, _ in micro_batch.admissions:
            places = range(begin, begin := begin + len(prompt_tokens))
            self._prompts.update((index, places) for index in rollout_index.tolist())
        self._num_tokens += num_tokens
        self._sizes.append(num_tokens)
        self._running.append((recording := Recording(self.shape, self.groups), num_tokens))
        return recording

    def keep(self) -> None:
        """Called after each forward: what it recorded is joined, a tensor for each micro-batch."""
        self._seen += [recording.seen(size) for recording, size in self._running]
        self._running.clear()

    def of_rollouts(self) -> dict[int, Tensor]:
        """`Rollout.routed_experts` of each. Collective over the ranks of the model."""
        if not self._seen:
            return {}
        parts = from_parts(torch.cat(self._seen), self.groups)
        self._seen.clear()
        whole_NLk = torch.cat(parts)[self._in_parts()].cpu()
        rollout_D = np.concatenate(self._rollouts)
        order_D = np.argsort(rollout_D, kind="stable")
        places_D = np.concatenate(self._places)[order_D]
        first, end = (np.searchsorted(rollout_D[order_D], list(self._prompts), side) for side in ("left", "right"))
        return {
            index: whole_NLk[torch.from_numpy(np.concatenate([np.asarray(places), places_D[i:j]]))]
            for (index, places), i, j in zip(self._prompts.items(), first, end, strict=True)
        }

    def _in_parts(self) -> Tensor:
        """Where each of the N tokens is, the parts of all tensor-parallel ranks end to end: a micro-batch is split into
        equal parts."""
        tp = self.groups.layout.tp
        sizes = np.array(self._sizes)
        begin_N = np.repeat(np.cumsum(sizes) - sizes, sizes)
        part, inside = np.divmod(np.arange(self._num_tokens) - begin_N, np.repeat(sizes // tp, sizes))
        return torch.from_numpy(part * (self._num_tokens // tp) + begin_N // tp + inside).to(self.groups.device)
