"""An independent list of the tensors of the families with grouped-query attention: on the hub, and here."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.models.shape import ModelShape

Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Names:
    """What the families call things on the hub, and which of them they have."""

    mlp: str = "mlp"
    router: str = "gate"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    qk_norm: bool = True
    expert_bias: bool = False
    stacked: bool = False
    """The experts of a layer are one tensor; every matrix has a bias; heads have sinks."""


NAMES = {
    "qwen3": Names(),
    "qwen3_moe": Names(),
    "mixtral": Names("block_sparse_moe", gate_up_down=("w1", "w3", "w2"), qk_norm=False),
    "glm4_moe": Names(expert_bias=True),
    "gpt_oss": Names(router="router", qk_norm=False, stacked=True),
}


def is_dense(s: ModelShape, layer: int) -> bool:
    return not s.num_experts or layer < s.num_dense_layers


def hub_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the safetensors files of a model on the hub."""
    h, d, names = s.hidden_size, s.head_dim, NAMES[s.family]
    queries, keys = s.num_attention_heads * d, s.num_query_groups * d
    sizes: Sizes = {"model.embed_tokens.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer, attention, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.{names.mlp}."
        sizes |= {f"{layer}{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            sizes[f"{attention}{part}_proj.weight"] = (rows, h)
            if s.attention_bias or names.stacked:
                sizes[f"{attention}{part}_proj.bias"] = (rows,)
        sizes[f"{attention}o_proj.weight"] = (h, queries)
        if names.stacked:
            sizes |= {f"{attention}o_proj.bias": (h,), f"{attention}sinks": (s.num_attention_heads,)}
        if names.qk_norm and (s.qk_norm or s.family != "glm4_moe"):
            sizes |= {f"{attention}{part}_norm.weight": (d,) for part in "qk"}
        networks = {mlp: s.dense_ffn_size}
        if not is_dense(s, i):
            sizes[f"{mlp}{names.router}.weight"] = (s.num_experts, h)
            if names.expert_bias:
                sizes[f"{mlp}{names.router}.e_score_correction_bias"] = (s.num_experts,)
            networks = {f"{mlp}experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
            if names.stacked:
                e, f, experts = s.num_experts, s.expert_ffn_size, f"{mlp}experts."
                sizes |= {f"{experts}gate_up_proj": (e, h, 2 * f), f"{experts}gate_up_proj_bias": (e, 2 * f)}
                sizes |= {f"{experts}down_proj": (e, f, h), f"{experts}down_proj_bias": (e, h)}
                sizes[f"{mlp}router.bias"] = (e,)
                networks = {}
            if s.shared_expert_ffn_size:
                networks[f"{mlp}shared_experts."] = s.shared_expert_ffn_size
        gate, up, down = names.gate_up_down
        for network, f in networks.items():
            sizes |= {f"{network}{gate}.weight": (f, h), f"{network}{up}.weight": (f, h)}
            sizes[f"{network}{down}.weight"] = (h, f)
    sizes["model.norm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"lm_head.weight": (s.vocab_size or 0, h)}


def our_sizes(s: ModelShape) -> Sizes:
    """Names and sizes in the model here, without padding."""
    h, d, names = s.hidden_size, s.head_dim, NAMES[s.family]
    queries, keys = s.num_attention_heads * d, s.num_query_groups * d
    sizes: Sizes = {"embedding.word_embeddings.weight": (s.vocab_size or 0, h)}
    for i in range(s.num_layers):
        layer, attention, mlp = (f"decoder.layers.{i}.{part}" for part in ("", "self_attention.", "mlp."))
        sizes |= {f"{layer}{norm}_layernorm.weight": (h,) for norm in ("input", "pre_mlp")}
        sizes[f"{attention}linear_qkv.weight"] = (queries + 2 * keys, h)
        if s.attention_bias or names.stacked:
            sizes[f"{attention}linear_qkv.bias"] = (queries + 2 * keys,)
        if names.stacked:
            sizes[f"{attention}linear_proj.bias"] = (h,)
            sizes[f"{attention}core_attention.softmax_offset"] = (s.num_attention_heads,)
            sizes[f"{mlp}router.bias"] = (s.num_experts,)
        sizes[f"{attention}linear_proj.weight"] = (h, queries)
        if names.qk_norm and (s.qk_norm or s.family != "glm4_moe"):
            sizes |= {f"{attention}{part}_layernorm.weight": (d,) for part in "qk"}
        networks = {mlp: s.dense_ffn_size}
        if not is_dense(s, i):
            sizes[f"{mlp}router.weight"] = (s.num_experts, h)
            if names.expert_bias:
                sizes[f"{mlp}router.expert_bias"] = (s.num_experts,)
            networks = {f"{mlp}experts.local_experts.{e}.": s.expert_ffn_size for e in range(s.num_experts)}
            if s.shared_expert_ffn_size:
                networks[f"{mlp}shared_experts."] = s.shared_expert_ffn_size
        for network, f in networks.items():
            sizes |= {f"{network}linear_fc1.weight": (2 * f, h), f"{network}linear_fc2.weight": (h, f)}
            if names.stacked:
                sizes |= {f"{network}linear_fc1.bias": (2 * f,), f"{network}linear_fc2.bias": (h,)}
    sizes["decoder.final_layernorm.weight"] = (h,)
    return sizes if s.tie_embeddings else sizes | {"output_layer.weight": (s.vocab_size or 0, h)}
