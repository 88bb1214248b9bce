"""The policy network: Megatron-Core's GPTModel with Qwen3-MoE settings, ending in hidden states instead of logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.attention import PackedAttention, Rotary
from gspo_megatron.mcore.experts import WholeExperts
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.packed_tokens import PackedTokens
from gspo_megatron.mcore.parameters import initialize_weights, padded_vocab_size


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight. The weight says whether its gradient must be summed over tensor-parallel
    ranks that each saw a part of the tokens (Megatron's own local norm refuses sequence parallel)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PolicyModel(GPTModel):
    """tokens in, final hidden states out: [T, 1, H], or [T / tp, 1, H] under sequence parallel.

    The vocabulary matmul belongs to `log_probs`, which scores response tokens only and keeps no logits.
    """

    def __init__(self, *args: Any, rotary: Rotary, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rotary = rotary
        self.true_vocab_size = true_vocab_size

    def forward(self, tokens_T: Tensor, packed: PackedTokens) -> Tensor:
        self.rotary.prepare(packed)
        hidden = self.embedding(input_ids=tokens_T[None], position_ids=None) if self.pre_process else None
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)

    def head_weight(self) -> Tensor:
        """[Vp, H]: this rank's rows of the output matrix (last pipeline stage only)."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )


def transformer_config(config: Config, device: Device, use_te: bool) -> TransformerConfig:
    """Megatron's settings for this run. Fields that one of the supported versions lacks are left out."""
    m, p = config.model, config.parallel
    settings: dict[str, Any] = {
        "num_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_query_groups": m.num_query_groups,
        "kv_channels": m.head_dim,
        "ffn_hidden_size": m.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": m.norm_epsilon,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_moe_experts": m.num_experts,
        "moe_ffn_hidden_size": m.expert_ffn_size,
        "moe_router_topk": m.experts_per_token,
        "moe_router_pre_softmax": False,  # softmax over the chosen ones: Hugging Face's norm_topk_prob=True
        "moe_router_load_balancing_type": "aux_loss" if m.aux_loss_coef > 0 else "none",
        "moe_aux_loss_coeff": m.aux_loss_coef,
        "moe_router_dtype": "fp64" if device.dtype == torch.float64 else "fp32",
        "moe_token_dispatcher_type": p.token_dispatcher,
        "moe_grouped_gemm": use_te,
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "virtual_pipeline_model_parallel_size": p.vpp if p.vpp > 1 else None,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "sequence_parallel": p.tp > 1,
        # Of two stages each is before and behind the other. Only where forward and backward travel apart, as here, can
        # they tell which of two messages is which.
        "overlap_p2p_comm": p.vpp > 1,
        "batch_p2p_comm": p.vpp == 1,
        "params_dtype": device.dtype,
        "pipeline_dtype": device.dtype,
        "bf16": device.dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "use_cpu_initialization": device.on_cpu,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "recompute_granularity": None if p.recompute == "none" else p.recompute,
        "recompute_method": "uniform" if p.recompute == "full" else None,
        "recompute_num_layers": 1 if p.recompute == "full" else None,
        # A message that overlaps with computation is read from memory until it has left; on a device, the queue of the
        # work keeps that memory, on the CPU nothing would.
        "deallocate_pipeline_outputs": not device.on_cpu,
        "fp8": None if config.precision.fp8 == "none" else "hybrid",
        "fp8_recipe": None if config.precision.fp8 == "none" else config.precision.fp8,
    }
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    transformer = TransformerConfig(
        **{k: v for k, v in settings.items() if k in known and not (k == "fp8_recipe" and v is None)}
    )
    # The micro-batches of a pipeline differ in length. Set afterwards: with the allgather dispatcher the constructor
    # refuses it: that one needs equal lengths among the ranks that share experts, which packing_rules sees to.
    transformer.variable_seq_lengths = p.pp > 1
    return transformer


def layer_spec(transformer: TransformerConfig, use_te: bool, pp_rank: int, chunk: int | None) -> Any:
    """Megatron's block spec with this package's attention core and, in the local spec, its norm and experts."""
    block = get_gpt_decoder_block_spec(transformer, use_transformer_engine=use_te, pp_rank=pp_rank, vp_stage=chunk)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        fused = attention.core_attention if use_te else None
        attention.core_attention = ModuleSpec(module=PackedAttention, params={"fused": fused})
        if not use_te:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
            compat.set_experts(layer.submodules.mlp, WholeExperts)
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            # Megatron's map renames this norm as if the layer were dense; the Transformer Engine spec does not.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if not use_te:
        block.layer_norm = RMSNorm
    return block


def build_model(config: Config, groups: Groups, device: Device, use_te: bool) -> list[PolicyModel]:
    """The parts of the model that this rank holds, on its device, with weights that depend on run.seed alone: one part,
    or parallel.vpp of them, in the order in which a token passes them."""
    if device.on_cpu:
        # No layer draws random numbers on this device; the tracker only has to answer.
        mcore_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    else:
        mcore_random.model_parallel_cuda_manual_seed(config.run.seed)
    m, num_chunks = config.model, config.parallel.vpp
    assert m.vocab_size is not None, "the tokenizer decides model.vocab_size before the model is built"
    transformer = transformer_config(config, device, use_te)
    rotary = Rotary(m.head_dim, m.rope_base, m.max_sequence_length, device.torch_device, device.dtype)
    chunks = []
    for i in range(num_chunks):
        number = i if num_chunks > 1 else None
        model = PolicyModel(
            transformer,
            layer_spec(transformer, use_te, groups.pp_rank, number),
            vocab_size=padded_vocab_size(m.vocab_size, config.parallel.tp),
            max_sequence_length=m.max_sequence_length,
            pre_process=groups.is_first_stage and i == 0,
            post_process=groups.is_last_stage and i == num_chunks - 1,
            share_embeddings_and_output_weights=m.tie_embeddings,
            pg_collection=groups.collection,
            vp_stage=number,
            true_vocab_size=m.vocab_size,
            rotary=rotary,
        )
        if device.dtype == torch.float64:
            model.double()
        model.to(device.torch_device)
        compat.mark_expert_parameters(model, groups.experts_have_own_groups)
        initialize_weights(model, m, groups, config.run.seed)
        chunks.append(model)
    return chunks
