"""Responses from the training model itself: in every forward, a token more for every rollout that is being sampled.

Works on any layout: every rank of the world takes part in every forward (experts are shared over data-parallel ranks),
the last pipeline stage draws, and the other stages hear the token. The prompts of rollouts that enter ride along with
the newest tokens of the others (see rollout/native/scheduler.py for who enters when). The ranks of a context-parallel
group hold the same weights and sample different rollouts, as data-parallel ranks do.

On a device the host waits once a forward, for one tensor: the tokens, their log-probs, and what all ranks have agreed
on. What Megatron's own layers wait for comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.base.batches import IntArray, Prompt, Rollout
from gspo_megatron.base.errors import StopRequested
from gspo_megatron.base.tensors import on_device
from gspo_megatron.layout.layout import packing_rules, token_multiple
from gspo_megatron.log_probs import vocab_parallel_logits
from gspo_megatron.mcore import schedule
from gspo_megatron.mcore.kv_cache import KVCache
from gspo_megatron.mcore.packed_tokens import CachedTokens
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.rollout.native.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.rollout.native.scheduler import DecodeScheduler, Part, tokens_of_forward


class Feed(NamedTuple):
    """One part of a forward, on the host: rollout `rollout_index[i]` draws with `uniforms[i]` from the hidden state of
    row `source[i]`."""

    place: CachedTokens
    rollout_index: IntArray
    uniforms: NDArray[np.float64]
    source: IntArray
    tokens: IntArray

    def arrays(self) -> list[IntArray]:
        """What the device has to hear. The uniforms go as their bits."""
        return [self.uniforms.view(np.int64), self.source, self.tokens, *self.place.arrays()]


class MegatronSampler:
    """`Sampler` of base/protocols.py. `eos_id` ends a response, `pad_id` fills places that attention never reads.
    `stop` is asked at every token; when it says yes on any process, generate raises StopRequested on all."""

    def __init__(
        self, policy: MegatronPolicy, *, eos_id: int, pad_id: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.policy, self.groups, self.device = policy, policy.groups, policy.device.torch_device
        self.settings, self.seed = policy.config.rollout, policy.config.run.seed
        self.eos_id, self.pad_id, self.stop = eos_id, pad_id, stop
        self.multiple = token_multiple(policy.config)
        rules = packing_rules(policy.config)
        # What packing_rules asks of micro-batches holds for the feeds of a forward here: so many of them, as long.
        self.num_feeds, self.same_tokens = rules.count_multiple, rules.same_tokens

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], ids: Sequence[int], *, greedy: bool = False) -> list[Rollout]:
        """See `Sampler.generate`. Ranks may bring different numbers of prompts, also none."""
        how = Decoding(self.settings.temperature, self.settings.top_k, self.settings.top_p, greedy)
        scheduler = DecodeScheduler(
            prompts,
            ids,
            max_rows=self.settings.max_batch,
            max_new_tokens=self.settings.max_new_tokens,
            max_prompt_tokens=self.policy.config.train.tokens_per_micro_batch,
            num_parts=self.num_feeds,
            eos_id=self.eos_id,
        )
        cache = KVCache(scheduler.num_rows, scheduler.num_positions)
        for chunk in self.policy.chunks:
            chunk.eval()
        try:
            *num_tokens, stop = self.groups.max_over_ranks([*scheduler.next_tokens().tolist(), int(self.stop())])
            while any(num_tokens) and not stop:
                *num_tokens, stop = self._forward(cache, scheduler, num_tokens, how)
        finally:
            for chunk in self.policy.chunks:
                chunk.train()
        if stop:
            raise StopRequested
        return scheduler.rollouts(self.policy.version)

    def _forward(
        self, cache: KVCache, scheduler: DecodeScheduler, num_tokens: Sequence[int], how: Decoding
    ) -> list[int]:
        """Draws a token for every rollout that goes on or enters. `num_tokens` are those of each feed, on the rank that
        has most. Returns the same of the next forward, and whether to stop, as all ranks see it."""
        move = scheduler.move
        feeds = [self._feed(scheduler, *part) for part in zip(scheduler.next_parts(), num_tokens, strict=True)]
        rollout_index = np.concatenate([feed.rollout_index for feed in feeds])
        may_go_on = scheduler.counts[rollout_index] + 1 < scheduler.max_new_tokens
        waiting = (scheduler.max_going_on_W, scheduler.prompt_tokens_WP.ravel())
        told, *of_feeds = self._tell(
            [move.from_rows, move.to_rows, may_go_on, *waiting, [int(self.stop())]],
            *(feed.arrays() for feed in feeds),
        )
        from_rows, to_rows, may_go_on_B, max_going_on_W, prompt_tokens, stop = told
        if move.length:
            cache.move(from_rows, to_rows, move.length)
        drawn_2B = self._draw(cache, feeds, of_feeds, how)
        going_on = (may_go_on_B * (drawn_2B[0] != self.eos_id)).sum()
        tokens_next = tokens_of_forward(going_on, max_going_on_W, prompt_tokens.view(-1, self.num_feeds))
        agreed = torch.cat([tokens_next, stop])
        if dist.get_world_size() > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        heard = torch.cat([drawn_2B.flatten(), agreed.double()]).cpu().numpy()
        tokens, log_probs, agreements = np.split(heard, [len(rollout_index), 2 * len(rollout_index)])
        scheduler.record(rollout_index, tokens.astype(np.int64), log_probs)
        return agreements.astype(np.int64).tolist()

    def _feed(self, scheduler: DecodeScheduler, part: Part, num_tokens: int) -> Feed:
        """The newest tokens of those that go on, the prompts of those that enter, and padding."""
        going_on, entering = part.going_on, part.entering
        lengths = [len(admission.tokens) for admission in entering]
        own = len(going_on) + sum(lengths)
        padded = self._padded(num_tokens if self.same_tokens else own)
        prompts = [(len(admission.tokens), admission.rows) for admission in entering]
        rollout_index = np.concatenate([going_on, *(admission.rollout_index for admission in entering)])
        last = len(going_on) + np.cumsum(lengths, dtype=np.int64) - 1
        return Feed(
            CachedTokens(part.first_row, scheduler.positions(going_on), prompts, padded),
            rollout_index,
            uniforms(self.seed, scheduler.ids[rollout_index], scheduler.counts[rollout_index]),
            np.concatenate(
                [np.arange(len(going_on)), np.repeat(last, [len(admission.rollout_index) for admission in entering])]
            ),
            np.concatenate([scheduler.newest[going_on], *(x.tokens for x in entering), [self.pad_id] * (padded - own)]),
        )

    def _draw(
        self, cache: KVCache, feeds: Sequence[Feed], of_feeds: Sequence[Sequence[Tensor]], how: Decoding
    ) -> Tensor:
        """[2, B] float64: token and log-prob drawn for each rollout, feed by feed."""
        head = self.policy.model[-1]

        def draw(source_B: Tensor, uniforms_B: Tensor, hidden: Tensor) -> Tensor:
            if head.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            logits = vocab_parallel_logits(
                hidden.squeeze(1)[source_B],
                head.head_weight(),
                group=self.groups.tp if self.groups.layout.tp > 1 else None,
                vocab_size=head.true_vocab_size,
            )
            token_B, log_prob_B = next_tokens(logits, uniforms_B, how)
            return torch.stack([token_B.double(), log_prob_B.double()])

        steps = []
        for feed, (bits_B, source_B, tokens_T, *place) in zip(feeds, of_feeds, strict=True):
            inputs = tokens_T, feed.place.packed(cache, *place)
            steps.append((inputs, partial(draw, source_B, bits_B.view(torch.float64))))
        drawn = schedule.forward(self.policy.chunks, steps)
        num_rollouts = sum(len(feed.rollout_index) for feed in feeds)
        joined = torch.cat(drawn, 1) if drawn else torch.empty(2, num_rollouts, dtype=torch.float64, device=self.device)
        return self.groups.from_last_stage(joined)

    def _padded(self, num_tokens: int) -> int:
        """The tokens of a forward that has to hold `num_tokens`: a positive multiple of self.multiple."""
        return max(-(-num_tokens // self.multiple), 1) * self.multiple

    def _tell(self, *groups: Sequence[Sequence[int] | NDArray[Any]]) -> list[list[Tensor]]:
        """Integers for the device, in one copy that nobody waits for."""
        arrays = [np.asarray(array, dtype=np.int64) for group in groups for array in group]
        joined = on_device(torch.from_numpy(np.concatenate(arrays)), self.device)
        pieces = iter(joined.split([len(array) for array in arrays]))
        return [[next(pieces) for _ in group] for group in groups]
