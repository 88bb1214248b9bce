"""Attention over packed tokens and over the cache, in float64, against a loop over sequences, heads and positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.data.packing import zigzag
from gspo_megatron.device import open_device
from gspo_megatron.mcore.attention import PackedAttention, Rotary, rotate
from gspo_megatron.mcore.kv_cache import KVCache
from gspo_megatron.mcore.packed_tokens import CachedPrompt, PackedTokens, cached_tokens, packed
from gspo_megatron.models.rope import Rope
from gspo_megatron.testing.local_ranks import run_distributed

D = 6
BASE = 100.0
NUM_POSITIONS = 32
EXACT = {"rtol": 0.0, "atol": 1e-12}
CPU = torch.device("cpu")


def turned(x_LHD: Tensor) -> Tensor:
    """The pair (i, i + D/2) as a complex number, times e^(i p base^(-2i/D)), for positions p = 0, 1, ... L - 1."""
    half = x_LHD.size(-1) // 2
    frequency = torch.tensor([BASE ** (-2 * i / x_LHD.size(-1)) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(len(x_LHD), dtype=torch.float64)[:, None, None] * frequency
    z = torch.complex(x_LHD[..., :half], x_LHD[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def attention_of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence, [L, heads, D] each: softmax(q k^T / sqrt(D)) v, a head and a query at a time."""
    query, key = turned(query), turned(key)
    queries_per_key = query.size(1) // key.size(1)
    out = []
    for p in range(len(query)):
        for head in range(query.size(1)):
            keys, values = key[: p + 1, head // queries_per_key], value[: p + 1, head // queries_per_key]
            out.append(torch.softmax(keys @ query[p, head] / query.size(2) ** 0.5, dim=0) @ values)
    return torch.cat(out).view(len(query), -1)


def layer() -> PackedAttention:
    return PackedAttention(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), layer_number=1)


def rope(dim: int, base: float) -> Rope:
    return Rope(base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))


def rotary() -> Rotary:
    return Rotary(rope(D, BASE), NUM_POSITIONS, CPU, torch.float64)


def pack(lengths: list[int]) -> PackedTokens:
    positions = torch.cat([torch.arange(n) for n in lengths])
    tokens = packed(positions, torch.tensor([0, *lengths]).cumsum(0), max(lengths))
    rotary().prepare(tokens)
    return tokens


def through(
    cache: KVCache, positions: list[int], prompts: list[tuple[int, list[int]]], *, first_row: int = 0, padding: int = 0
) -> PackedTokens:
    num_tokens = len(positions) + sum(length for length, _ in prompts) + padding
    cached = [CachedPrompt(length, rows) for length, rows in prompts]
    tokens = cached_tokens(first_row, np.array(positions, dtype=np.int64), cached, num_tokens).packed(cache)
    rotary().prepare(tokens)
    return tokens


def random_qkv(num_tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
    shapes = [(num_tokens, n, D) for n in (heads, kv_heads, kv_heads)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(shapes)
    ]


def test_rotation_is_a_complex_product() -> None:
    x = random_qkv(20, 3, 1)[0]
    torch.testing.assert_close(rotate(x, pack([20])), turned(x), **EXACT)


def test_angles_are_right_to_the_last_bit_far_from_the_origin() -> None:
    """Angles made in float32 would be off by 2e-3 at position 32,767."""
    float32 = Rotary(rope(128, 1e6), 32_768, CPU, torch.bfloat16)
    angles = 32_767 * 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert float32.cos.dtype == torch.float32
    torch.testing.assert_close(float32.cos[-1, :64].double(), angles.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(float32.sin[-1, 64:].double(), angles.sin(), rtol=0, atol=6e-8)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [[5, 1, 7, 2], [1], [1, 1, 1], [9]])
@pytest.mark.parametrize("padding", [0, 3])
def test_packed_is_a_loop_over_sequences(heads: int, kv_heads: int, lengths: list[int], padding: int) -> None:
    """Values and gradients. Padding is a segment of its own, which nobody reads."""
    segments = lengths + [padding] * (padding > 0)
    inputs = [x.requires_grad_() for x in random_qkv(sum(segments), heads, kv_heads)]
    out = layer()(*inputs, packed_seq_params=pack(segments))[: sum(lengths)]
    parts = zip(*(x[: sum(lengths)].split(lengths) for x in inputs), strict=True)
    expected = torch.cat([attention_of(q, k, v) for q, k, v in parts])
    torch.testing.assert_close(out, expected, **EXACT)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def part_of_attention(lengths: list[int], heads: int, kv_heads: int, upstream: Tensor) -> list[Tensor]:
    """This rank's part of the output, and of the gradients of query, key and value."""
    open_device("cpu", "fp64")
    group = dist.group.WORLD
    held = zigzag(lengths, dist.get_rank(), dist.get_world_size())
    positions = torch.cat([torch.arange(n) for n in lengths])[held]
    tokens = packed(positions, torch.tensor([0, *lengths]).cumsum(0), max(lengths), group)
    rotary().prepare(tokens)
    inputs = [x[held].requires_grad_() for x in random_qkv(sum(lengths), heads, kv_heads)]
    out = layer()(*inputs, packed_seq_params=tokens)
    return [held, out.detach(), *torch.autograd.grad(out, inputs, upstream[held])]


@pytest.mark.parametrize(("size", "lengths"), [(2, [8, 4, 12]), (3, [6, 18]), (4, [8, 8, 32, 16])])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_the_parts_of_context_parallel_make_the_whole(size: int, lengths: list[int], heads: int, kv_heads: int) -> None:
    """Values and gradients, each rank with two chunks of every sequence."""
    inputs = [x.requires_grad_() for x in random_qkv(sum(lengths), heads, kv_heads)]
    expected = torch.cat([attention_of(*qkv) for qkv in zip(*(x.split(lengths) for x in inputs), strict=True)])
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    ranks = run_distributed(part_of_attention, size, lengths, heads, kv_heads, upstream)
    assert torch.cat([held for held, *_ in ranks]).sort().values.tolist() == list(range(sum(lengths)))
    for held, out, *gradients in ranks:
        torch.testing.assert_close(out, expected.detach()[held], **EXACT)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs[held], **EXACT)


def test_forwards_through_the_cache_are_whole_sequences() -> None:
    """Four sequences in three rows. "a" and "b" begin with one prompt, which fills both their rows; "d" enters beside
    the newest tokens of the others, when "a" has ended and "c" has moved into its row. Every token's output is that of
    attention over its whole sequence, whatever the forward is padded with."""
    heads, kv_heads, attention, cache = 4, 2, layer(), KVCache(3, 9)
    lengths = {"a": 5, "b": 9, "c": 7, "d": 5}
    drawn = iter(zip(*(x.split(9) for x in random_qkv(45, heads, kv_heads)), strict=True))
    qkv = {name: [x[:length] for x in next(drawn)] for name, length in lengths.items()}
    for ours, theirs in zip(qkv["b"], qkv["a"], strict=True):
        ours[:3] = theirs[:3]
    expected = {name: attention_of(*x) for name, x in qkv.items()}
    padding = next(drawn)
    at = dict.fromkeys(lengths, 0)

    def forward(
        going_on: list[str], *entering: tuple[str, int, list[int]], first_row: int = 0, num_padding: int = 2
    ) -> None:
        """One token of each of `going_on`, and the prompt of each (sequence, length of its prompt, rows)."""
        pieces = [(name, slice(at[name], at[name] + 1)) for name in going_on]
        pieces += [(name, slice(0, length)) for name, length, _ in entering]
        inputs = [
            torch.cat([*(qkv[name][i][piece] for name, piece in pieces), padding[i][:num_padding]]) for i in range(3)
        ]
        prompts = [(length, rows) for _, length, rows in entering]
        tokens = through(cache, [at[n] for n in going_on], prompts, first_row=first_row, padding=num_padding)
        out = attention(*inputs, packed_seq_params=tokens)
        assert len(out) == len(inputs[0]) and out[len(out) - num_padding :].eq(0).all()
        for name, piece in pieces:
            own, out = out.split([piece.stop - piece.start, len(out) - piece.stop + piece.start])
            torch.testing.assert_close(own, expected[name][piece], **EXACT)
            at[name] = piece.stop

    forward([], ("a", 3, [0, 1]), ("c", 1, [2]))
    at["b"] = 3
    forward(["a", "b", "c"], num_padding=0)
    forward(["a"], num_padding=1)
    forward(["b", "c"], first_row=1)
    cache.copy_rows(torch.tensor([2]), torch.tensor([0]), at["c"])
    forward(["c", "b"], ("d", 2, [2]))
    while at["d"] < lengths["d"]:
        forward(["c", "b", "d"])
    assert at == lengths


def test_padding_touches_no_row() -> None:
    query, key, value = random_qkv(6, 2, 1)
    outs, caches = [], []
    for padding in (0, 3):
        cache, n = KVCache(3, 4), 1 + padding
        tokens = through(cache, [0], [], first_row=1, padding=padding)
        outs.append(layer()(query[:n], key[:n], value[:n], packed_seq_params=tokens)[0])
        caches.append(cache.layer(1, (key, key)))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert ours[1].ne(0).any() and ours[0].eq(0).all() and ours[2].eq(0).all()


def test_layers_have_caches_of_their_own() -> None:
    cache = KVCache(1, 4)
    like = torch.zeros(3, 2, D, dtype=torch.bfloat16)
    keys, values = cache.layer(1, (like, like))
    assert keys.shape == values.shape == (1, 2, 4, D) and keys.dtype == torch.bfloat16
    assert cache.layer(1, (like, like))[0] is keys and cache.layer(2, (like, like))[0] is not keys
