"""What a layer keeps between its forward and its backward: bytes of one token, tensor by tensor.

The entries follow the layers' own code, whose autograd nodes keep these tensors; tests/layout/test_measured_memory.py
compares the sums of the local layers with what torch allocates. Those of Transformer Engine's layers are read from
their sources (2.20) and have not been measured.

H hidden size, Q width of all queries, K of all keys (or values), F inner width of an expert, k experts a token;
w bytes of a number of precision.dtype, f those of a norm's arithmetic (float32 or wider), i those of an input that a
matrix product keeps (1 in FP8, else w).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gspo_megatron.config.sections import Config
from gspo_megatron.device.precision import RECIPES, expects_te_layers
from gspo_megatron.layout.layout import Layout
from gspo_megatron.models.families import family_of
from gspo_megatron.models.family import LayerCount
from gspo_megatron.models.qwen3_next import CHUNK, delta_net_widths
from gspo_megatron.models.shape import ModelShape

BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
"""Of a number, by precision.dtype."""


@dataclass(frozen=True)
class Format:
    """How a run's layers hold their activations.

    Attributes:
        width, norm_width, input_width: w, f and i above.
        uses_te: Transformer Engine's layers, else Megatron-Core's local ones.
    """

    width: int
    norm_width: int
    input_width: int
    uses_te: bool

    @classmethod
    def of(cls, config: Config) -> Format:
        p, recipe = config.precision, RECIPES[config.precision.fp8]
        width = BYTES[p.dtype]
        return cls(width, max(width, 4), 1 if recipe.quantizes else width, expects_te_layers(p))

    def norm(self, size: int) -> float:
        """Input and 1 / rms. torch's norm keeps the normalised values too, and in bf16 both as float32."""
        return self.width * size + 4 if self.uses_te else self.norm_width * (2 * size + 1)


Kept = Mapping[str, float]
"""Bytes of a token by name."""


def grouped_query_attention(m: ModelShape, f: Format) -> Kept:
    """Of all others: qkv in one product, norms of queries and keys, RoPE, attention, output."""
    q, k, w = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim, f.width
    heads = m.num_attention_heads + m.num_query_groups
    norms: float
    core: float
    if f.uses_te:
        norms = w * (q + k) + 4 * heads
        core = w * (q + k) + w * q  # rotated queries and keys; the output
    else:
        # The query is copied before its norm, the key is only where the norm widens it.
        norms = f.norm_width * (2 * q + k + heads) + (f.norm_width * k if w < 4 else 0)
        core = w * (q + k) + w * (3 * q + 2 * k)  # rotated; then spread over a grid, attended, and collected
    if not has_qk_norms(m):
        norms = 0.0
    if writes_scores(m, f):
        core += scores(m, f) * (1.5 if w < 4 else 1)  # the weights in float32, and as narrow as the values
    return {
        "qkv": f.input_width * m.hidden_size + w * (q + 2 * k),
        "query and key norms": norms,
        "attention": core + 4 * m.num_attention_heads,
        "output gate": (w + f.norm_width) * q if has_output_gate(m) else 0,  # it, and its sigmoid
        "output projection": f.input_width * q if f.uses_te and f.input_width < w else 0,
    }


def latent_attention(m: ModelShape, f: Format) -> Kept:
    """Of DeepSeek-V3: projections to two latents, their norms, projections to heads, RoPE on a part, attention."""
    w, heads = f.width, m.num_attention_heads
    qk, v = heads * (m.qk_nope_head_dim + m.qk_rope_head_dim), heads * m.v_head_dim
    latents = f.input_width * m.hidden_size + f.norm(m.q_lora_rank) + f.norm(m.kv_lora_rank)
    up = f.input_width * (m.q_lora_rank + m.kv_lora_rank)
    core: float = w * (2 * qk + v) + w * v  # queries and keys with RoPE, values; the output
    if writes_scores(m, f):
        # Values are narrower than keys, which torch attends with on a CPU by writing the scores out, in float32.
        core += f.norm_width * (2 * qk + v) + scores(m, f)
    return {
        "latents": latents + up,
        "attention": core + 4 * heads,
        "output projection": f.input_width * v if f.uses_te and f.input_width < w else 0,
    }


def delta_net(m: ModelShape, f: Format) -> Kept:
    """Of Qwen3-Next: one product for queries, keys, values and gates; convolution; the delta rule in float32, with keys
    and queries repeated for every value head and, for every pair of positions in a chunk, five numbers a head; the
    states between chunks; norm, gate and output."""
    w, wide, heads = f.width, f.norm_width, m.linear_num_value_heads
    keys, values = delta_net_widths(m)
    repeated, states = heads * m.linear_key_head_dim, heads * m.linear_key_head_dim * m.linear_value_head_dim / CHUNK
    rule = wide * (9 * repeated + 3 * values + 5 * CHUNK * heads + states + 10 * heads)
    return {
        "qkvz": f.input_width * m.hidden_size,
        "attention": 3 * w * (2 * keys + values) + rule,
        "gated norm": (4 * wide + 2 * w) * values,
    }


def has_qk_norms(m: ModelShape) -> bool:
    """Whether queries and keys are normalised."""
    return bool(family_of(m).megatron(m)["qk_layernorm"])


def has_output_gate(m: ModelShape) -> bool:
    """Whether the output of attention is multiplied by a gate."""
    return bool(family_of(m).megatron(m).get("attention_output_gate"))


def writes_scores(m: ModelShape, f: Format) -> bool:
    """Whether attention writes its scores out."""
    return family_of(m).writes_scores and not f.uses_te


def scores(m: ModelShape, f: Format) -> float:
    """Of all heads, where they are written out."""
    return f.norm_width * m.num_attention_heads * m.max_sequence_length


def attention(m: ModelShape, n: LayerCount, f: Format) -> Kept:
    """Of any family: latent where keys and values have a latent, a gated delta net where the layer has one, else
    grouped-query."""
    if n.recurrent:
        return delta_net(m, f)
    return latent_attention(m, f) if m.kv_lora_rank else grouped_query_attention(m, f)


def core_ends(m: ModelShape, n: LayerCount, f: Format) -> float:
    """Of "attention": what selective recompute keeps, its inputs and its output."""
    if n.recurrent:
        keys, values = delta_net_widths(m)
        return f.width * (2 * keys + 2 * values)
    return 2 * f.width * m.num_attention_heads * (m.v_head_dim or m.head_dim)


def dense_network(hidden: int, inner: int, f: Format) -> float:
    """Input, gate and up, silu(gate), a copy of up, and their product, which is the input of the second matrix."""
    return (f.input_width * hidden + 4 * f.width * inner + f.input_width * inner) if inner else 0.0


def router(m: ModelShape, f: Format) -> float:
    """Its input, and the indices, probabilities and masks of the chosen experts."""
    return f.width * m.hidden_size + 32 * m.experts_per_token + 5 * m.num_experts


def expert_inputs(m: ModelShape, f: Format) -> float:
    """The token as each of its k experts gets it."""
    return m.experts_per_token * f.input_width * m.hidden_size


def expert_products(m: ModelShape, f: Format) -> float:
    """For each expert of the token: gate and up, silu(gate), their product, and that times the router's weight, which
    is the input of the second matrix. Megatron-Core's own grouped experts copy up as well."""
    copies = 5 if f.uses_te else 4
    return m.experts_per_token * ((copies * f.width + f.input_width) * m.expert_ffn_size + 4)


def kept_by_layer(m: ModelShape, n: LayerCount, layout: Layout, f: Format) -> dict[str, float]:
    """Bytes that one token of a context-parallel rank's share costs on each tensor-parallel rank, in a layer.

    Sequence parallel splits tokens over tp, and attention splits heads, so most entries are divided by tp. A token goes
    to k experts wherever they are; with balanced routing every rank gets as many as it sends, times etp, whose ranks
    all compute on the same tokens.
    """
    share = 1 / layout.tp
    kept = {name: size * share for name, size in attention(m, n, f).items() if size}
    kept["layer norms"] = 2 * f.norm(m.hidden_size) * share
    inner = m.shared_expert_ffn_size if n.num_experts else m.dense_ffn_size
    if inner:
        kept["dense and shared networks"] = dense_network(m.hidden_size, inner, f) * share
    if n.num_experts:
        kept["router"] = router(m, f) * share
        kept["experts' inputs"] = expert_inputs(m, f) * share * layout.etp
        kept["experts"] = expert_products(m, f) * share
    return kept


def working_bytes(m: ModelShape, n: LayerCount, layout: Layout, f: Format) -> float:
    """What a layer at work holds besides, per token as above: the residual stream and its change, and the tokens on
    their way to experts and back, or their gradients, each k times: sorted by expert, received, and sorted again. Where
    scores are written out, also their gradient; with sinks, that of the weights and the sinks as well."""
    sent = 3 * m.experts_per_token * layout.etp if n.num_experts else 0
    gradients = (1 if m.kv_lora_rank else 2) * scores(m, f) if writes_scores(m, f) else 0
    return ((2 + sent) * m.hidden_size * f.width + gradients) / layout.tp
