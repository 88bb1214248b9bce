"""Multi-head latent attention: keys and values are projected from one small latent per token, which is all that the
sampler caches.

    c_q = norm(W_dq h)          [q_nope | q_rope] = W_uq c_q     (or W_q h, without a latent of queries)
    [c | k_rope] = W_dkv h      [k_nope | v] = W_ukv norm(c)     for every head
    out = W_o softmax([q_nope | R q_rope] [k_nope | R k_rope]^T * scale) v

arXiv 2405.04434 (DeepSeek-V2), Section 2.1 and Appendix C; R is RoPE, and one k_rope serves all heads. Megatron's own
MLASelfAttention is not used: with its local spec and tp > 1 the gradient of k_rope is not summed over the ranks whose
heads use it (0.16.1 and 0.19.2), and it reads the lengths of packed sequences on the host in every layer.

Shapes: T packed tokens (under context parallel those of this rank's part), B sequences (rows), Q heads of this
tensor-parallel rank, H hidden size. Hidden states are [T, 1, H], or [T / tp, 1, H] under sequence parallel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from gspo_megatron.mcore.attention import attend, attend_cached, attend_packed, attend_rows, rotate
from gspo_megatron.mcore.kv_cache import CacheUse
from gspo_megatron.mcore.packed_tokens import PackedTokens
from gspo_megatron.models.deepseek_v3 import LATENT_NORM_EPSILON


class ReplicatedLinear(torch.nn.Module):
    """y = W x with all of W on every tensor-parallel rank, as Transformer Engine's `duplicated` mode has it. Under
    sequence parallel each rank sees some of the tokens; `weight.sequence_parallel` makes Megatron sum the gradients."""

    def __init__(self, input_size: int, output_size: int, *, config: MLATransformerConfig, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class LatentAttention(torch.nn.Module):
    """Self-attention of a Megatron layer, [T, 1, H] to [T, 1, H], with the submodules of MLASelfAttention. The
    projections to the latents are replicated over tp; those from them are split by heads."""

    def __init__(
        self, config: MLATransformerConfig, submodules: Any, layer_number: int, pg_collection: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        self.config, self.layer_number = config, layer_number
        self.num_heads = config.num_attention_heads // pg_collection.tp.size()
        self.qk_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.recomputes_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank

        def down(module: Any, size: int, name: str) -> torch.nn.Module:
            duplicated = {"parallel_mode": "duplicated", "skip_weight_param_allocation": False}
            module = linear(module, hidden, size, config, name, **duplicated)
            # 0.16.1 leaves the mark that Transformer Engine sets: the gradient norm would count every rank's copy.
            module.weight.tensor_model_parallel = False
            return module

        def up(module: Any, size_in: int, size_out: int, name: str) -> torch.nn.Module:
            return linear(module, size_in, size_out, config, name, gather_output=False, tp_group=pg_collection.tp)

        if config.q_lora_rank is None:
            self.linear_q_proj = up(submodules.linear_q_proj, hidden, heads * self.qk_dim, "q_proj")
        else:
            self.linear_q_down_proj = down(submodules.linear_q_down_proj, config.q_lora_rank, "q_down_proj")
            self.q_layernorm = submodules.q_layernorm(config, config.q_lora_rank, eps=LATENT_NORM_EPSILON)
            self.linear_q_up_proj = up(
                submodules.linear_q_up_proj, config.q_lora_rank, heads * self.qk_dim, "q_up_proj"
            )
        self.linear_kv_down_proj = down(
            submodules.linear_kv_down_proj, rank + config.qk_pos_emb_head_dim, "kv_down_proj"
        )
        self.kv_layernorm = submodules.kv_layernorm(config, rank, eps=LATENT_NORM_EPSILON)
        self.linear_kv_up_proj = up(
            submodules.linear_kv_up_proj, rank, heads * (config.qk_head_dim + config.v_head_dim), "kv_up_proj"
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=config.softmax_scale,
            k_channels=self.qk_dim,
            v_channels=config.v_head_dim,
            cp_comm_type=kwargs.get("cp_comm_type"),
            pg_collection=pg_collection,
        )
        self.linear_proj = linear_back(
            submodules.linear_proj, heads * config.v_head_dim, config, "proj", pg_collection.tp
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedTokens, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        tokens = packed_seq_params
        query = self._query(hidden_states, tokens)
        latent, k_rope = self._latent(hidden_states, tokens)
        if tokens.through_cache is not None:
            out = self._attend_cached(query, latent, k_rope, tokens, tokens.through_cache)
        else:
            out = self._attend(query, *self._key_value(latent, k_rope), tokens)
        return self.linear_proj(out[:, None])

    def _query(self, hidden: Tensor, tokens: PackedTokens) -> Tensor:
        """[T, Q, D], its last dimensions rotated."""
        if self.config.q_lora_rank is None:
            query = self.linear_q_proj(hidden)[0]
        else:
            query = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)[0]))[0]
        nope, rope = query.view(-1, self.num_heads, self.qk_dim).split(
            [self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1
        )
        return torch.cat([nope, rotate(_halves(rope), tokens)], dim=-1)

    def _latent(self, hidden: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        """The normalised latent of keys and values, [T, 1, rank] or under sequence parallel [T / tp, 1, rank], and the
        rotated part of the key, [T, 1, rope]."""
        latent, k_rope = self.linear_kv_down_proj(hidden)[0].split(
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        return self.kv_layernorm(latent), rotate(_halves(self._all_tokens(k_rope)), tokens)

    def _all_tokens(self, x: Tensor) -> Tensor:
        """[T / tp, ...] -> [T, ...] under sequence parallel. Every rank's heads use it: the backward sums over them."""
        return gather_from_sequence_parallel_region(x) if self.config.sequence_parallel else x

    def _key_value(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """[T, Q, D] and [T, Q, Dv]."""
        both = self.linear_kv_up_proj(latent)[0].view(len(k_rope), self.num_heads, -1)
        nope, value = both.split([self.config.qk_head_dim, self.config.v_head_dim], dim=-1)
        return torch.cat([nope, k_rope.expand(-1, self.num_heads, -1)], dim=-1), value.contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens) -> Tensor:
        """[T, Q * Dv]."""

        def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = self.core_attention(
                query, key, value, None, packed_seq_params=tokens, attn_mask_type=AttnMaskType.causal
            )
            return out.view(len(query), -1)

        if self.recomputes_core and self.training:
            return checkpoint(core, False, query, key, value)
        return core(query, key, value)

    def _attend_plain(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        return attend(query, key, value, seen, self.config.softmax_scale)

    def _attend_cached(
        self, query: Tensor, latent: Tensor, k_rope: Tensor, tokens: PackedTokens, use: CacheUse
    ) -> Tensor:
        """The cache holds [c | R k_rope] of a token, the same on every tensor-parallel rank. New tokens attend to it as
        one key head whose first part is also the value: with W_ukv = [W_uk; W_uv] of a head,
        q_nope (W_uk c) = (W_uk^T q_nope) c, and the weighted sum of W_uv c is W_uv times that of c."""
        num_nope, rank = self.config.qk_head_dim, self.config.kv_lora_rank
        entry = torch.cat([self._all_tokens(latent), k_rope], dim=-1)
        (entries,) = use.cache.write(self.layer_number, (entry,), use.write)

        def continued(new: slice) -> Tensor:
            weight: Tensor = self.linear_kv_up_proj.weight  # type: ignore[assignment]
            w_key, w_value = weight.view(self.num_heads, -1, rank).split([num_nope, self.config.v_head_dim], dim=1)
            nope, rope = query[new].split([num_nope, query.size(-1) - num_nope], dim=-1)
            absorbed = torch.cat([torch.einsum("bqd,qdr->bqr", nope, w_key), rope], dim=-1)
            out = attend_rows(absorbed, entries, entries[..., :rank], use, self._attend_plain)
            return torch.einsum("bqr,qdr->bqd", out.unflatten(1, (-1, rank)), w_value).flatten(1)

        def prompts(old: slice) -> Tensor:
            key, value = self._key_value(latent, k_rope)
            return attend_packed(query[old], key[old], value[old], tokens, self._attend_plain)

        return attend_cached(
            tokens,
            use,
            continued=continued,
            prompts=prompts,
            padding=lambda num_tokens: query.new_zeros(num_tokens, self.num_heads * self.config.v_head_dim),
            num_tokens=len(query),
        )


def use_latent_attention(attention: ModuleSpec, *, norm: type, down: type | None = None) -> None:
    """Makes LatentAttention the attention of a layer's spec, whose core is a PackedAttention; the latents are
    normalised by modules `norm`. `down`, if given, replaces the projections to them."""
    parts = attention.submodules
    attention.module, attention.params = LatentAttention, {}
    if down is not None:
        parts.linear_q_down_proj = parts.linear_kv_down_proj = down
    # Transformer Engine's spec has layers here that normalise their input, with the layers' epsilon.
    parts.linear_q_up_proj = parts.linear_kv_up_proj = parts.linear_q_proj
    parts.q_layernorm = parts.kv_layernorm = norm
    parts.core_attention.params["rotates"] = False


def linear(
    module: Any, size_in: int, size_out: int, config: TransformerConfig, name: str, **kwargs: Any
) -> torch.nn.Module:
    """A linear layer without bias of a layer's spec."""
    settings = {"init_method": config.init_method, "skip_bias_add": False, **kwargs}
    return build_module(
        module, size_in, size_out, config=config, bias=False, is_expert=False, tp_comm_buffer_name=name, **settings
    )


def linear_back(
    module: Any, size_in: int, config: TransformerConfig, name: str, group: dist.ProcessGroup
) -> torch.nn.Module:
    """The linear layer from heads, which tensor-parallel ranks share, back to the hidden size."""
    return linear(
        module,
        size_in,
        config.hidden_size,
        config,
        name,
        init_method=config.output_layer_init_method,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_group=group,
    )


def _halves(x: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1), as the weights have them -> (i, i + D / 2), as `rotate` turns them."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
