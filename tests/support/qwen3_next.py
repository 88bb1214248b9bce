"""An independent list of the tensors of a Qwen3-Next model: on the hub, and here."""

from __future__ import annotations

from gspo_megatron.models.shape import ModelShape

Sizes = dict[str, tuple[int, ...]]


def hub_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the safetensors files of a Qwen3-Next model on the hub, without multi-token prediction."""
    h, d, q, k, v = s.hidden_size, s.head_dim, s.num_attention_heads, s.linear_num_key_heads, s.linear_num_value_heads
    keys, values = k * s.linear_key_head_dim, v * s.linear_value_head_dim
    sizes: Sizes = {"model.embed_tokens.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer = f"model.layers.{i}."
        delta, full, mlp = f"{layer}linear_attn.", f"{layer}self_attn.", f"{layer}mlp."
        if i % s.full_attention_interval == s.full_attention_interval - 1:
            sizes |= {f"{full}q_proj.weight": (2 * q * d, h), f"{full}o_proj.weight": (h, q * d)}
            sizes |= {f"{full}{part}_proj.weight": (s.num_query_groups * d, h) for part in "kv"}
            sizes |= {f"{full}{part}_norm.weight": (d,) for part in "qk"}
        else:
            sizes |= {
                f"{delta}in_proj_qkvz.weight": (2 * keys + 2 * values, h),
                f"{delta}in_proj_ba.weight": (2 * v, h),
                f"{delta}conv1d.weight": (2 * keys + values, 1, s.linear_conv_kernel_dim),
                f"{delta}dt_bias": (v,),
                f"{delta}A_log": (v,),
                f"{delta}norm.weight": (s.linear_value_head_dim,),
                f"{delta}out_proj.weight": (h, values),
            }
        sizes |= {f"{layer}{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        sizes |= {f"{mlp}gate.weight": (s.num_experts, h), f"{mlp}shared_expert_gate.weight": (1, h)}
        networks = {f"{mlp}shared_expert.": s.shared_expert_ffn_size}
        networks |= {f"{mlp}experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
        for network, f in networks.items():
            sizes |= {f"{network}{part}_proj.weight": (f, h) for part in ("gate", "up")}
            sizes[f"{network}down_proj.weight"] = (h, f)
    sizes["model.norm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"lm_head.weight": (s.vocab_size or 0, h)}


def our_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the model here, without padding."""
    h, d, q, k, v = s.hidden_size, s.head_dim, s.num_attention_heads, s.linear_num_key_heads, s.linear_num_value_heads
    keys, values = k * s.linear_key_head_dim, v * s.linear_value_head_dim
    sizes: Sizes = {"embedding.word_embeddings.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer, attention, mlp = (f"decoder.layers.{i}.{part}" for part in ("", "self_attention.", "mlp."))
        if i % s.full_attention_interval == s.full_attention_interval - 1:
            sizes[f"{attention}linear_qkv.weight"] = (2 * (q + s.num_query_groups) * d, h)
            sizes[f"{attention}linear_proj.weight"] = (h, q * d)
            sizes |= {f"{attention}{part}_layernorm.weight": (d,) for part in "qk"}
        else:
            sizes |= {
                f"{attention}in_proj_qkvz.weight": (2 * keys + 2 * values, h),
                f"{attention}in_proj_ba.weight": (2 * v, h),
                f"{attention}conv1d.weight": (2 * keys + values, 1, s.linear_conv_kernel_dim),
                f"{attention}dt_bias": (v,),
                f"{attention}A_log": (v,),
                f"{attention}out_norm.weight": (s.linear_value_head_dim,),
                f"{attention}out_proj.weight": (h, values),
            }
        sizes |= {f"{layer}{norm}_layernorm.weight": (h,) for norm in ("input", "pre_mlp")}
        sizes |= {f"{mlp}router.weight": (s.num_experts, h), f"{mlp}shared_experts.gate_weight": (1, h)}
        networks = {f"{mlp}shared_experts.": s.shared_expert_ffn_size}
        networks |= {f"{mlp}experts.local_experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
        for network, f in networks.items():
            sizes |= {f"{network}linear_fc1.weight": (2 * f, h), f"{network}linear_fc2.weight": (h, f)}
    sizes["decoder.final_layernorm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"output_layer.weight": (s.vocab_size or 0, h)}
