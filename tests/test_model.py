"""The policy network on real Megatron-Core: its size, its weights on every layout, its number formats."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from distributed import run_distributed
from small import SMALL
from torch import Tensor

from gspo_megatron.checks import check_config, layout_of
from gspo_megatron.config import load_config
from gspo_megatron.device import open_lane
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.attention import packed
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import (
    RMSNorm,
    build_model,
    layer_spec,
    named_global_parameters,
    padded_vocab_size,
    transformer_config,
)
from gspo_megatron.plan import count_parameters, parameters_per_rank

SETTINGS = (
    *SMALL,
    "model.max_sequence_length=32",
    "model.init_std=0.2",
)
LENGTHS = [5, 1, 4]


def build(world_size: int, *overrides: str, dtype: str = "fp64") -> tuple[Any, Any, Any, Any]:
    """(config, lane, groups, model) of this rank."""
    config = load_config(None, [*SETTINGS, f"precision.dtype={dtype}", *overrides])
    lane = open_lane("cpu", dtype)
    groups = Groups(check_config(config, world_size))
    compat.mend(on_cpu=True)
    return config, lane, groups, build_model(config, groups, lane, use_te=False)


def hidden_states(model: Any) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    tokens = torch.arange(sum(LENGTHS)) % 13
    return model(tokens, packed(positions, torch.tensor([0, *LENGTHS]).cumsum(0), max(LENGTHS)))


# ------------------------------------------------------------------------------------------------------------ its size


def parameters_of(overrides: tuple[str, ...]) -> int:
    return sum(p.numel() for p in build(1, *overrides)[3].parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.tie_embeddings=true",),
        ("model.num_layers=3", "model.num_query_groups=4", "model.head_dim=6", "model.num_experts=6"),
        ("model.num_attention_heads=2", "model.hidden_size=10", "model.expert_ffn_size=7", "model.vocab_size=101"),
    ],
)
def test_the_plan_counts_the_parameters_of_the_real_model(overrides: tuple[str, ...]) -> None:
    m = load_config(None, [*SETTINGS, *overrides]).model
    assert run_distributed(parameters_of, 1, overrides) == [count_parameters(m).total(m.num_layers, m.num_experts)]


def preset_layer(preset: str) -> tuple[Any, int]:
    config = load_config(None, [f"model.preset={preset}", "parallel.tp=4", "parallel.pp=2", "parallel.ep=8"])
    config.model.vocab_size = config.model.vocab_size or 97
    lane = open_lane("cpu", "bf16")
    transformer = transformer_config(config, lane, use_te=False)
    transformer.pipeline_model_parallel_size = 1  # the spec would ask for this rank's stage
    return transformer.kv_channels, len(layer_spec(transformer, use_te=False, pp_rank=0).layer_specs)


@pytest.mark.parametrize(
    ("preset", "parameters", "layers"),
    # The parameter counts that the model cards' weight files state.
    [("tiny_moe", None, 4), ("qwen3_30b_a3b", 30_532_122_624, 48), ("qwen3_235b_a22b", 235_093_634_560, 94)],
)
def test_presets(preset: str, parameters: int | None, layers: int) -> None:
    config = load_config(None, [f"model.preset={preset}"])
    [(head_dim, num_layers)] = run_distributed(preset_layer, 1, preset)
    assert (head_dim, num_layers) == (config.model.head_dim, layers)
    if parameters:
        assert count_parameters(config.model).total(layers, config.model.num_experts) == parameters


# --------------------------------------------------------------------------------------------------------- its weights


def slices(world_size: int, overrides: tuple[str, ...]) -> dict[str, tuple[int, int | None, int, Tensor]]:
    """name in the whole model -> (rank in its tensor-parallel group, split dimension or None, stride, this rank's
    slice)."""
    config, _, groups, model = build(world_size, *overrides)
    found = {}
    for name, p in named_global_parameters(model, config.model, groups):
        group = groups.collection.expt_tp if ".experts." in name else groups.tp
        split = getattr(p, "tensor_model_parallel", False) and group.size() > 1
        found[name] = (group.rank(), p.partition_dim if split else None, p.partition_stride if split else 1, p.detach())
    return found


def whole(ranks: list[dict[str, tuple[int, int | None, int, Tensor]]]) -> dict[str, Tensor]:
    """The whole model's weights from the slices. Ranks that hold the same slice have to agree."""
    by_name: dict[str, dict[int, tuple[int | None, int, Tensor]]] = defaultdict(dict)
    for rank in ranks:
        for name, (place, dim, stride, weight) in rank.items():
            place = 0 if dim is None else place
            if place in by_name[name]:
                assert torch.equal(by_name[name][place][2], weight), f"{name}: two ranks disagree"
            by_name[name][place] = (dim, stride, weight)
    joined = {}
    for name, parts in by_name.items():
        dim, stride, first = parts[0]
        if dim is None:
            joined[name] = first
            continue
        # With stride 2 (gate and up of an expert in one matrix) a rank holds its part of the first half, then of the
        # second.
        pieces = [parts[place][2].chunk(stride, dim) for place in sorted(parts)]
        joined[name] = torch.cat([piece[k] for k in range(stride) for piece in pieces], dim)
    return joined


def sizes(rank: dict[str, tuple[int, int | None, int, Tensor]]) -> tuple[int, int]:
    """(dense, expert) parameters of a rank."""
    experts = sum(weight.numel() for name, (*_, weight) in rank.items() if ".experts." in name)
    return sum(weight.numel() for *_, weight in rank.values()) - experts, experts


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    """The whole model's weights on one process."""
    return whole(run_distributed(slices, 1, 1, ()))


@pytest.mark.parametrize(
    "axes", [("parallel.tp=2",), ("parallel.tp=2", "parallel.etp=2"), ("parallel.ep=2",), ("parallel.pp=2",), ()]
)
def test_weights_do_not_depend_on_the_layout(axes: tuple[str, ...], one: dict[str, Tensor]) -> None:
    ranks = run_distributed(slices, 2, 2, axes)
    config = load_config(None, [*SETTINGS, *axes])
    assert sizes(ranks[-1]) == parameters_per_rank(config.model, layout_of(config, 2))
    assert sum(sizes(ranks[0])) <= sum(sizes(ranks[-1]))
    many = whole(ranks)
    assert many.keys() == one.keys() and len(one) == 2 * (4 + 4 * 2 + 3) + 1 + 2
    for name, weight in one.items():
        ours = many[name]
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert len(ours) == padded_vocab_size(13, 2 if "parallel.tp=2" in axes else 1)
            assert ours[13:].eq(0).all()
            ours = ours[:13]
        assert torch.equal(ours, weight), name


def test_weights_have_the_spread_that_was_asked_for() -> None:
    """init_std; divided by sqrt(2 layers) for what adds to the residual stream. Another seed gives other weights."""
    settings = ("model.hidden_size=64", "model.expert_ffn_size=48", "model.vocab_size=211")
    [weights] = run_distributed(slices, 1, 1, settings)
    [other] = run_distributed(slices, 1, 1, (*settings, "run.seed=2"))
    residual = 0
    for name, (_, _, _, weight) in weights.items():
        if weight.dim() < 2:
            assert weight.eq(1).all(), name
            continue
        adds = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        residual += adds
        std = 0.2 / math.sqrt(4) if adds else 0.2
        # The spread of n draws is known to std / sqrt(2n); five times that.
        assert weight.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * weight.numel())), name
        assert not torch.equal(weight, other[name][3]), name
    assert residual == 2 * (1 + 4)


# ------------------------------------------------------------------------------------------------------ forward,
# backward


def forward_and_backward(dtype: str, overrides: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(1, *overrides, dtype=dtype)[3]
    hidden = hidden_states(model)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def exact() -> tuple[Tensor, dict[str, Tensor]]:
    return run_distributed(forward_and_backward, 1, "fp64", ())[0]


def test_recompute_gives_the_same_gradient(exact: tuple[Tensor, dict[str, Tensor]]) -> None:
    hidden, gradient = exact
    [(again, recomputed)] = run_distributed(forward_and_backward, 1, "fp64", ("parallel.recompute=full",))
    assert gradient.keys() == recomputed.keys() and len(gradient) > 20
    torch.testing.assert_close(again, hidden, rtol=0, atol=0)
    for name in gradient:
        torch.testing.assert_close(recomputed[name], gradient[name], rtol=1e-13, atol=1e-13)


def test_number_formats(exact: tuple[Tensor, dict[str, Tensor]]) -> None:
    """All formats compute the same function, each to its own precision, and keep it in hidden states and gradients."""
    right, right_gradient = exact
    assert right.shape == (sum(LENGTHS), 1, 16)
    for dtype, kind, tolerance in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.1)):
        [(hidden, gradient)] = run_distributed(forward_and_backward, 1, dtype, ())
        assert hidden.dtype == kind and all(g.dtype == kind for g in gradient.values())
        assert (hidden.double() - right).norm() < tolerance * right.norm()
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        assert (gradient[name].double() - right_gradient[name]).norm() < 3 * tolerance * right_gradient[name].norm()


def test_sequences_of_a_pack_do_not_see_one_another() -> None:
    [(together, apart)] = run_distributed(packed_and_alone, 1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def packed_and_alone() -> tuple[Tensor, Tensor]:
    model = build(1)[3].eval()
    with torch.no_grad():
        together, start, alone = hidden_states(model), 0, []
        for n in LENGTHS:
            tokens = torch.arange(start, start + n) % 13
            alone.append(model(tokens, packed(torch.arange(n), torch.tensor([0, n]), n)))
            start += n
    return together, torch.cat(alone)


def test_rms_norm() -> None:
    """x / sqrt(mean(x^2) + eps) * weight."""
    [(x, out, weight, marked)] = run_distributed(normed, 1)
    torch.testing.assert_close(out, x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight, rtol=0, atol=1e-14)
    assert marked is False


def normed() -> tuple[Tensor, Tensor, Tensor, bool]:
    model = build(1)[3]
    norm = RMSNorm(model.config, 16, eps=1e-3)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        return x, norm(x), norm.weight.detach(), norm.weight.sequence_parallel
