"""The policy network: Megatron-Core's GPTModel in the configured shape, ending in hidden states instead of logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.mcore import compat, routing
from gspo_megatron.mcore.attention import Rotary
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.layers import LAYERS
from gspo_megatron.mcore.packed_tokens import PackedTokens
from gspo_megatron.mcore.parameters import initialize_weights, padded_vocab_size
from gspo_megatron.models.families import family_of
from gspo_megatron.models.rope import rope_of


class PolicyModel(GPTModel):
    """tokens in, final hidden states out: [T, 1, H], or [T / tp, 1, H] under sequence parallel.

    The vocabulary matmul belongs to `log_probs`, which scores response tokens only and keeps no logits.
    """

    def __init__(self, *args: Any, rotary: Rotary, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.rotary = rotary
        self.true_vocab_size = true_vocab_size
        self.weights_changed = True  # since the last forward; see schedule

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


def transformer_config(config: Config, device: Device, layers: str) -> TransformerConfig:
    """Megatron's settings for this run, with the row `layers` of LAYERS. Fields that the installed version lacks
    are left out."""
    shape, m, p, ends = config.model.shape, config.model, config.parallel, config.precision.first_last_layers_bf16
    first, last = p.first_stage_layers, p.last_stage_layers
    if p.pp == 2 and first is not None:
        # The last stage has the rest. Told both, Megatron divides by the number of stages between them, which is 0.
        last = None
    settings: dict[str, Any] = {
        **family_of(shape).megatron(shape),
        **LAYERS[layers].settings,
        **RECIPES[config.precision.fp8].megatron,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
        "deterministic_mode": config.precision.deterministic,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_router_load_balancing_type": "aux_loss" if m.aux_loss_coef > 0 else "none",
        "moe_aux_loss_coeff": m.aux_loss_coef,
        "moe_router_dtype": "fp64" if device.dtype == torch.float64 else "fp32",
        "moe_token_dispatcher_type": p.token_dispatcher,
        "tensor_model_parallel_size": p.tp,
        "pipeline_model_parallel_size": p.pp,
        "virtual_pipeline_model_parallel_size": p.vpp if p.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep,
        "expert_tensor_parallel_size": p.etp,
        "sequence_parallel": p.tp > 1,
        # With two stages, each is both the previous and the next stage of the other. They can tell two messages apart
        # only when forward and backward messages are sent separately, as here.
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
        # A send that overlaps with computation reads its tensor until it completes. On a GPU the stream keeps that
        # memory valid; on the CPU nothing would.
        "deallocate_pipeline_outputs": not device.on_cpu,
    }
    kind = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    known = {f.name for f in dataclasses.fields(kind)}
    transformer = kind(**{k: v for k, v in settings.items() if k in known})
    # The micro-batches of a pipeline differ in length. Set here because the constructor rejects it with the allgather
    # dispatcher, which needs equal lengths on the ranks that share experts; packing_rules guarantees those.
    transformer.variable_seq_lengths = p.pp > 1
    for name, value in LAYERS[layers].fusions.items():
        setattr(transformer, name, value)
    return transformer


def build_model(
    config: Config, groups: Groups, device: Device, use_te: bool, *, num_ids: int | None = None
) -> list[PolicyModel]:
    """This rank's chunks of the model, on its device, with weights that depend on run.seed alone: one chunk, or
    parallel.vpp of them, in the order in which a token passes through them. Only the first `num_ids` ids have a
    probability, None: all of the vocabulary."""
    if device.on_cpu:
        # No layer draws random numbers on the CPU; Megatron only needs the tracker to exist.
        mcore_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    else:
        mcore_random.model_parallel_cuda_manual_seed(config.run.seed)
    shape, num_chunks, layers = config.model.shape, config.parallel.vpp, "te" if use_te else "local"
    assert shape.vocab_size is not None, "settle sets model.vocab_size before the model is built"
    transformer = transformer_config(config, device, layers)
    rotary = Rotary(rope_of(shape), shape.max_sequence_length, device.torch_device, device.dtype)
    chunks = []
    for i in range(num_chunks):
        number = i if num_chunks > 1 else None
        model = PolicyModel(
            transformer,
            LAYERS[layers].spec(transformer, groups.pp_rank, number),
            vocab_size=padded_vocab_size(shape.vocab_size, config.parallel.tp),
            max_sequence_length=shape.max_sequence_length,
            pre_process=groups.is_first_stage and i == 0,
            post_process=groups.is_last_stage and i == num_chunks - 1,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            pg_collection=groups.collection,
            vp_stage=number,
            true_vocab_size=num_ids or shape.vocab_size,
            rotary=rotary,
        )
        if device.dtype == torch.float64:
            model.double()
        model.to(device.torch_device)
        compat.mark_expert_parameters(model, groups.experts_have_own_groups)
        initialize_weights(model, shape, groups, std=config.model.init_std, seed=config.run.seed)
        chunks.append(model)
    routing.install(chunks)
    return chunks
