"""An independent list of the tensors of a Qwen3-MoE model: on the hub, and here."""

from __future__ import annotations

from gspo_megatron.models.shape import ModelShape


def hub_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes in the safetensors files of a Qwen3-MoE model on the hub."""
    h, d, f = shape.hidden_size, shape.head_dim, shape.expert_ffn_size
    queries, keys = shape.num_attention_heads * d, shape.num_query_groups * d
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size or 0, h)}
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}."
        sizes |= {
            f"{layer}input_layernorm.weight": (h,),
            f"{layer}self_attn.q_proj.weight": (queries, h),
            f"{layer}self_attn.k_proj.weight": (keys, h),
            f"{layer}self_attn.v_proj.weight": (keys, h),
            f"{layer}self_attn.o_proj.weight": (h, queries),
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.k_norm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (h,),
            f"{layer}mlp.gate.weight": (shape.num_experts, h),
        }
        for e in range(shape.num_experts):
            sizes |= {
                f"{layer}mlp.experts.{e}.gate_proj.weight": (f, h),
                f"{layer}mlp.experts.{e}.up_proj.weight": (f, h),
                f"{layer}mlp.experts.{e}.down_proj.weight": (h, f),
            }
    sizes["model.norm.weight"] = (h,)
    return sizes if shape.tie_embeddings else sizes | {"lm_head.weight": (shape.vocab_size or 0, h)}


def our_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes in the model here, without padding."""
    h, d, f = shape.hidden_size, shape.head_dim, shape.expert_ffn_size
    queries, keys = shape.num_attention_heads * d, shape.num_query_groups * d
    sizes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (shape.vocab_size or 0, h)}
    for i in range(shape.num_layers):
        layer = f"decoder.layers.{i}."
        sizes |= {
            f"{layer}input_layernorm.weight": (h,),
            f"{layer}self_attention.linear_qkv.weight": (queries + 2 * keys, h),
            f"{layer}self_attention.linear_proj.weight": (h, queries),
            f"{layer}self_attention.q_layernorm.weight": (d,),
            f"{layer}self_attention.k_layernorm.weight": (d,),
            f"{layer}pre_mlp_layernorm.weight": (h,),
            f"{layer}mlp.router.weight": (shape.num_experts, h),
        }
        for e in range(shape.num_experts):
            expert = f"{layer}mlp.experts.local_experts.{e}."
            sizes |= {f"{expert}linear_fc1.weight": (2 * f, h), f"{expert}linear_fc2.weight": (h, f)}
    sizes["decoder.final_layernorm.weight"] = (h,)
    return sizes if shape.tie_embeddings else sizes | {"output_layer.weight": (shape.vocab_size or 0, h)}
