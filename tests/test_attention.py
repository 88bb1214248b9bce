"""Attention over packed tokens and over the cache, in float64, against a loop over sequences, heads and positions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from local_ranks import run_distributed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gspo_megatron.data.packing import zigzag
from gspo_megatron.device import open_lane
from gspo_megatron.mcore.attention import (
    KVCache,
    PackedAttention,
    PackedTokens,
    Rotary,
    decoding,
    packed,
    prompts_into_cache,
    rotate,
)

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


def rotary() -> Rotary:
    return Rotary(D, BASE, NUM_POSITIONS, CPU, torch.float64)


def pack(lengths: list[int]) -> PackedTokens:
    positions = torch.cat([torch.arange(n) for n in lengths])
    tokens = packed(positions, torch.tensor([0, *lengths]).cumsum(0), max(lengths))
    rotary().prepare(tokens)
    return tokens


def step(positions: list[int], rows: list[int], cache: KVCache) -> PackedTokens:
    tokens = decoding(torch.tensor(positions), torch.tensor(rows), cache)
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
    float32 = Rotary(128, 1e6, 32_768, CPU, torch.bfloat16)
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
    open_lane("cpu", "fp64")
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


def test_decoding_from_the_cache_is_the_whole_sequence() -> None:
    """Two prompts of 3 and 1 tokens go to rows [0, 2] and [1]; each row continues with tokens of its own, and rows
    end at different times. Every token's output is that of attention over the row's whole sequence."""
    heads, kv_heads, prompts, rows_of_prompt, final = 4, 2, [3, 1], [[0, 2], [1]], [6, 4, 8]
    prompt_of_row = [0, 1, 0]
    whole = [random_qkv(20, heads, kv_heads)]
    prompt_parts = list(zip(*(x[:4].split(prompts) for x in whole[0]), strict=True))
    rows = []
    for row, length in enumerate(final):
        start = prompt_parts[prompt_of_row[row]]
        own = random_qkv(40, heads, kv_heads)
        rows.append([torch.cat([s, x[10 * row : 10 * row + length - len(s)]]) for s, x in zip(start, own, strict=True)])
    expected = [attention_of(*qkv) for qkv in rows]

    cache, attention, padding = KVCache(3, 8), layer(), 2
    tokens = pack([*prompts, padding])
    prompts_into_cache(prompts, rows_of_prompt, cache, tokens)
    with_padding = [torch.cat([x[:4], x[18:]]) for x in whole[0]]
    prefill = attention(*with_padding, packed_seq_params=tokens)[:4].split(prompts)
    for row in range(3):
        length = prompts[prompt_of_row[row]]
        torch.testing.assert_close(prefill[prompt_of_row[row]], expected[row][:length], **EXACT)
    at = [prompts[p] for p in prompt_of_row]
    while active := [row for row in range(3) if at[row] < final[row]]:
        new = [torch.stack([rows[row][i][at[row]] for row in active]) for i in range(3)]
        out = attention(*new, packed_seq_params=step([at[row] for row in active], active, cache))
        for row, value in zip(active, out, strict=True):
            torch.testing.assert_close(value, expected[row][at[row]], **EXACT)
            at[row] += 1


def test_padding_of_a_decoding_step_touches_no_row() -> None:
    heads, kv_heads = 2, 1
    query, key, value = random_qkv(6, heads, kv_heads)
    outs, caches = [], []
    for padding in (0, 3):
        cache = KVCache(2, 4)
        rows, positions = [1, *[cache.scratch_row] * padding], [0] * (1 + padding)
        n = len(rows)
        tokens = step(positions, rows, cache)
        outs.append(layer()(query[:n], key[:n], value[:n], packed_seq_params=tokens)[0])
        caches.append([x[:2].clone() for x in cache.layer(1, key)])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=0)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert caches[0][1][0].eq(0).all() and caches[0][1][1].ne(0).any()


def test_layers_have_caches_of_their_own() -> None:
    cache = KVCache(1, 4)
    like = torch.zeros(3, 2, D, dtype=torch.bfloat16)
    keys, values = cache.layer(1, like)
    assert keys.shape == values.shape == (2, 2, 4, D) and keys.dtype == torch.bfloat16
    assert cache.layer(1, like)[0] is keys and cache.layer(2, like)[0] is not keys
