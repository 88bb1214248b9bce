"""The policy network on real Megatron-Core: its size, its weights on every layout, its number formats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.device import open_device
from gspo_megatron.layout.memory import parameters_per_rank, stage_parameters
from gspo_megatron.layout.refusal import layout_of
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.layers import LAYERS as LAYER_KINDS
from gspo_megatron.mcore.layers import RMSNorm
from gspo_megatron.mcore.model import build_model, transformer_config
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.mcore.parameters import is_vocabulary, named_parameters, padded_vocab_size
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

SETTINGS = (
    *SMALL,
    "model.num_layers=4",
    "model.max_sequence_length=32",
    "model.init_std=0.2",
)
LAYERS = 4
LENGTHS = [5, 1, 4]


def build(world_size: int, *overrides: str, dtype: str = "fp64") -> tuple[Any, Any, Any, Any]:
    """(config, device, groups, the chunks of the model) of this rank."""
    config = load_config(None, [*SETTINGS, f"precision.dtype={dtype}", *overrides])
    device = open_device("cpu", dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return config, device, groups, build_model(config, groups, device, use_te=False)


def hidden_states(model: Any) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    tokens = torch.arange(sum(LENGTHS)) % 13
    return model(tokens, packed(positions, torch.tensor([0, *LENGTHS]).cumsum(0), max(LENGTHS)))


# ------------------------------------------------------------------------------------------------------------ its size


def parameters_of(overrides: tuple[str, ...]) -> int:
    [model] = build(1, *overrides)[3]
    return sum(p.numel() for p in model.parameters())


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
    assert run_distributed(parameters_of, 1, overrides) == [count_parameters(m.shape).total]


def preset_layer(preset: str) -> tuple[Any, int]:
    config = load_config(None, [f"model.preset={preset}", "parallel.tp=4", "parallel.pp=2", "parallel.ep=8"])
    config = replaced(config, {"model.vocab_size": config.model.vocab_size or 97})
    device = open_device("cpu", "bf16")
    transformer = transformer_config(config, device, "local")
    transformer.pipeline_model_parallel_size = 1  # the spec would ask for this rank's stage
    return transformer.kv_channels, len(LAYER_KINDS["local"].spec(transformer, 0, None).layer_specs)


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
        assert count_parameters(config.model.shape).total == parameters


# --------------------------------------------------------------------------------------------------------- its weights


Slices = dict[Place, Tensor]


def slices(world_size: int, overrides: tuple[str, ...]) -> Slices:
    """This rank's weights by their places in the whole model."""
    config, _, groups, chunks = build(world_size, *overrides)
    found = {}
    for chunk in chunks:
        for place, p in named_parameters(chunk, config.model.shape, groups):
            # Megatron-Core marks how it has sliced a parameter: an opinion of its own on our table.
            sliced = getattr(p, "tensor_model_parallel", False) and place.count > 1
            assert sliced == (place.count > 1), place
            if sliced:
                assert (p.partition_dim, p.partition_stride) == (place.dim, place.stride), place
            found[place] = p.detach()
    return found


def whole(ranks: list[Slices]) -> dict[str, Tensor]:
    """The whole model's weights from the slices. Ranks that hold the same slice have to agree."""
    parts: Slices = {}
    for rank in ranks:
        for place, weight in rank.items():
            assert torch.equal(parts.setdefault(place, weight), weight), f"{place}: two ranks disagree"
    joined = {}
    for place in parts:
        joined[place.name] = place.join([parts[replace(place, index=i)] for i in range(place.count)])
    return joined


def sizes(rank: Slices) -> tuple[int, int]:
    """(dense, expert) parameters of a rank."""
    experts = sum(weight.numel() for place, weight in rank.items() if ".experts." in place.name)
    return sum(weight.numel() for weight in rank.values()) - experts, experts


def test_a_slice_of_gate_and_up_has_its_part_of_both() -> None:
    gate, up = torch.arange(8.0).view(4, 2), torch.arange(8.0, 16.0).view(4, 2)
    first, second = (Place("linear_fc1.weight", 0, 2, index, 2) for index in range(2))
    both = torch.cat([gate, up])
    assert torch.equal(second.cut(both), torch.cat([gate[2:], up[2:]]))
    assert torch.equal(first.join([first.cut(both), second.cut(both)]), both)
    columns = [Place("linear_proj.weight", 1, 1, index, 2) for index in range(2)]
    assert torch.equal(columns[1].cut(gate), gate[:, 1:])
    assert torch.equal(columns[0].join([place.cut(gate) for place in columns]), gate)


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    """The whole model's weights on one process."""
    return whole(run_distributed(slices, 1, 1, ()))


@pytest.mark.parametrize(
    "axes",
    [
        ("parallel.tp=2",),
        ("parallel.tp=2", "parallel.etp=2"),
        ("parallel.etp=2",),
        ("parallel.ep=2",),
        ("parallel.cp=2",),
        ("parallel.pp=2",),
        ("parallel.pp=2", "parallel.vpp=2"),
        ("parallel.pp=2", "parallel.first_stage_layers=1"),
        (),
    ],
)
def test_weights_do_not_depend_on_the_layout(axes: tuple[str, ...], one: dict[str, Tensor]) -> None:
    ranks = run_distributed(slices, 2, 2, axes)
    config = load_config(None, [*SETTINGS, *axes])
    layout = layout_of(config, 2)
    for rank, held in enumerate(ranks):
        assert sizes(held) == stage_parameters(config.model.shape, layout, rank * layout.pp // 2)
    assert parameters_per_rank(config.model.shape, layout) == max(map(sizes, ranks), key=sum)
    many = whole(ranks)
    assert many.keys() == one.keys() and len(one) == LAYERS * (4 + 4 * 2 + 3) + 1 + 2
    for name, weight in one.items():
        ours = many[name]
        if is_vocabulary(name):
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
    for place, weight in weights.items():
        name = place.name
        if weight.dim() < 2:
            assert weight.eq(1).all(), name
            continue
        adds = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        residual += adds
        std = 0.2 / math.sqrt(2 * LAYERS) if adds else 0.2
        # The spread of n draws is known to std / sqrt(2n); five times that.
        assert weight.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * weight.numel())), name
        assert not torch.equal(weight, other[place]), name
    assert residual == LAYERS * (1 + 4)


# ------------------------------------------------------------------------------------------------------ forward,
# backward


def forward_and_backward(dtype: str, overrides: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    [model] = build(1, *overrides, dtype=dtype)[3]
    hidden = hidden_states(model)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def exact() -> tuple[Tensor, dict[str, Tensor]]:
    return run_distributed(forward_and_backward, 1, "fp64", ())[0]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_gradient(recompute: str, exact: tuple[Tensor, dict[str, Tensor]]) -> None:
    hidden, gradient = exact
    [(again, recomputed)] = run_distributed(forward_and_backward, 1, "fp64", (f"parallel.recompute={recompute}",))
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
    [model] = build(1)[3]
    model.eval()
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
    [model] = build(1)[3]
    norm = RMSNorm(model.config, 16, eps=1e-3)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        return x, norm(x), norm.weight.detach(), norm.weight.sequence_parallel
