"""The section `model`: the architecture and its sizes, by name, from a Hugging Face folder, or one by one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from gspo_megatron.config.declarations import setting
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.presets import PRESETS
from gspo_megatron.models.rope import SCALINGS
from gspo_megatron.models.shape import OPTIONAL, ModelShape


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. A setting of another family than `family` is an error."""

    preset: str = setting(
        "tiny_moe",
        "A named model. Any other key of this section overrides it.",
        choices=tuple(PRESETS),
    )
    hf: str | None = setting(
        None,
        "A Hugging Face folder, whose config.json gives the sizes and whose safetensors files the weights that a run "
        "starts from. Instead of preset; a size of this section may repeat the folder's, and max_sequence_length may "
        "be shorter.",
    )
    hf_allow_nan: bool = setting(False, "Accept weights in the folder that are NaN or infinite.")
    family: str = setting(
        "qwen3_moe",
        "The architecture: docs/models.md describes each.",
        choices=tuple(FAMILIES),
    )
    num_layers: int = setting(4, "Transformer layers.", least=1)
    hidden_size: int = setting(64, "Width of the hidden states.", least=1)
    num_attention_heads: int = setting(4, "Query heads per layer.", least=1)
    num_query_groups: int = setting(
        2, "All but deepseek_v3: key/value heads per layer, each shared by a group of query heads.", least=1
    )
    head_dim: int = setting(
        16, "All but deepseek_v3: width of an attention head. RoPE rotates an even number of its dimensions.", least=1
    )
    qk_norm: bool = setting(False, "glm4_moe: normalise queries and keys, each head on its own.")
    attention_bias: bool = setting(False, "glm4_moe: biases of the projections to queries, keys and values.")
    partial_rotary_factor: float = setting(
        1.0,
        "glm4_moe, qwen3_next: the share of a head's dimensions, the first ones, that RoPE rotates.",
        above=0,
        most=1,
    )
    sliding_window: int = setting(
        0, "mixtral, gpt_oss: tokens that a token attends to at most, itself included. 0: all earlier ones.", least=0
    )
    q_lora_rank: int = setting(
        0,
        "deepseek_v3: width of the latent of queries. 0: they are projected from the hidden states.",
        least=0,
    )
    kv_lora_rank: int = setting(0, "deepseek_v3: width of the latent of keys and values.", least=0)
    qk_nope_head_dim: int = setting(0, "deepseek_v3: the part of a query or key without RoPE.", least=0)
    qk_rope_head_dim: int = setting(0, "deepseek_v3: the part of a query or key with RoPE. Even.", least=0)
    v_head_dim: int = setting(0, "deepseek_v3: width of a value.", least=0)
    num_experts: int = setting(8, "All but qwen3: experts per layer.", least=1)
    experts_per_token: int = setting(2, "All but qwen3: experts that the router chooses per token.", least=1)
    expert_ffn_size: int = setting(128, "All but qwen3: inner width of an expert.", least=1)
    shared_expert_ffn_size: int = setting(
        0, "deepseek_v3, glm4_moe, qwen3_next: inner width of the expert that every token passes through.", least=0
    )
    num_dense_layers: int = setting(0, "deepseek_v3: first layers that have no experts but one network.", least=0)
    dense_ffn_size: int = setting(
        0, "deepseek_v3: inner width of that network. qwen3: of the network of every layer.", least=0
    )
    router_groups: int = setting(1, "deepseek_v3: groups of experts.", least=1)
    router_groups_per_token: int = setting(
        1, "deepseek_v3: groups that the router chooses before it chooses experts in them.", least=1
    )
    routed_scaling_factor: float = setting(
        1.0, "deepseek_v3: factor on the weights of a token's experts, which sum to 1.", above=0
    )
    full_attention_interval: int = setting(
        0, "qwen3_next: one layer in this many has full attention, the others a gated delta net.", least=0
    )
    linear_num_key_heads: int = setting(0, "qwen3_next: query and key heads of a gated delta net.", least=0)
    linear_num_value_heads: int = setting(0, "qwen3_next: its value heads, a multiple of its key heads.", least=0)
    linear_key_head_dim: int = setting(0, "qwen3_next: width of its queries and keys.", least=0)
    linear_value_head_dim: int = setting(0, "qwen3_next: width of its values.", least=0)
    linear_conv_kernel_dim: int = setting(
        0, "qwen3_next: tokens that its convolution sees, the newest included.", least=0
    )
    vocab_size: int | None = setting(None, "Rows of the vocabulary matrices. null: the tokenizer's size.", least=1)
    max_sequence_length: int = setting(256, "Prompt and response tokens together.", least=2)
    rope_base: float = setting(10_000.0, "Base of the RoPE frequencies.", above=0)
    rope_scaling: str = setting(
        "none", "deepseek_v3: how RoPE reaches beyond the length it was trained with.", choices=tuple(SCALINGS)
    )
    rope_scaling_factor: float = setting(1.0, "yarn: the factor by which it was extended.", least=1)
    rope_original_length: int = setting(0, "yarn: the length before that.", least=0)
    rope_beta_fast: float = setting(
        32.0, "yarn: pairs that turn more often in that length keep their frequency.", above=0
    )
    rope_beta_slow: float = setting(1.0, "yarn: those that turn less often have it divided by the factor.", above=0)
    rope_mscale: float = setting(
        0.0, "yarn: with rope_mscale_all_dim, the factor on cosines and sines. 0 is as if it were absent.", least=0
    )
    rope_mscale_all_dim: float = setting(0.0, "yarn: the factor on attention scores. 0: none.", least=0)
    rope_truncate: bool = setting(True, "yarn: round the first and the last pair whose frequency is interpolated.")
    norm_epsilon: float = setting(1e-6, "Added to the mean square in RMSNorm.", above=0)
    tie_embeddings: bool = setting(False, "Use one matrix for the embedding and the output.")
    init_std: float = setting(0.02, "Standard deviation of the initial weights.", above=0)
    aux_loss_coef: float = setting(
        0.0,
        "Coefficient of Megatron's load-balancing loss. It is defined per micro-batch, so a value above 0 makes the "
        "gradient depend on the layout.",
        least=0,
    )

    @cached_property
    def shape(self) -> ModelShape:
        """The settings of this section that determine the tensors and the maths."""
        unused = OPTIONAL.keys() - FAMILIES[self.family].uses
        return ModelShape(**{f.name: getattr(self, f.name) for f in fields(ModelShape) if f.name not in unused})

    @property
    def ignored(self) -> list[str]:
        """Keys with a value other than the default that the family does not use."""
        unused = (key for key in OPTIONAL if key not in FAMILIES[self.family].uses)
        return [key for key in unused if getattr(self, key) != getattr(ModelConfig, key)]
