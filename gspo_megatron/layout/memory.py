"""Parameters per rank and a memory estimate, from the settings alone (printed by --dry-run)."""

from __future__ import annotations

from gspo_megatron.config.sections import Config
from gspo_megatron.layout.layout import Layout
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.models.shape import ModelShape

_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
_GIB = 2**30


def parameters_per_rank(m: ModelShape, layout: Layout) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of the fullest pipeline stage."""
    return max((parameters_of_stage(m, layout, stage) for stage in range(layout.pp)), key=sum)


def parameters_of_stage(m: ModelShape, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of each rank of a pipeline stage."""
    assert m.vocab_size is not None
    n, layers = count_parameters(m), layout.stage_layers(m.num_layers)[stage]
    shard = -(-m.vocab_size // layout.tp) * m.hidden_size
    is_last = stage == layout.pp - 1
    # The first and the last stage hold a vocabulary matrix each; one stage holds both.
    vocabularies = n.num_vocabularies if layout.pp == 1 else int(stage == 0 or is_last)
    dense = vocabularies * shard + layers * (n.attention // layout.tp + n.replicated) + is_last * n.final_norm
    return dense, layers * (m.num_experts // layout.ep) * n.expert // layout.etp


def describe_plan(config: Config, layout: Layout, *, with_reference: bool) -> str:
    """The layout, parameters in total and on the fullest rank, and a memory estimate in GiB with its assumptions."""
    m = config.model.shape
    n = count_parameters(m)
    total, active = (n.total(m.num_layers, experts) for experts in (m.num_experts, m.experts_per_token))
    dense, experts = parameters_per_rank(m, layout)
    memory = _memory(config, layout, dense, experts, with_reference)
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items())
    return "\n".join(
        (
            f"layout: {layout.world_size} processes = {layout}",
            f"parameters: {total:,} in total, {active:,} active per token, {dense + experts:,} on the fullest rank "
            f"({dense:,} dense, {experts:,} expert)",
            f"memory estimate, GiB on the fullest rank: {parts}; total {sum(memory.values()):.2f}",
            "  activations: one micro-batch of train.tokens_per_micro_batch per pipeline stage in flight; excludes "
            "fragmentation, communication buffers and what the device's driver takes (2 to 6 GiB on a GPU)",
        )
    )


def _memory(config: Config, layout: Layout, dense: int, experts: int, with_reference: bool) -> dict[str, float]:
    """GiB by purpose."""
    m, width = config.model.shape, _BYTES[config.precision.dtype]
    token = family_of(m).per_token(m)
    grad = 4 if config.precision.dtype == "bf16" else width
    main = 12 if config.precision.dtype == "bf16" else 2 * width  # float32 main weights and two moments, or the moments
    sharded = config.optimizer.distributed and config.precision.dtype != "fp64"
    optimizer = main * (dense / layout.dp / layout.cp + experts / layout.edp) if sharded else main * (dense + experts)
    tokens = config.train.tokens_per_micro_batch / layout.tp / layout.cp
    layers = max(layout.stage_layers(m.num_layers))
    kept = m.hidden_size if config.parallel.recompute == "full" else token.kept
    activations = tokens * kept * layers * layout.pp * width
    rollouts = min(
        config.rollout.max_batch, -(-config.rollout.prompts_per_step * config.rollout.group_size // layout.dp)
    )
    cache = rollouts * m.max_sequence_length * (token.cached // layout.tp) * layers * width
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
