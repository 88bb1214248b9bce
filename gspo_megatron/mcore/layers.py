"""The table of layer specs: Megatron-Core's own layers (`local`) and those of Transformer Engine (`te`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from gspo_megatron.mcore import compat
from gspo_megatron.mcore.attention import PackedAttention
from gspo_megatron.mcore.experts import WholeExperts
from gspo_megatron.mcore.gated_delta_net import GatedSelfAttention, use_gated_delta_net
from gspo_megatron.mcore.latent_attention import ReplicatedLinear, use_latent_attention


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight. `weight.sequence_parallel` makes Megatron sum its gradient over the
    tensor-parallel ranks, each of which saw some of the tokens (Megatron's own local norm rejects that)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ZeroCentredRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.normalized_shape, 1 + self.weight.to(precise), self.eps).to(x.dtype)


def local_layers(transformer: TransformerConfig, pp_rank: int, chunk: int | None) -> Any:
    """Megatron's local block spec with this package's attention core, norm and experts."""
    block = get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, pp_rank=pp_rank, vp_stage=chunk)
    norm = ZeroCentredRMSNorm if transformer.layernorm_zero_centered_gamma else RMSNorm
    for layer in distinct_layers(block):
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = ModuleSpec(module=PackedAttention, params={"fused": None})
        if transformer.multi_latent_attention:
            use_latent_attention(attention, norm=norm, down=ReplicatedLinear)
        elif transformer.qk_layernorm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
        if transformer.attention_output_gate:
            attention.module = GatedSelfAttention
        compat.set_experts(layer.submodules.mlp, WholeExperts)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        # Megatron's map renames this norm as if the layer were dense; the Transformer Engine spec does not.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if transformer.linear_attention_freq is not None:
        mix_in_gated_delta_nets(block, transformer, get_transformer_layer_offset(transformer, chunk, pp_rank))
    block.layer_norm = norm
    return block


def mix_in_gated_delta_nets(block: Any, transformer: TransformerConfig, first: int) -> None:
    """Puts gated delta nets in place of attention in the layers that linear_attention_freq marks; `first` is the number
    of the first layer in the whole model, from 0."""
    marks = transformer.linear_attention_freq[first : first + len(block.layer_specs)]
    for i, marked in enumerate(marks):
        if marked:
            block.layer_specs[i] = copy.deepcopy(block.layer_specs[i])
            use_gated_delta_net(block.layer_specs[i].submodules.self_attention, norm=RMSNorm)


def te_layers(transformer: TransformerConfig, pp_rank: int, chunk: int | None) -> Any:
    """Megatron's block spec for Transformer Engine with this package's attention core around the fused one."""
    block = get_gpt_decoder_block_spec(transformer, use_transformer_engine=True, pp_rank=pp_rank, vp_stage=chunk)
    wrap_attention_cores(block)
    if transformer.multi_latent_attention:
        for layer in distinct_layers(block):
            use_latent_attention(layer.submodules.self_attention, norm=RMSNorm)
    return block


def wrap_attention_cores(block: Any) -> None:
    """Puts this package's attention core around the core of every layer of a block spec."""
    for layer in distinct_layers(block):
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = ModuleSpec(module=PackedAttention, params={"fused": attention.core_attention})


def distinct_layers(block: Any) -> list[Any]:
    """The layer specs of a block spec, each once: Megatron lists one object for all layers of a kind, and wrapping
    it twice would nest the wrappers."""
    return list({id(layer): layer for layer in block.layer_specs}.values())


@dataclass(frozen=True)
class Layers:
    """The layers of one library.

    Attributes:
        settings: fields of TransformerConfig that they need.
        fusions: more fields, set after its constructor, which would import the library to ask whether it has them.
        spec: (TransformerConfig, pipeline rank, virtual stage or None) -> block spec of GPTModel.
    """

    settings: Mapping[str, Any]
    fusions: Mapping[str, Any]
    spec: Callable[[TransformerConfig, int, int | None], Any]


LAYERS = {
    "local": Layers({"moe_grouped_gemm": False}, {}, local_layers),
    "te": Layers(
        {"moe_grouped_gemm": True},
        # Megatron's own unpermute adds a token's experts in bf16 by atomics, in another order each time: the first
        # ratio would not be 1, nor resume exact. Transformer Engine's kernel adds them in float32, in their order.
        # moe_router_fusion stays off: its kernel chooses the experts itself, and cannot be told a recorded choice.
        {"moe_permute_fusion": True},
        te_layers,
    ),
}
