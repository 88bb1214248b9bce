"""What a layout means for one GPU, from the settings alone: parameters and memory. Printed by --dry-run."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config import Config, Layout, ModelConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
_GIB = 2**30


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by how they are sharded. `dense` is one layer's attention, norms and router; `expert` one expert."""

    embedding: int
    head: int
    dense: int
    expert: int


def count_parameters(m: ModelConfig) -> ParameterCount:
    """Of the Qwen3-MoE architecture. qkv and output projections, two norms, q/k norms, router; gate, up, down."""
    assert m.vocab_size is not None
    query, kv = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    attention = m.hidden_size * (query + 2 * kv) + query * m.hidden_size
    norms = 2 * m.hidden_size + 2 * m.head_dim
    router = m.hidden_size * m.num_experts
    embedding = m.vocab_size * m.hidden_size
    head = 0 if m.tie_embeddings else embedding
    return ParameterCount(embedding, head + m.hidden_size, attention + norms + router, 3 * m.hidden_size * m.expert_ffn_size)


def describe_plan(config: Config, layout: Layout) -> str:
    """The layout, parameters in all and on the fullest rank, and a memory estimate in GiB with its assumptions."""
    m, n = config.model, count_parameters(config.model)
    total = n.embedding + n.head + m.num_layers * (n.dense + m.num_experts * n.expert)
    active = n.embedding + n.head + m.num_layers * (n.dense + m.experts_per_token * n.expert)
    layers = m.num_layers // layout.pp
    # The first and the last stage hold a vocabulary matrix each; with one stage, both.
    vocabulary = (n.embedding + n.head) if layout.pp == 1 else max(n.embedding, n.head)
    dense = vocabulary // layout.tp + layers * n.dense // layout.tp
    experts = layers * (m.num_experts // layout.ep) * n.expert // layout.etp
    memory = _memory(config, layout, dense, experts)
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
    return "\n".join(
        (
            f"layout: {layout.world_size} processes = {layout}",
            f"parameters: {total:,} in all, {active:,} active a token, {dense + experts:,} on the fullest rank "
            f"({dense:,} dense, {experts:,} expert)",
            f"memory estimate, GiB on the fullest rank: {parts}; in all {sum(memory.values()):.2f}",
            "  activations: one micro-batch of train.tokens_per_micro_batch per pipeline stage in flight; without fragmentation, "
            "communication buffers and the CUDA context (2 to 6 GiB)",
        )
    )


def _memory(config: Config, layout: Layout, dense: int, experts: int) -> dict[str, float]:
    m, width = config.model, _BYTES[config.precision.dtype]
    grad = 4 if config.precision.dtype == "bf16" else width
    main = 12 if config.precision.dtype == "bf16" else 2 * width  # float32 main weights and two moments, or the moments
    sharded = config.optimizer.distributed and config.precision.dtype != "fp64"
    optimizer = main * (dense / layout.dp / layout.cp + experts / layout.edp) if sharded else main * (dense + experts)
    tokens = config.train.tokens_per_micro_batch / layout.tp / layout.cp
    layers = m.num_layers // layout.pp
    # Inputs of each matmul of a layer, kept for its backward: hidden x 4, attention x 4, experts x 3 per chosen expert.
    kept = m.hidden_size if config.parallel.recompute == "full" else (
        4 * m.hidden_size
        + 4 * m.num_attention_heads * m.head_dim
        + m.experts_per_token * (m.hidden_size + 3 * m.expert_ffn_size)
    )
    activations = tokens * kept * layers * layout.pp * width
    kv_heads = max(1, m.num_query_groups // layout.tp)
    rollouts = min(config.rollout.max_batch, -(-config.rollout.prompts_per_step * config.rollout.group_size // layout.dp))
    cache = 2 * rollouts * m.max_sequence_length * kv_heads * m.head_dim * layers * width
    reference = (dense + experts) * width if (config.algorithm.kl_coef or 0) > 0 else 0
    sizes = {
        "weights": (dense + experts) * width,
        "gradients": (dense + experts) * grad,
        "optimizer": optimizer,
        "reference": reference,
        "activations": activations,
        "KV cache at full length": cache,
    }
    return {name: size / _GIB for name, size in sizes.items() if size}
