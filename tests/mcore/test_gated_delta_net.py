"""The gated delta rule against its equation, token by token, and the states that a sampler keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspo_megatron.mcore.delta_rule import delta_rule_step, gated_delta_rule
from gspo_megatron.mcore.kv_cache import KVCache

ROWS, HEADS, KEY, VALUE = 2, 3, 5, 4


def inputs(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries, keys, values, log decays between nothing and almost all forgotten, and rates."""
    draw = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(ROWS, HEADS, length, *size, generator=draw, dtype=torch.float64)

    tensors = normal(KEY), normal(KEY), normal(VALUE), -normal().exp() * 3, normal().sigmoid()
    return tuple(x.to(dtype).requires_grad_() for x in tensors)


def by_the_equation(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(D), head by head."""
    out, states = torch.empty_like(value), torch.empty(ROWS, HEADS, KEY, VALUE, dtype=value.dtype)
    for row in range(ROWS):
        for head in range(HEADS):
            state = torch.zeros(KEY, VALUE, dtype=value.dtype)
            for t in range(query.size(2)):
                q, k = (x[row, head, t] / (x[row, head, t] @ x[row, head, t] + 1e-6).sqrt() for x in (query, key))
                a, b, v = log_decay[row, head, t].exp(), rate[row, head, t], value[row, head, t]
                state = a * (torch.eye(KEY, dtype=a.dtype) - b * torch.outer(k, k)) @ state + b * torch.outer(k, v)
                out[row, head, t] = state.T @ q / KEY**0.5
            states[row, head] = state
    return out, states


@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 64), (8, 4), (11, 4), (9, 1)])
def test_chunks_and_steps_are_the_equation(length: int, chunk: int) -> None:
    """And so is the gradient of chunks."""
    expected_in, chunked_in = inputs(length), inputs(length)
    out, state = by_the_equation(*expected_in)
    found, last = gated_delta_rule(*chunked_in, chunk=chunk)
    torch.testing.assert_close(found, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)
    weights = torch.randn(out.shape, dtype=torch.float64)
    for result, final in ((out, state), (found, last)):
        ((result * weights).sum() + final.square().sum()).backward()
    for theirs, ours in zip(expected_in, chunked_in, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11)

    half = length // 2
    _, state = gated_delta_rule(*(x[:, :, :half] for x in expected_in), chunk=chunk) if half else (None, 0 * state)
    for t in range(half, length):
        step, state = delta_rule_step(*(x[:, :, t] for x in expected_in), state)
        torch.testing.assert_close(step, out[:, :, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_what_pads_a_row_changes_no_state() -> None:
    """Zeros behind a sequence: a decay of exp(0) and a rate of 0, whatever keys the convolution leaves there."""
    whole = inputs(9)
    padded = [x.detach().clone() for x in whole]
    padded[0][:, :, 6:], padded[1][:, :, 6:] = 3.0, 2.0
    for x in padded[2:]:
        x[:, :, 6:] = 0
    _, expected = gated_delta_rule(*(x[:, :, :6] for x in whole), chunk=4)
    torch.testing.assert_close(gated_delta_rule(*padded, chunk=4)[1], expected, rtol=0, atol=1e-13)


def test_bf16_is_computed_in_float32() -> None:
    """Also where almost all is forgotten at every token: no exponential of a positive number overflows."""
    narrow = inputs(100, torch.bfloat16)
    out, state = gated_delta_rule(*narrow[:3], 40 * narrow[3], narrow[4])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = gated_delta_rule(*(x.double() for x in narrow[:3]), 40 * narrow[3].double(), narrow[4].double())
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=1e-3)


def test_states_move_with_their_rows() -> None:
    cache = KVCache(num_rows=4, num_positions=8)
    like = torch.empty(3, 2), torch.empty(5, dtype=torch.float64)
    states, more = cache.states(7, *like)
    assert states.shape == (4, 3, 2) and more.dtype == torch.float64
    states += torch.arange(4.0)[:, None, None]
    cache.copy_rows(torch.tensor([3, 2]), torch.tensor([0, 1]), length=1)
    assert cache.states(7, *like)[0] is states
    assert states[:, 0, 0].tolist() == [3, 2, 2, 3]
