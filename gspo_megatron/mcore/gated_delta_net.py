"""The layers of Qwen3-Next: gated delta nets, and attention with a gate on its output.

    [q | k | v | z] = W_qkvz h      [b | a] = W_ba h      [q | k | v] <- silu(conv([q | k | v]))
    o = delta rule of q, k, v with decay exp(-exp(A) softplus(a + dt)) and rate sigmoid(b)      (delta_rule.py)
    out = W_o (norm(o) silu(z))

arXiv 2412.06464, Section 3.4. The convolution is over the last few tokens, each channel on its own; it and the rule
start again with every sequence of a pack. A sampler keeps the state of the rule and the convolution's last inputs of
every row. Megatron's own GatedDeltaNet is not used: it needs kernels that only run on GPUs, and has no cache.

Shapes: T packed tokens (under context parallel those of this rank's part), B sequences (rows), L positions, K key heads
and Q value heads of this tensor-parallel rank, C = (2 K D + Q Dv) channels of its convolution, W tokens that it sees, H
hidden size. Hidden states are [T, 1, H], or [T / tp, 1, H] under sequence parallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.mcore.attention import attend_cached, collect, spread
from gspo_megatron.mcore.context_parallel import own, whole
from gspo_megatron.mcore.delta_rule import delta_rule_step, gated_delta_rule
from gspo_megatron.mcore.kv_cache import CacheUse
from gspo_megatron.mcore.latent_attention import linear, linear_back
from gspo_megatron.mcore.packed_tokens import PackedTokens


class GatedSelfAttention(SelfAttention):
    """Megatron's attention with a gate on its output, which keeps float64 as it is."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        return (x * torch.sigmoid(gate.reshape(x.shape).to(precise))).to(x.dtype)


@dataclass
class DeltaNetParts:
    """The modules of a gated delta net: linear layers that tp splits by rows and by columns, and the norm."""

    in_proj: Any
    out_proj: Any
    norm: Any


class Mixed(NamedTuple):
    """What the delta rule needs of each token: the convolution's inputs [T, C], log decays and rates [T, Q]."""

    inputs: Tensor
    log_decay: Tensor
    rate: Tensor


class GatedDeltaNet(torch.nn.Module):
    """In place of the attention of a Megatron layer, [T, 1, H] to [T, 1, H]; tensor parallel splits key heads, with
    the value heads of each."""

    def __init__(
        self, config: TransformerConfig, submodules: DeltaNetParts, layer_number: int, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        self.config, self.layer_number, tp = config, layer_number, pg_collection.tp.size()
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.num_key_heads = config.linear_num_key_heads // tp
        self.num_value_heads = config.linear_num_value_heads // tp
        self.recomputes_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        keys, values = config.linear_num_key_heads * self.key_dim, config.linear_num_value_heads * self.value_dim

        def project(size: int, name: str) -> torch.nn.Module:
            group = pg_collection.tp
            return linear(
                submodules.in_proj, config.hidden_size, size, config, name, gather_output=False, tp_group=group
            )

        self.in_proj_qkvz = project(2 * keys + 2 * values, "in_proj_qkvz")
        self.in_proj_ba = project(2 * config.linear_num_value_heads, "in_proj_ba")
        channels, heads, dtype = (2 * keys + values) // tp, self.num_value_heads, config.params_dtype
        self.conv1d = torch.nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False, dtype=dtype
        )
        self.A_log = torch.nn.Parameter(torch.zeros(heads, dtype=dtype))
        self.dt_bias = torch.nn.Parameter(torch.ones(heads, dtype=dtype))
        for parameter in (self.conv1d.weight, self.A_log, self.dt_bias):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # counted in the gradient norm on every rank
        self.out_norm = submodules.norm(config, self.value_dim, eps=config.layernorm_epsilon)
        self.out_proj = linear_back(submodules.out_proj, values, config, "out_proj", pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedTokens, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        tokens = packed_seq_params
        mixed, z = self._project(hidden_states)
        if tokens.through_cache is not None:
            out = self._cached(mixed, tokens, tokens.through_cache)
        elif self.recomputes_core and self.training:
            out = checkpoint(lambda *parts: self._mix(Mixed(*parts), tokens), False, *mixed)
        else:
            out = self._mix(mixed, tokens)
        normed = self.out_norm(out.view(-1, self.num_value_heads, self.value_dim))
        gate = F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        return self.out_proj((normed * gate).to(z.dtype).flatten(1)[:, None])

    def _project(self, hidden: Tensor) -> tuple[Mixed, Tensor]:
        """What the rule needs, and z [T, Q, Dv]. Rows of W_qkvz are [q, k, v, z] of one key head after the other."""
        per_head = self.num_value_heads // self.num_key_heads
        values = per_head * self.value_dim
        qkvz = self.in_proj_qkvz(hidden)[0].unflatten(-1, (self.num_key_heads, -1)).squeeze(1)
        qkv, z = qkvz.split([2 * self.key_dim + values, values], dim=-1)
        ba = self.in_proj_ba(hidden)[0].unflatten(-1, (self.num_key_heads, -1)).squeeze(1)
        b, a = (x.flatten(1) for x in ba.split([per_head, per_head], dim=-1))
        precise = torch.promote_types(a.dtype, torch.float32)
        log_decay = -self.A_log.to(precise).exp() * F.softplus(a.to(precise) + self.dt_bias)
        return Mixed(qkv.flatten(1), log_decay, b.sigmoid()), z.reshape(-1, self.num_value_heads, self.value_dim)

    def _mix(self, mixed: Mixed, tokens: PackedTokens) -> Tensor:
        """[T, Q * Dv] of whole sequences. Under context parallel every rank computes all, and keeps its part."""
        part = tokens.part
        if part is None:
            return self._mix_packed(mixed, tokens)[0]
        return own(self._mix_packed(Mixed(*(whole(x, part) for x in mixed)), tokens)[0], part)

    def _mix_packed(self, mixed: Mixed, tokens: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Of sequences on a [B, L] grid: [T, Q * Dv], the last states [B, Q, D, Dv], and the convolution's inputs on
        the grid, [B, C, W - 1 + L]. What pads a row has decay and rate exp(0) and 0, which change no state."""
        grid = spread(mixed.inputs[:, None], tokens.slots_T, tokens.grid).squeeze(1).mT
        inputs = F.pad(grid, (self.conv1d.kernel_size[0] - 1, 0))
        query, key, value = self._heads(F.silu(self._convolved(inputs)))
        log_decay, rate = (
            spread(x[..., None], tokens.slots_T, tokens.grid).squeeze(-1) for x in (mixed.log_decay, mixed.rate)
        )
        out, states = gated_delta_rule(query, key, value, log_decay, rate)
        return collect(out, tokens.slots_T), states, inputs

    def _convolved(self, inputs: Tensor) -> Tensor:
        return F.conv1d(inputs, self.conv1d.weight, groups=self.conv1d.groups)

    def _heads(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, L] -> queries and keys [B, Q, L, D], those of a key head repeated for its value heads, and values [B,
        Q, L, Dv]."""
        repeats = self.num_value_heads // self.num_key_heads
        by_head = channels.unflatten(1, (self.num_key_heads, -1)).mT
        query, key, value = by_head.split([self.key_dim, self.key_dim, repeats * self.value_dim], dim=-1)
        values = value.unflatten(-1, (repeats, -1)).transpose(2, 3).flatten(1, 2)
        return query.repeat_interleave(repeats, 1), key.repeat_interleave(repeats, 1), values

    def _cached(self, mixed: Mixed, tokens: PackedTokens, use: CacheUse) -> Tensor:
        """New tokens continue from the states of their rows; prompts fill those of theirs."""
        num_channels, width = self.conv1d.groups, self.conv1d.kernel_size[0]
        states, inputs = use.cache.states(
            self.layer_number,
            mixed.log_decay.new_empty(self.num_value_heads, self.key_dim, self.value_dim),
            mixed.inputs.new_empty(num_channels, width - 1),
        )

        def continued(new: slice) -> Tensor:
            rows = slice(use.first_row, use.first_row + new.stop)
            seen = torch.cat([inputs[rows], mixed.inputs[new, :, None]], dim=-1)
            query, key, value = (x.squeeze(2) for x in self._heads(F.silu(self._convolved(seen))))
            out, states[rows] = delta_rule_step(query, key, value, mixed.log_decay[new], mixed.rate[new], states[rows])
            inputs[rows] = seen[..., 1:]
            return out.flatten(1)

        def prompts(old: slice) -> Tensor:
            out, last, grid = self._mix_packed(Mixed(*(x[old] for x in mixed)), tokens)
            # Position p of a prompt is column p + W - 1 of the grid.
            columns = use.prompts.length_P[:, None] + torch.arange(width - 1, device=grid.device)
            newest = grid.gather(-1, columns[:, None].expand(-1, num_channels, -1))
            states[use.prompts.row_R], inputs[use.prompts.row_R] = (x[use.prompts.prompt_R] for x in (last, newest))
            return out

        return attend_cached(
            tokens,
            use,
            continued=continued,
            prompts=prompts,
            padding=lambda num_tokens: mixed.inputs.new_zeros(num_tokens, self.num_value_heads * self.value_dim),
            num_tokens=len(mixed.inputs),
        )


def use_gated_delta_net(attention: ModuleSpec, norm: type) -> None:
    """Makes GatedDeltaNet what a layer's spec has in place of attention."""
    parts = attention.submodules
    attention.submodules = DeltaNetParts(parts.linear_qkv, parts.linear_proj, norm)
    attention.module, attention.params = GatedDeltaNet, {}
