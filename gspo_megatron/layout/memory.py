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
    """(dense, expert) parameters of the pipeline rank with the most."""
    return max((stage_parameters(m, layout, stage) for stage in range(layout.pp)), key=sum)


def stage_parameters(m: ModelShape, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of pipeline stage `stage`."""
    assert m.vocab_size is not None
    n = count_parameters(m)
    layers = [n.layers[i] for i in layout.layers_of_stage(m.num_layers, stage)]
    shard = -(-m.vocab_size // layout.tp) * m.hidden_size
    is_first, is_last = stage == 0, stage == layout.pp - 1
    vocabularies = n.num_vocabularies if layout.pp == 1 else is_first + is_last
    dense = vocabularies * shard + sum(x.sharded // layout.tp + x.replicated for x in layers) + is_last * n.final_norm
    return dense, sum(x.num_experts // layout.ep * x.expert // layout.etp for x in layers)


def describe_plan(config: Config, layout: Layout, *, with_reference: bool) -> str:
    """The layout, parameters in total and on the fullest rank, and a memory estimate in GiB with its assumptions."""
    m = config.model.shape
    n = count_parameters(m)
    total, active = n.total, n.active(m.experts_per_token)
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
    tokens_by_layer = family_of(m).per_token(m)
    stages = [[tokens_by_layer[i] for i in layout.layers_of_stage(m.num_layers, stage)] for stage in range(layout.pp)]
    grad = 4 if config.precision.dtype == "bf16" else width
    main = 12 if config.precision.dtype == "bf16" else 2 * width  # float32 main weights and two moments, or the moments
    sharded = config.optimizer.distributed and config.precision.dtype != "fp64"
    optimizer = main * (dense / layout.dp / layout.cp + experts / layout.edp) if sharded else main * (dense + experts)
    tokens = config.train.tokens_per_micro_batch / layout.tp / layout.cp
    full = config.parallel.recompute == "full"
    kept = max(sum(m.hidden_size if full else token.kept for token in stage) for stage in stages)
    activations = tokens * kept * layout.pp * width
    rollouts = min(
        config.rollout.max_batch, -(-config.rollout.prompts_per_step * config.rollout.group_size // layout.dp)
    )
    cached = max(sum(token.cached // layout.tp + token.cached_whole for token in stage) for stage in stages)
    cache = rollouts * m.max_sequence_length * cached * width
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
