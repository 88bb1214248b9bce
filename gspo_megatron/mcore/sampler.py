"""Responses from the training model itself: prompts into a KV cache, then a token for every rollout at a time.

Works on any layout: every rank of the world takes part in every forward (experts are shared over data-parallel ranks),
the last pipeline stage draws, and the other stages hear the token. A prompt's rollouts share one prefill. The ranks of
a context-parallel group hold the same weights and sample different rollouts, as data-parallel ranks do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.layout import packing_rules, token_multiple
from gspo_megatron.log_probs import vocab_parallel_logits
from gspo_megatron.mcore import schedule
from gspo_megatron.mcore.attention import KVCache, PackedTokens, decoding, packed, prompts_into_cache
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.rollout.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.types import Prompt, Rollout, StopAsked


class Feed(NamedTuple):
    """The tokens of one forward, and the rollouts that draw from it: `rollouts[i]` from the hidden state of row
    `source[i]`."""

    tokens: Sequence[int]
    step: PackedTokens
    source: Sequence[int]
    rollouts: Sequence[Rollout]


class MegatronSampler:
    """`Sampler` of types.py. `eos_id` ends a response, `pad_id` fills places that attention never reads.
    `stop` is asked at every token; when it says yes on any process, generate raises StopAsked on all."""

    def __init__(
        self, policy: MegatronPolicy, *, eos_id: int, pad_id: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.policy, self.groups, self.device = policy, policy.groups, policy.lane.device
        self.settings, self.seed = policy.config.rollout, policy.config.run.seed
        self.eos_id, self.pad_id, self.stop = eos_id, pad_id, stop
        self.multiple = token_multiple(policy.config)
        rules = packing_rules(policy.config)
        # What packing_rules asks of micro-batches holds for the forwards of a step here: so many of them, as long.
        self.num_feeds, self.same_tokens = rules.count_multiple, rules.same_tokens

    def generate(self, prompts: Sequence[Prompt], ids: Sequence[int], *, greedy: bool = False) -> list[Rollout]:
        """See `Sampler.generate`. Ranks may bring different numbers of prompts, also none."""
        how = Decoding(self.settings.temperature, self.settings.top_k, self.settings.top_p, greedy)
        rollouts: list[Rollout] = []
        start, size = 0, self.settings.max_batch
        while self._most(len(prompts) - start) > 0:
            rollouts += self._generate_batch(prompts[start : start + size], ids[start : start + size], how)
            start += size
        return rollouts

    @torch.no_grad()
    def _generate_batch(self, prompts: Sequence[Prompt], ids: Sequence[int], how: Decoding) -> list[Rollout]:
        rollouts = [Rollout(i, p, [], [], True, self.policy.version) for i, p in zip(ids, prompts, strict=True)]
        for chunk in self.policy.chunks:
            chunk.eval()
        cache = KVCache(len(rollouts), max((len(p.tokens) for p in prompts), default=0) + self.settings.max_new_tokens)
        active = self._prefill(cache, rollouts, how)
        for _ in range(self.settings.max_new_tokens - 1):
            most = self._most(len(active))
            if not most:
                break
            active = self._decode(cache, rollouts, active, most, how)
        for chunk in self.policy.chunks:
            chunk.train()
        return rollouts

    def _prefill(self, cache: KVCache, rollouts: list[Rollout], how: Decoding) -> list[int]:
        """Fills the cache from each distinct prompt once and draws every rollout's first token, in forwards of at most
        train.tokens_per_micro_batch tokens (or one prompt). Returns the rows that go on."""
        distinct: dict[tuple[int, ...], list[int]] = {}
        for row, rollout in enumerate(rollouts):
            distinct.setdefault(rollout.prompt.tokens, []).append(row)
        packs: list[dict[tuple[int, ...], list[int]]] = []
        room = 0
        for tokens, rows in distinct.items():
            if len(tokens) > room:
                packs.append({})
                room = self.policy.config.train.tokens_per_micro_batch
            packs[-1][tokens] = rows
            room -= len(tokens)
        going_on: list[int] = []
        while self._most(len(packs)):
            now, packs = packs[: self.num_feeds], packs[self.num_feeds :]
            now += [{} for _ in range(self.num_feeds - len(now))]
            lengths = [sum(map(len, pack)) for pack in now]
            if self.same_tokens:
                lengths = self.groups.most(lengths)
            feeds = [self._prompts(pack, cache, rollouts, length) for pack, length in zip(now, lengths, strict=True)]
            rows = [row for pack in now for rows in pack.values() for row in rows]
            going_on += self._take(rollouts, rows, self._draw(feeds, how))
        return sorted(going_on)

    def _prompts(
        self, rows_of: dict[tuple[int, ...], list[int]], cache: KVCache, rollouts: list[Rollout], num_tokens: int
    ) -> Feed:
        """Packed prompts, padded from `num_tokens` on, of which each fills the cache rows `rows_of[prompt]`."""
        lengths = [len(tokens) for tokens in rows_of]
        padding = self._padded(num_tokens) - sum(lengths)
        segments = lengths + ([padding] if padding else [])
        positions = [p for length in segments for p in range(length)]
        step = packed(self._tensor(positions), self._tensor(np.cumsum([0, *segments])), max(segments))
        prompts_into_cache(lengths, list(rows_of.values()), cache, step)
        last = np.cumsum(lengths, dtype=np.int64) - 1
        return Feed(
            [t for tokens in rows_of for t in tokens] + [self.pad_id] * padding,
            step,
            [int(end) for end, rows in zip(last, rows_of.values(), strict=True) for _ in rows],
            [rollouts[row] for rows in rows_of.values() for row in rows],
        )

    def _decode(
        self, cache: KVCache, rollouts: list[Rollout], active: list[int], most: int, how: Decoding
    ) -> list[int]:
        """Feeds each active rollout's newest token and draws the next one; `most` rows are active on the rank that has
        most of them. Returns the rows that go on."""
        size = -(-(most if self.same_tokens else len(active)) // self.num_feeds)
        feeds = []
        for i in range(self.num_feeds):
            rows = active[i * size : (i + 1) * size]
            now = [rollouts[row] for row in rows]
            padding = self._padded(size if self.same_tokens else len(rows)) - len(rows)
            positions = [len(r.prompt.tokens) + len(r.tokens) - 1 for r in now] + [0] * padding
            step = decoding(self._tensor(positions), self._tensor(rows + [cache.scratch_row] * padding), cache)
            feeds.append(Feed([r.tokens[-1] for r in now] + [self.pad_id] * padding, step, range(len(rows)), now))
        return self._take(rollouts, active, self._draw(feeds, how))

    def _draw(self, feeds: Sequence[Feed], how: Decoding) -> Tensor:
        """[2, B] float64: token and log-prob drawn for each rollout, feed by feed."""
        head = self.policy.model[-1]

        def draw(feed: Feed, hidden: Tensor) -> Tensor:
            if head.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            logits = vocab_parallel_logits(
                hidden.squeeze(1)[self._tensor(feed.source)],
                head.head_weight(),
                group=self.groups.tp if self.groups.layout.tp > 1 else None,
                vocab_size=head.true_vocab_size,
            )
            ids = np.array([r.id for r in feed.rollouts], dtype=np.int64)
            at = np.array([len(r.tokens) for r in feed.rollouts], dtype=np.int64)
            uniforms_B = torch.from_numpy(uniforms(self.seed, ids, at)).to(self.device)
            token_B, log_prob_B = next_tokens(logits, uniforms_B, how)
            return torch.stack([token_B.double(), log_prob_B.double()])

        steps = [((self._tensor(feed.tokens), feed.step), partial(draw, feed)) for feed in feeds]
        drawn = schedule.forward(self.policy.chunks, steps)
        num_rollouts = sum(len(feed.rollouts) for feed in feeds)
        joined = torch.cat(drawn, 1) if drawn else torch.empty(2, num_rollouts, dtype=torch.float64, device=self.device)
        return self.groups.from_last_stage(joined)

    def _take(self, rollouts: list[Rollout], rows: list[int], drawn: Tensor) -> list[int]:
        """Appends what was drawn; returns the rows that go on."""
        tokens, log_probs = drawn.tolist()
        going_on = []
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            rollout = rollouts[row]
            rollout.tokens.append(int(token))
            rollout.log_probs.append(log_prob)
            rollout.truncated = int(token) != self.eos_id
            if rollout.truncated:
                going_on.append(row)
        return going_on

    def _most(self, count: int) -> int:
        """The largest of all processes' counts, and whether to stop, in one exchange."""
        most, stop = self.groups.most([count, int(self.stop())])
        if stop:
            raise StopAsked
        return most

    def _padded(self, num_tokens: int) -> int:
        """The tokens of a forward that has to hold `num_tokens`: a positive multiple of self.multiple."""
        return max(-(-num_tokens // self.multiple), 1) * self.multiple

    def _tensor(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.device)
