"""What a model and a layout mean, from the settings alone: parameters, work, and memory (which --dry-run prints)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.config.sections import Config, ModelConfig
from gspo_megatron.layout.layout import Layout

_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
_GIB = 2**30


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by how they are spread over ranks.

    Attributes:
        vocabulary: one vocabulary matrix. `num_vocabularies` is 2, or 1 where embedding and head are tied.
        attention: one layer's projections, spread over tp.
        replicated: one layer's norms and router, whole on every rank of its stage.
        expert: one expert, spread over etp; a layer's experts over ep.
        final_norm: on the last stage.
    """

    vocabulary: int
    num_vocabularies: int
    attention: int
    replicated: int
    expert: int
    final_norm: int

    def total(self, num_layers: int, experts_per_layer: int) -> int:
        """Of the whole model; with `experts_per_layer` = the ones a token chooses, those it passes through."""
        layer = self.attention + self.replicated + experts_per_layer * self.expert
        return self.num_vocabularies * self.vocabulary + num_layers * layer + self.final_norm


def count_parameters(m: ModelConfig) -> ParameterCount:
    """Of the Qwen3-MoE architecture. qkv and output projections, two norms, q/k norms, router; gate, up, down."""
    assert m.vocab_size is not None
    query, kv = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    return ParameterCount(
        vocabulary=m.vocab_size * m.hidden_size,
        num_vocabularies=1 if m.tie_embeddings else 2,
        attention=m.hidden_size * (query + 2 * kv) + query * m.hidden_size,
        replicated=2 * m.hidden_size + 2 * m.head_dim + m.hidden_size * m.num_experts,
        expert=3 * m.hidden_size * m.expert_ffn_size,
        final_norm=m.hidden_size,
    )


def sequence_cost(m: ModelConfig) -> Callable[[int], float]:
    """cost(L) = 2 L W + 4 L (L + 1) / 2 * num_layers * heads * head_dim: forward FLOPs of a sequence of L tokens.

    Matrix products only, two FLOPs a multiply-add. W are the weights that a token is multiplied with: attention's
    projections, the router and the chosen experts of every layer, and the vocabulary once, since looking an embedding
    up is free. In attention token t meets t keys, then t values. Every token is taken for one of the response: a prompt
    token in fact skips the vocabulary. The backward pass is twice as much of everything, so ratios hold for both.
    """
    n = count_parameters(m)
    router, query = m.hidden_size * m.num_experts, m.num_attention_heads * m.head_dim
    weights = n.vocabulary + m.num_layers * (n.attention + router + m.experts_per_token * n.expert)
    return lambda length: float(2 * length * weights + 2 * length * (length + 1) * m.num_layers * query)


def parameters_per_rank(m: ModelConfig, layout: Layout) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of the last pipeline stage, which no other rank exceeds."""
    assert m.vocab_size is not None
    n, layers = count_parameters(m), m.num_layers // layout.pp
    shard = -(-m.vocab_size // layout.tp) * m.hidden_size
    # The first and the last stage hold a vocabulary matrix each; one stage holds both.
    vocabularies = n.num_vocabularies if layout.pp == 1 else 1
    dense = vocabularies * shard + layers * (n.attention // layout.tp + n.replicated) + n.final_norm
    return dense, layers * (m.num_experts // layout.ep) * n.expert // layout.etp


def describe_plan(config: Config, layout: Layout, *, with_reference: bool) -> str:
    """The layout, parameters in all and on the fullest rank, and a memory estimate in GiB with its assumptions."""
    m, n = config.model, count_parameters(config.model)
    total, active = (n.total(m.num_layers, experts) for experts in (m.num_experts, m.experts_per_token))
    dense, experts = parameters_per_rank(m, layout)
    memory = _memory(config, layout, dense, experts, with_reference)
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
    return "\n".join(
        (
            f"layout: {layout.world_size} processes = {layout}",
            f"parameters: {total:,} in all, {active:,} active a token, {dense + experts:,} on the fullest rank "
            f"({dense:,} dense, {experts:,} expert)",
            f"memory estimate, GiB on the fullest rank: {parts}; in all {sum(memory.values()):.2f}",
            "  activations: one micro-batch of train.tokens_per_micro_batch per pipeline stage in flight; without "
            "fragmentation, communication buffers and what the device's driver takes (2 to 6 GiB on a GPU)",
        )
    )


def _memory(config: Config, layout: Layout, dense: int, experts: int, with_reference: bool) -> dict[str, float]:
    """GiB by purpose."""
    m, width = config.model, _BYTES[config.precision.dtype]
    grad = 4 if config.precision.dtype == "bf16" else width
    main = 12 if config.precision.dtype == "bf16" else 2 * width  # float32 main weights and two moments, or the moments
    sharded = config.optimizer.distributed and config.precision.dtype != "fp64"
    optimizer = main * (dense / layout.dp / layout.cp + experts / layout.edp) if sharded else main * (dense + experts)
    tokens = config.train.tokens_per_micro_batch / layout.tp / layout.cp
    layers = m.num_layers // layout.pp
    # Inputs of each matmul of a layer, kept for its backward: hidden x 4, attention x 4, experts x 3 per chosen expert.
    kept = (
        m.hidden_size
        if config.parallel.recompute == "full"
        else (
            4 * m.hidden_size
            + 4 * m.num_attention_heads * m.head_dim
            + m.experts_per_token * (m.hidden_size + 3 * m.expert_ffn_size)
        )
    )
    activations = tokens * kept * layers * layout.pp * width
    kv_heads = max(1, m.num_query_groups // layout.tp)
    rollouts = min(
        config.rollout.max_batch, -(-config.rollout.prompts_per_step * config.rollout.group_size // layout.dp)
    )
    cache = 2 * rollouts * m.max_sequence_length * kv_heads * m.head_dim * layers * width
    reference = (dense + experts) * width if with_reference else 0
    sizes = {
        "weights": (dense + experts) * width,
        "gradients": (dense + experts) * grad,
        "optimizer": optimizer,
        "reference": reference,
        "activations": activations,
        "KV cache at full length": cache,
    }
    return {name: size / _GIB for name, size in sizes.items() if size}
