"""What several families share about sizes: counts, what parallel axes divide, rules, and the smallest models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil, lcm

from gspo_megatron.models.family import LayerCount, ParameterCount, Share, TokenCount
from gspo_megatron.models.rope import rope_complaints
from gspo_megatron.models.shape import ModelShape

# -------------------------------------------------------------------------------------------------------------- counts


def grouped_query_sizes(s: ModelShape) -> tuple[int, int]:
    """(elements of the projections to queries, keys and values and of that of the output, width of these three)."""
    queries, keys = s.num_attention_heads * s.head_dim, s.num_query_groups * s.head_dim
    return s.hidden_size * (2 * queries + 2 * keys), queries + 2 * keys


def parameter_count(s: ModelShape, *, sharded: int, replicated: int = 0) -> ParameterCount:
    """`sharded` and `replicated` parameters of attention in a layer. With them: two norms; a dense network, or router,
    shared expert and experts. A bias of the router that only its choice sees is no parameter: it has no gradient."""
    assert s.vocab_size is not None, "model.vocab_size must be set before parameters are counted"
    h, num_dense = s.hidden_size, s.num_dense_layers if s.num_experts else s.num_layers
    dense = LayerCount(sharded + 3 * h * s.dense_ffn_size, replicated + 2 * h)
    experts = LayerCount(
        sharded=sharded + 3 * h * s.shared_expert_ffn_size,
        replicated=replicated + 2 * h + h * s.num_experts,
        expert=3 * h * s.expert_ffn_size,
        num_experts=s.num_experts,
    )
    return ParameterCount(
        vocabulary=s.vocab_size * h,
        num_vocabularies=1 if s.tie_embeddings else 2,
        layers=(dense,) * num_dense + (experts,) * (s.num_layers - num_dense),
        final_norm=h,
    )


def token_count(s: ModelShape, n: LayerCount, *, added: int, window: int = 0) -> TokenCount:
    """Of a layer with grouped-query attention. Multiplied: all but the `added` parameters (norms, biases) and the
    experts that were not chosen. Cached: keys and values. Attention multiplies a token with keys, then with values."""
    chosen = s.experts_per_token if n.num_experts else 0
    return TokenCount(
        multiplied=n.sharded + n.replicated - added + chosen * n.expert,
        cached=2 * s.num_query_groups * s.head_dim,
        attended=2 * s.num_attention_heads * s.head_dim,
        window=window,
    )


def grouped_query_shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits query groups."""
    return (
        Share(s.num_attention_heads, "model.num_attention_heads", ("tp",)),
        Share(s.num_query_groups, "model.num_query_groups", ("tp",)),
        Share(s.num_query_groups * s.head_dim, "model.num_query_groups * model.head_dim", ("tp",), columns=True),
        Share(s.hidden_size, "model.hidden_size", columns=True),
    )


def network_shares(s: ModelShape) -> tuple[Share, ...]:
    """tp splits the dense and shared networks."""
    dense = s.dense_ffn_size * (s.num_dense_layers > 0 or not s.num_experts)
    return (
        Share(dense, "model.dense_ffn_size", ("tp",), columns=True),
        Share(s.shared_expert_ffn_size, "model.shared_expert_ffn_size", ("tp",), columns=True),
    )


def expert_shares(s: ModelShape) -> tuple[Share, ...]:
    """ep splits experts, etp columns of an expert."""
    return (
        Share(s.num_experts, "model.num_experts", ("ep",)),
        Share(s.expert_ffn_size, "model.expert_ffn_size", ("etp",), columns=True),
    )


# --------------------------------------------------------------------------------------------------------------- rules


def router_complaints(s: ModelShape) -> Iterator[str]:
    """Numbers of experts that do not fit together, and what to do."""
    if s.experts_per_token > s.num_experts:
        yield f"model.experts_per_token={s.experts_per_token} exceeds model.num_experts={s.num_experts}"
    if s.experts_per_token == 1 and s.num_experts > 1:
        yield (
            "model.experts_per_token=1 makes the router's normalised weight the constant 1, so it would learn "
            "nothing; use 2 or more"
        )


def grouped_query_complaints(s: ModelShape) -> Iterator[str]:
    """Heads that do not fit together, and what to do."""
    if s.num_attention_heads % s.num_query_groups:
        yield (
            f"model.num_attention_heads={s.num_attention_heads} must be a multiple of "
            f"model.num_query_groups={s.num_query_groups}"
        )
    yield from rope_complaints(s)


def sigmoid_router_complaints(s: ModelShape, family: str) -> Iterator[str]:
    """Dense layers, shared experts and groups that do not fit together, and what to do."""
    yield from router_complaints(s)
    if s.num_dense_layers > s.num_layers:
        yield f"model.num_dense_layers={s.num_dense_layers} exceeds model.num_layers={s.num_layers}"
    if (s.num_dense_layers > 0) != (s.dense_ffn_size > 0):
        yield (
            f"model.num_dense_layers={s.num_dense_layers} with model.dense_ffn_size={s.dense_ffn_size}: "
            "set both, or leave both at 0"
        )
    if s.shared_expert_ffn_size % s.expert_ffn_size or not s.shared_expert_ffn_size:
        yield (
            f"model.shared_expert_ffn_size={s.shared_expert_ffn_size} must be a positive multiple of "
            f"model.expert_ffn_size={s.expert_ffn_size}: {family} counts shared experts of that width"
        )
    groups, chosen, k = s.router_groups, s.router_groups_per_token, s.experts_per_token
    if s.num_experts % groups or s.num_experts < 2 * groups:
        yield (
            f"model.num_experts={s.num_experts} must be a multiple of model.router_groups={groups}, with at least 2 "
            "experts in each group"
        )
    elif chosen > groups or k > chosen * (s.num_experts // groups):
        yield (
            f"model.router_groups_per_token={chosen} of model.router_groups={groups} must be groups that there are, "
            f"and hold at least model.experts_per_token={k} experts"
        )
    elif chosen < groups and k // chosen != 2:
        # Megatron ranks a group by the sum of its experts_per_token // router_groups_per_token best experts.
        yield (
            f"model.experts_per_token={k} // model.router_groups_per_token={chosen} must be 2: {family} ranks a group "
            "by its 2 best experts, Megatron-Core by as many as this quotient; or set router_groups_per_token to "
            f"router_groups={groups}, which limits nothing"
        )


# ----------------------------------------------------------------------------------------------------- smallest models


def small_grouped_query(axes: Mapping[str, int]) -> dict[str, int]:
    """Two layers, or one per (virtual) stage; two heads per group; two groups, or one per tp rank."""
    groups, stages = max(2, axes["tp"]), axes["pp"] * axes["vpp"]
    return {
        "num_layers": stages if stages > 1 else 2,
        "hidden_size": 32,
        "num_attention_heads": 2 * groups,
        "num_query_groups": groups,
        "head_dim": 8,
    }


def small_experts(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """4 experts, rounded up to a multiple of ep."""
    experts = min(s.num_experts, axes["ep"] * ceil(4 / axes["ep"]))
    return {
        "num_experts": experts,
        "experts_per_token": min(s.experts_per_token, max(2, experts - 1)),
        "expert_ffn_size": 16 * axes["etp"],
    }


def small_sigmoid_router(s: ModelShape, axes: Mapping[str, int]) -> dict[str, int]:
    """The first layer dense; at least 3 experts in each of 4 groups, or 4 in one, rounded up to a multiple of ep."""
    grouped = s.router_groups_per_token < s.router_groups
    unit = lcm(axes["ep"], 4 if grouped else 1)
    experts = unit * ceil((12 if grouped else 4) / unit)
    return {
        "num_experts": experts,
        "experts_per_token": 4 if grouped else max(2, min(s.experts_per_token, experts - 1)),
        "expert_ffn_size": 16 * axes["etp"],
        "shared_expert_ffn_size": lcm(16 * axes["etp"], axes["tp"]),
        "num_dense_layers": min(1, s.num_dense_layers),
        "dense_ffn_size": 24 * axes["tp"] if s.num_dense_layers else 0,
        "router_groups": 4 if grouped else 1,
        "router_groups_per_token": 2 if grouped else 1,
    }
