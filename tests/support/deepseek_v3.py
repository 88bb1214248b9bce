"""An independent list of the tensors of a DeepSeek-V3 model: on the hub, and here."""

from __future__ import annotations

from gspo_megatron.models.shape import ModelShape

Sizes = dict[str, tuple[int, ...]]


def hub_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the safetensors files of a DeepSeek-V3 model on the hub, without multi-token prediction."""
    h, n, r, rope = s.hidden_size, s.num_attention_heads, s.kv_lora_rank, s.qk_rope_head_dim
    qk = s.qk_nope_head_dim + rope
    sizes: Sizes = {"model.embed_tokens.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        sizes |= {
            f"{layer}input_layernorm.weight": (h,),
            f"{attention}kv_a_proj_with_mqa.weight": (r + rope, h),
            f"{attention}kv_a_layernorm.weight": (r,),
            f"{attention}kv_b_proj.weight": (n * (s.qk_nope_head_dim + s.v_head_dim), r),
            f"{attention}o_proj.weight": (h, n * s.v_head_dim),
            f"{layer}post_attention_layernorm.weight": (h,),
        }
        if s.q_lora_rank:
            sizes |= {
                f"{attention}q_a_proj.weight": (s.q_lora_rank, h),
                f"{attention}q_a_layernorm.weight": (s.q_lora_rank,),
                f"{attention}q_b_proj.weight": (n * qk, s.q_lora_rank),
            }
        else:
            sizes[f"{attention}q_proj.weight"] = (n * qk, h)
        networks = {f"{layer}mlp.": s.dense_ffn_size}
        if i >= s.num_dense_layers:
            sizes |= {
                f"{layer}mlp.gate.weight": (s.num_experts, h),
                f"{layer}mlp.gate.e_score_correction_bias": (s.num_experts,),
            }
            networks = {f"{layer}mlp.shared_experts.": s.shared_expert_ffn_size}
            networks |= {f"{layer}mlp.experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
        for network, f in networks.items():
            sizes |= {
                f"{network}gate_proj.weight": (f, h),
                f"{network}up_proj.weight": (f, h),
                f"{network}down_proj.weight": (h, f),
            }
    sizes["model.norm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"lm_head.weight": (s.vocab_size or 0, h)}


def our_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the model here, without padding."""
    h, n, r, rope = s.hidden_size, s.num_attention_heads, s.kv_lora_rank, s.qk_rope_head_dim
    qk = s.qk_nope_head_dim + rope
    sizes: Sizes = {"embedding.word_embeddings.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer, attention = f"decoder.layers.{i}.", f"decoder.layers.{i}.self_attention."
        sizes |= {
            f"{layer}input_layernorm.weight": (h,),
            f"{attention}linear_kv_down_proj.weight": (r + rope, h),
            f"{attention}kv_layernorm.weight": (r,),
            f"{attention}linear_kv_up_proj.weight": (n * (s.qk_nope_head_dim + s.v_head_dim), r),
            f"{attention}linear_proj.weight": (h, n * s.v_head_dim),
            f"{layer}pre_mlp_layernorm.weight": (h,),
        }
        if s.q_lora_rank:
            sizes |= {
                f"{attention}linear_q_down_proj.weight": (s.q_lora_rank, h),
                f"{attention}q_layernorm.weight": (s.q_lora_rank,),
                f"{attention}linear_q_up_proj.weight": (n * qk, s.q_lora_rank),
            }
        else:
            sizes[f"{attention}linear_q_proj.weight"] = (n * qk, h)
        networks = {f"{layer}mlp.": s.dense_ffn_size}
        if i >= s.num_dense_layers:
            sizes |= {
                f"{layer}mlp.router.weight": (s.num_experts, h),
                f"{layer}mlp.router.expert_bias": (s.num_experts,),
            }
            networks = {f"{layer}mlp.shared_experts.": s.shared_expert_ffn_size}
            networks |= {f"{layer}mlp.experts.local_experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
        for network, f in networks.items():
            sizes |= {f"{network}linear_fc1.weight": (2 * f, h), f"{network}linear_fc2.weight": (h, f)}
    sizes["decoder.final_layernorm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"output_layer.weight": (s.vocab_size or 0, h)}
