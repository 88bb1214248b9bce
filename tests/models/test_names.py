"""Name rules and their operations, without a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.checkpoint.place import Place
from gspo_megatron.models.names import (
    QKV,
    Copy,
    GatedQKV,
    GateUp,
    InMemory,
    KeyHeadChannels,
    NameRule,
    Op,
    find_rule,
    to_theirs,
)
from gspo_megatron.models.shape import ModelShape

SHAPE = ModelShape(
    family="qwen3_moe",
    num_layers=2,
    hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=2,
    num_experts=2,
    experts_per_token=2,
    expert_ffn_size=5,
    vocab_size=7,
    max_sequence_length=16,
    rope_base=1e4,
    norm_epsilon=1e-6,
    tie_embeddings=False,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=2,
    linear_value_head_dim=3,
)
SIZES = st.integers(1, 4)


def counted(*size: int) -> Tensor:
    return torch.arange(torch.Size(size).numel()).view(size)


@given(groups=SIZES, queries=SIZES, d=SIZES, columns=st.lists(SIZES, max_size=1))
def test_qkv_there_and_back(groups: int, queries: int, d: int, columns: list[int]) -> None:
    shape = replace(SHAPE, num_query_groups=groups, num_attention_heads=groups * queries, head_dim=d)
    ours = counted(groups * (queries + 2) * d, *columns)
    q, k, v = QKV().to_theirs(ours, shape)
    assert [len(q), len(k), len(v)] == [groups * queries * d, groups * d, groups * d]
    assert torch.equal(QKV().to_ours((q, k, v), shape), ours)
    again = QKV().to_theirs(QKV().to_ours((q, k, v), shape), shape)
    assert all(torch.equal(one, other) for one, other in zip((q, k, v), again, strict=True))


@given(groups=SIZES, queries=SIZES, d=SIZES)
def test_gated_qkv_there_and_back(groups: int, queries: int, d: int) -> None:
    shape = replace(SHAPE, num_query_groups=groups, num_attention_heads=groups * queries, head_dim=d)
    ours = counted(groups * (2 * queries + 2) * d, 3)
    q, k, v = GatedQKV().to_theirs(ours, shape)
    assert [len(q), len(k), len(v)] == [2 * groups * queries * d, groups * d, groups * d]
    assert torch.equal(GatedQKV().to_ours((q, k, v), shape), ours)


@given(keys=SIZES, values=SIZES, d=SIZES, value_dim=SIZES)
def test_channels_of_key_heads_there_and_back(keys: int, values: int, d: int, value_dim: int) -> None:
    shape = replace(
        SHAPE,
        linear_num_key_heads=keys,
        linear_num_value_heads=keys * values,
        linear_key_head_dim=d,
        linear_value_head_dim=value_dim,
    )
    ours = counted(keys * (2 * d + values * value_dim), 1, 3)
    [theirs] = KeyHeadChannels().to_theirs(ours, shape)
    assert torch.equal(KeyHeadChannels().to_ours([theirs], shape), ours)
    of_first_key = ours.view(keys, -1, 3)[:, d : 2 * d].flatten(0, 1)  # all keys are below all queries
    assert torch.equal(theirs[keys * d : 2 * keys * d, 0], of_first_key)


def test_each_query_group_has_its_queries_then_their_gates() -> None:
    """Two groups of two queries, heads of two rows: rows 0..11 are of the first group, 4..7 their gates."""
    q, k, v = GatedQKV().to_theirs(torch.arange(24), SHAPE)
    assert q.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 12, 13, 16, 17, 14, 15, 18, 19]
    assert k.tolist() == [8, 9, 20, 21] and v.tolist() == [10, 11, 22, 23]


@pytest.mark.parametrize("op", [Copy(), GateUp()], ids=lambda op: type(op).__name__)
@given(half=SIZES, columns=st.lists(SIZES, max_size=1))
def test_copy_and_gate_up_there_and_back(op: Op, half: int, columns: list[int]) -> None:
    ours = counted(2 * half, *columns)
    theirs = op.to_theirs(ours, SHAPE)
    assert torch.equal(op.to_ours(theirs, SHAPE), ours)
    again = op.to_theirs(op.to_ours(theirs, SHAPE), SHAPE)
    assert all(torch.equal(one, other) for one, other in zip(theirs, again, strict=True))


@pytest.mark.parametrize(
    ("op", "sizes", "dim", "stride"),
    [
        (QKV(), ((8, 3), (4, 3), (4, 3)), 0, 1),
        (QKV(), ((8,), (4,), (4,)), 0, 1),
        (GatedQKV(), ((16, 3), (4, 3), (4, 3)), 0, 1),
        (KeyHeadChannels(), ((20, 1, 3),), 0, 1),
        (GateUp(), ((6, 4), (6, 4)), 0, 2),
        (Copy(), ((4, 6),), 0, 1),
        (Copy(), ((4, 6),), 1, 1),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_slice_of_theirs_is_a_slice_of_ours(
    op: Op, sizes: tuple[tuple[int, ...], ...], dim: int, stride: int, count: int
) -> None:
    """Read part by part, without the rest of the tensor."""
    start, theirs = itertools.count(step=1000), []
    for size in sizes:
        theirs.append(counted(*size) + next(start))
    whole = op.to_ours(theirs, SHAPE)
    for index in range(count):
        parts = [InMemory(x) for x in theirs]
        found = op.to_our_slice(parts, SHAPE, dim=dim, index=index, count=count)
        assert torch.equal(found, Place("x", dim, stride, index, count).cut(whole))


def test_each_query_group_has_its_queries_then_its_key_and_value() -> None:
    """Two groups of two queries, heads of two rows: rows 0..7 are of the first group."""
    q, k, v = QKV().to_theirs(torch.arange(16), SHAPE)
    assert q.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.tolist() == [4, 5, 12, 13] and v.tolist() == [6, 7, 14, 15]


def test_gate_is_above_up() -> None:
    gate, up = GateUp().to_theirs(counted(4, 3), SHAPE)
    assert torch.equal(gate, counted(4, 3)[:2]) and torch.equal(up, counted(4, 3)[2:])


def size_of_none(shape: ModelShape) -> tuple[int, ...]:
    raise AssertionError("names alone are asked for")


GATE_UP = ("x.{layer}.{expert}.gate", "x.{layer}.{expert}.up")
RULES = (
    NameRule("a.{layer}.b.{expert}.w", GATE_UP, GateUp(), size=size_of_none),
    NameRule("a.{layer}.b.w", ("x.{layer}.w",), size=size_of_none),
    NameRule("a.{layer}.b.0.w", ("second",), size=size_of_none),
)


def test_a_rule_carries_layer_and_expert_over() -> None:
    assert find_rule(RULES[:2], "a.12.b.3.w") == (RULES[0], ("x.12.3.gate", "x.12.3.up"))
    assert find_rule(RULES, "a.12.b.w") == (RULES[1], ("x.12.w",))
    named = to_theirs(RULES, [("a.0.b.1.w", counted(4, 1))], SHAPE)
    assert [(name, part.flatten().tolist()) for name, part in named] == [("x.0.1.gate", [0, 1]), ("x.0.1.up", [2, 3])]


@pytest.mark.parametrize(("name", "count"), [("a.0.b.0.w", 2), ("a.x.b.w", 0), ("a.0.b.w.more", 0), ("aX0.b.w", 0)])
def test_a_tensor_has_exactly_one_rule(name: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} name rules match '{name}', not one"):
        find_rule(RULES, name)
