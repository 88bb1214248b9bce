"""Responses from the training model itself: prompts into a KV cache, then a token for every rollout at a time.

Works on any layout: every rank of the world takes part in every forward (experts are shared over data-parallel ranks),
the last pipeline stage draws, and the other stages hear the token. A prompt's rollouts share one prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from gspo_megatron.checks import token_multiple
from gspo_megatron.log_probs import vocab_parallel_logits
from gspo_megatron.mcore import schedule
from gspo_megatron.mcore.attention import KVCache, PackedTokens, decoding, packed, prompts_into_cache
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.rollout.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.types import Prompt, Rollout


class MegatronSampler:
    """`Sampler` of types.py. `eos_id` ends a response, `pad_id` fills places that attention never reads."""

    def __init__(self, policy: MegatronPolicy, *, eos_id: int, pad_id: int) -> None:
        self.policy, self.groups, self.device = policy, policy.groups, policy.lane.device
        self.settings, self.seed = policy.config.rollout, policy.config.run.seed
        self.eos_id, self.pad_id = eos_id, pad_id
        self.multiple = token_multiple(policy.config)

    def generate(self, prompts: Sequence[Prompt], ids: Sequence[int], *, greedy: bool = False) -> list[Rollout]:
        """See `Sampler.generate`. Ranks may bring different numbers of prompts, also none."""
        how = Decoding(self.settings.temperature, self.settings.top_k, self.settings.top_p, greedy)
        rollouts: list[Rollout] = []
        start, size = 0, self.settings.max_batch
        while self.groups.any_rank(start < len(prompts), self.device):
            rollouts += self._generate_batch(prompts[start : start + size], ids[start : start + size], how)
            start += size
        return rollouts

    @torch.no_grad()
    def _generate_batch(self, prompts: Sequence[Prompt], ids: Sequence[int], how: Decoding) -> list[Rollout]:
        rollouts = [Rollout(i, p, [], [], True, self.policy.version) for i, p in zip(ids, prompts, strict=True)]
        self.policy.ddp.eval()
        cache = KVCache(len(rollouts), max((len(p.tokens) for p in prompts), default=0) + self.settings.max_new_tokens)
        drawn = self._prefill(prompts, cache, rollouts, how)
        active = self._take(rollouts, list(range(len(rollouts))), drawn)
        for _ in range(self.settings.max_new_tokens - 1):
            if not self.groups.any_rank(bool(active), self.device):
                break
            active = self._take(rollouts, active, self._decode(cache, rollouts, active, how))
        self.policy.ddp.train()
        return rollouts

    def _prefill(self, prompts: Sequence[Prompt], cache: KVCache, rollouts: list[Rollout], how: Decoding) -> Tensor:
        """Fills the cache from each distinct prompt once and draws every rollout's first token, in forwards of at most
        train.tokens_per_micro_batch tokens (or one prompt)."""
        distinct: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            distinct.setdefault(prompt.tokens, []).append(row)
        packs: list[dict[tuple[int, ...], list[int]]] = []
        room = 0
        for tokens, rows in distinct.items():
            if len(tokens) > room:
                packs.append({})
                room = self.policy.config.train.tokens_per_micro_batch
            packs[-1][tokens] = rows
            room -= len(tokens)
        drawn = torch.empty(2, len(prompts), dtype=torch.float64, device=self.device)
        while self.groups.any_rank(bool(packs), self.device):
            pack = packs.pop(0) if packs else {}
            rows = [row for rows in pack.values() for row in rows]
            drawn[:, rows] = self._prefill_pack(pack, cache, [rollouts[row] for row in rows], how)
        return drawn

    def _prefill_pack(
        self, rows_of: dict[tuple[int, ...], list[int]], cache: KVCache, rollouts: list[Rollout], how: Decoding
    ) -> Tensor:
        """One forward over packed prompts, of which each fills the cache rows `rows_of[prompt]`; draws for `rollouts`,
        which stand in the order of those rows."""
        lengths = [len(tokens) for tokens in rows_of]
        padding = -sum(lengths) % self.multiple or (self.multiple if not lengths else 0)
        lengths_with_padding = lengths + ([padding] if padding else [])
        flat = [t for tokens in rows_of for t in tokens] + [self.pad_id] * padding
        positions = [p for length in lengths_with_padding for p in range(length)]
        borders = self._tensor(np.cumsum([0, *lengths_with_padding]))
        step = packed(self._tensor(positions), borders, max(lengths_with_padding))
        prompts_into_cache(lengths, list(rows_of.values()), cache, step)
        last_rows = np.cumsum(lengths) - 1
        source = np.repeat(last_rows, [len(rows) for rows in rows_of.values()]) if lengths else last_rows
        return self._draw(self._tensor(flat), step, self._tensor(source), rollouts, how)

    def _decode(self, cache: KVCache, rollouts: list[Rollout], active: list[int], how: Decoding) -> Tensor:
        """Feeds each active rollout's newest token and draws the next one."""
        padding = -len(active) % self.multiple or (self.multiple if not active else 0)
        tokens = [rollouts[row].tokens[-1] for row in active] + [self.pad_id] * padding
        positions = [len(rollouts[row].prompt.tokens) + len(rollouts[row].tokens) - 1 for row in active] + [0] * padding
        rows = active + [cache.scratch_row] * padding
        step = decoding(self._tensor(positions), self._tensor(rows), cache)
        return self._draw(
            self._tensor(tokens), step, self._tensor(range(len(active))), [rollouts[row] for row in active], how
        )

    def _draw(
        self, tokens_T: Tensor, step: PackedTokens, source: Tensor, rollouts: list[Rollout], how: Decoding
    ) -> Tensor:
        """[2, B] float64: token and log-prob drawn for each rollout from the hidden state in row `source[b]`."""
        ids = np.array([r.id for r in rollouts], dtype=np.int64)
        at = np.array([len(r.tokens) for r in rollouts], dtype=np.int64)
        uniforms_B = torch.from_numpy(uniforms(self.seed, ids, at)).to(self.device)
        model = self.policy.model

        def draw(hidden: Tensor) -> Tensor:
            if model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden)
            logits = vocab_parallel_logits(
                hidden.squeeze(1)[source],
                model.head_weight(),
                group=self.groups.tp if self.groups.layout.tp > 1 else None,
                vocab_size=model.true_vocab_size,
            )
            token_B, log_prob_B = next_tokens(logits, uniforms_B, how)
            return torch.stack([token_B.double(), log_prob_B.double()])

        results = schedule.forward(self.policy.ddp, [((tokens_T, step), draw)])
        drawn = results[0] if results else torch.empty(2, len(rollouts), dtype=torch.float64, device=self.device)
        return self.groups.from_last_stage(drawn)

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

    def _tensor(self, values: Sequence[int] | np.ndarray | range) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.device)
