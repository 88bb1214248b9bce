"""Samples responses from the training model itself: each forward draws one token for every active rollout.

How one forward goes:
1. `DecodeScheduler` says, for each micro-batch, which rollouts continue and which prompts are admitted.
2. `_feed` lays out the tokens of each on the host; `all_on_device` sends everything in one copy.
3. The cache copies the rows of rollouts that have moved.
4. `_draw` runs the micro-batches through the pipeline: attention writes keys and values into the cache and reads those
   of earlier tokens, the last stage draws tokens, and the other stages receive them.
5. `_agree_on_next` counts the tokens of the next forward on the device, and all ranks take the largest counts.
6. The host waits once, for one tensor: tokens, log-probs, and the agreed counts. `DecodeScheduler.record` stores them.
   With algorithm.sampling_mask it then fetches the ids that top-k and top-p have kept, too.

Works on any layout. Experts are shared over data-parallel ranks, so every rank of the world takes part in every
forward, until the last rollout of all ranks has ended. The ranks of a context-parallel group hold the same weights and
sample different rollouts, as data-parallel ranks do. Any waits inside Megatron's own layers come on top of step 6.

Shapes: T tokens of a micro-batch, B rollouts that draw a token, W candidates for admission, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.base.batches import IntArray, Prompt, Rollout, Sampling
from gspo_megatron.base.errors import StopRequested
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.base.replay import replay_of
from gspo_megatron.base.tensors import all_on_device
from gspo_megatron.layout.layout import packing_rules, sampler_token_multiple
from gspo_megatron.log_probs import vocab_parallel_logits
from gspo_megatron.mcore import schedule
from gspo_megatron.mcore.kv_cache import KVCache
from gspo_megatron.mcore.packed_tokens import CachedPrompt, CachedTokens, cached_tokens
from gspo_megatron.mcore.policy import MegatronModel
from gspo_megatron.mcore.routing import Routing
from gspo_megatron.mcore.sampled_routing import SampledRouting
from gspo_megatron.rollout.native.sampling import Decoding, distribution, draw, uniforms
from gspo_megatron.rollout.native.scheduler import DecodeMicroBatch, DecodeScheduler, num_tokens_of_forward
from gspo_megatron.rollout.native.stopping import Stops, StopTable


class Feed(NamedTuple):
    """One micro-batch. Rollout b of it draws from the hidden state of token `last_token_B[b]`, with the random number
    `uniforms_B[b]`."""

    tokens_T: Tensor
    cached: CachedTokens
    last_token_B: Tensor
    uniforms_B: Tensor


class ForwardInputs(NamedTuple):
    """All that one forward sends from the host to the device; B counts the rollouts of all its micro-batches."""

    copied_from_rows: Tensor
    copied_to_rows: Tensor
    feeds: tuple[Feed, ...]
    may_continue_B: Tensor
    """1 where a rollout has room for another token, so that only what it says can end it now; 0 elsewhere."""
    state_B: Tensor
    """Of each response in the sampler's StopTable, before this token."""
    max_continuing_W: Tensor
    prompt_tokens_WM: Tensor
    """Both as in `num_tokens_of_forward`."""
    stop: Tensor
    """[1]: 1 where this process has been asked to stop."""


class MegatronSampler:
    """`Sampler` of base/protocols.py. `stops` say what ends a response; `pad_id` fills places that attention never
    reads. `stop` is called at every token; when it returns True on any process, generate raises StopRequested on all.
    `sign_of_life` is called at every token, with a function that says how far it is."""

    def __init__(
        self,
        policy: MegatronModel,
        *,
        stops: Stops,
        pad_id: int,
        stop: Callable[[], bool] = lambda: False,
        sign_of_life: Callable[[Callable[[], str]], None] = lambda text: None,
    ) -> None:
        self.policy, self.groups, self.device = policy, policy.groups, policy.device.torch_device
        self.settings = r = policy.config.rollout
        self.as_in_training = Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, policy.config.run.seed)
        self.records_support = policy.config.algorithm.sampling_mask and self.groups.is_reporter
        algorithm = policy.config.algorithm
        replay = replay_of(algorithm.routing_replay, algorithm.router_shift_floor)
        self.records_experts = replay.of_sampler
        self.pad_id, self.stop = pad_id, stop
        self.sign_of_life = sign_of_life
        assert policy.config.model.vocab_size is not None, "settle sets model.vocab_size"
        self.stops = StopTable.of(stops, policy.config.model.vocab_size)
        self.after_SV = torch.from_numpy(self.stops.after).to(self.device)
        self.multiple = sampler_token_multiple(policy.config)
        rules = packing_rules(policy.config)
        # As in training, the layout decides the number of micro-batches, and whether they must be equally long.
        self.num_micro_batches, self.same_tokens = rules.count_multiple, rules.same_tokens

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Sequence[int] = (),
    ) -> list[Rollout]:
        """See `Sampler.generate`. Ranks may pass different numbers of prompts, or none.

        Raises:
            StopRequested: on all ranks, once `stop` has returned True on one.
        """
        how = sampling or self.as_in_training
        # Of greedy tokens, only the log-prob depends on a temperature.
        training = sampling is None and not greedy
        recorded = self.records_support and training
        decoding = Decoding(how.temperature or self.settings.temperature, how.top_k, how.top_p, greedy, recorded)
        routing = SampledRouting(self.policy.config.model.shape, self.groups)
        recording = routing if self.records_experts and training else None
        scheduler = DecodeScheduler(
            prompts,
            ids,
            max_rows=self.settings.max_batch,
            max_new_tokens=how.max_new_tokens,
            max_prompt_tokens=self.policy.config.train.tokens_per_micro_batch,
            num_micro_batches=self.num_micro_batches,
            stops=self.stops,
            begun=begun,
        )
        cache = KVCache(scheduler.num_rows, scheduler.num_positions)
        rollouts: dict[int, Rollout] = {}
        for chunk in self.policy.chunks:
            chunk.eval()
        try:
            *num_tokens, stop = self.groups.max_over_ranks([*scheduler.next_num_tokens().tolist(), int(self.stop())])
            while any(num_tokens) and not stop:
                just_ended, (*num_tokens, stop) = self._forward(
                    cache, scheduler, num_tokens, decoding, how.seed, recording
                )
                for index in just_ended:
                    rollouts[index] = scheduler.rollout(index, self.policy.version)
                    ended(rollouts[index])
                self.sign_of_life(scheduler.progress)
        finally:
            for chunk in self.policy.chunks:
                chunk.train()
        if stop:
            raise StopRequested
        for index, experts in (recording.of_rollouts() if recording else {}).items():
            rollouts[index].routed_experts = experts
        return [rollouts[index] for index in range(len(prompts))]

    def _forward(
        self,
        cache: KVCache,
        scheduler: DecodeScheduler,
        num_tokens: Sequence[int],
        decoding: Decoding,
        seed: int,
        recording: SampledRouting | None,
    ) -> tuple[list[int], list[int]]:
        """Draws a token for every rollout that continues or is admitted. `num_tokens` are the tokens of each
        micro-batch on the rank with the most. Returns which rollouts have ended, and the tokens of the next forward,
        followed by 1 if any rank is to stop, else 0."""
        row_copy, micro_batches = scheduler.row_copy, scheduler.next_micro_batches()
        rollout_index = np.concatenate([micro_batch.rollout_index for micro_batch in micro_batches])
        may_continue = scheduler.counts[rollout_index] + 1 < scheduler.limits[rollout_index]
        inputs = all_on_device(
            ForwardInputs(
                copied_from_rows=torch.from_numpy(row_copy.from_rows),
                copied_to_rows=torch.from_numpy(row_copy.to_rows),
                feeds=tuple(self._feed(scheduler, seed, *each) for each in zip(micro_batches, num_tokens, strict=True)),
                may_continue_B=torch.from_numpy(may_continue.astype(np.int64)),
                state_B=torch.from_numpy(scheduler.states[rollout_index]),
                max_continuing_W=torch.from_numpy(scheduler.max_continuing_W),
                prompt_tokens_WM=torch.from_numpy(scheduler.prompt_tokens_WM),
                stop=_joined([int(self.stop())]),
            ),
            self.device,
        )
        if row_copy.length:
            cache.copy_rows(inputs.copied_from_rows, inputs.copied_to_rows, row_copy.length)
        sizes = [feed.tokens_T.numel() for feed in inputs.feeds]
        routings = [
            recording.recording(*each) if recording else None for each in zip(micro_batches, sizes, strict=True)
        ]
        drawn_2B, kept = self._draw(cache, inputs.feeds, decoding, routings)
        if recording:
            recording.keep()
        agreed = self._agree_on_next(inputs, drawn_2B[0])
        received = torch.cat([drawn_2B.flatten(), agreed.double()]).cpu().numpy()
        tokens, log_probs, next_counts = np.split(received, [len(rollout_index), 2 * len(rollout_index)])
        ended = scheduler.record(rollout_index, tokens.astype(np.int64), log_probs, _support(kept))
        return ended.tolist(), next_counts.astype(np.int64).tolist()

    def _feed(self, scheduler: DecodeScheduler, seed: int, micro_batch: DecodeMicroBatch, num_tokens: int) -> Feed:
        """The newest tokens of the rollouts that continue, the prompts of those that are admitted, and padding."""
        continuing, admissions = micro_batch.continuing, micro_batch.admissions
        rollout_index = micro_batch.rollout_index
        lengths = [len(admission.prompt_tokens) for admission in admissions]
        last_of_prompt = len(continuing) + np.cumsum(lengths, dtype=np.int64) - 1
        sharing = [len(admission.rollout_index) for admission in admissions]
        own = len(continuing) + sum(lengths)
        padded = self._padded(num_tokens if self.same_tokens else own)
        prompts = [CachedPrompt(len(admission.prompt_tokens), admission.rows) for admission in admissions]
        return Feed(
            tokens_T=_joined(
                scheduler.newest[continuing],
                *(admission.prompt_tokens for admission in admissions),
                np.full(padded - own, self.pad_id),
            ),
            cached=cached_tokens(micro_batch.first_row, scheduler.positions(continuing), prompts, padded),
            last_token_B=_joined(np.arange(len(continuing)), np.repeat(last_of_prompt, sharing)),
            uniforms_B=torch.from_numpy(
                uniforms(seed, scheduler.ids[rollout_index], scheduler.response_positions(rollout_index))
            ),
        )

    def _draw(
        self, cache: KVCache, feeds: Sequence[Feed], decoding: Decoding, routings: Sequence[Routing | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """[2, B] float64: token and log-prob drawn for each rollout, micro-batch by micro-batch; and for each
        micro-batch, where they are recorded, which ids the tokens were drawn from, bool [., V]."""
        head = self.policy.model[-1]
        kept: list[Tensor] = []

        def drawn_of(feed: Feed, hidden: Tensor) -> Tensor:
            if head.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            logits = vocab_parallel_logits(
                hidden.squeeze(1)[feed.last_token_B],
                head.head_weight(),
                group=self.groups.tp if self.groups.layout.tp > 1 else None,
                vocab_size=head.true_vocab_size,
            )
            log_probs_BV = distribution(logits, decoding)
            if decoding.recorded:
                kept.append(log_probs_BV > -torch.inf)
            token_B, log_prob_B = draw(log_probs_BV, feed.uniforms_B, decoding)
            return torch.stack([token_B.double(), log_prob_B.double()])

        steps = [
            ((feed.tokens_T, feed.cached.packed(cache, routing)), partial(drawn_of, feed))
            for feed, routing in zip(feeds, routings, strict=True)
        ]
        drawn = schedule.forward(self.policy.chunks, steps)
        num_rollouts = sum(len(feed.uniforms_B) for feed in feeds)
        joined = torch.cat(drawn, 1) if drawn else torch.empty(2, num_rollouts, dtype=torch.float64, device=self.device)
        return self.groups.from_last_stage(joined), kept

    def _agree_on_next(self, inputs: ForwardInputs, tokens_B: Tensor) -> Tensor:
        """[M + 1], the maximum over all ranks: the tokens of each micro-batch of the next forward, and whether to
        stop."""
        ended_B = self.after_SV[inputs.state_B, tokens_B.long()] == self.stops.end
        num_continuing = (inputs.may_continue_B * ~ended_B).sum()
        num_tokens_M = num_tokens_of_forward(num_continuing, inputs.max_continuing_W, inputs.prompt_tokens_WM)
        agreed = torch.cat([num_tokens_M, inputs.stop])
        if dist.get_world_size() > 1:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return agreed

    def _padded(self, num_tokens: int) -> int:
        """`num_tokens` rounded up to a positive multiple of self.multiple."""
        return max(-(-num_tokens // self.multiple), 1) * self.multiple


def _support(kept: Sequence[Tensor]) -> Ragged | None:
    """The ids marked in [., V] of every micro-batch. The host waits for the device once more."""
    if not kept:
        return None
    kept_BV = torch.cat(list(kept))
    return Ragged(kept_BV.nonzero()[:, 1].int().cpu(), kept_BV.sum(1).int().cpu())


def _joined(*arrays: IntArray | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))
