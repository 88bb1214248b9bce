from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.objective import Segments
from tests.support.context_parts import in_parts

RAGGED = st.lists(st.integers(0, 6), max_size=8)


@pytest.mark.parametrize("lengths", [[3, 0, 1, 4], [0, 0, 2], [2, 0], [1], [0], []])
def test_sum_mean_spread_against_slices(lengths):
    segments = Segments.from_lengths(lengths)
    values_R = torch.arange(1.0, sum(lengths) + 1, dtype=torch.float64)
    parts = values_R.split(lengths) if lengths else ()
    assert segments.sum(values_R).tolist() == [float(part.sum()) for part in parts]
    assert segments.mean(values_R).tolist() == [float(part.sum()) / max(len(part), 1) for part in parts]
    number_S = torch.arange(len(lengths))
    assert segments.spread(number_S).tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert segments.num_sequences == sum(length > 0 for length in lengths)
    assert segments.num_tokens == sum(lengths)
    assert segments.share_R.sum().item() == pytest.approx(segments.num_sequences, rel=1e-14)


def test_from_a_tensor_of_lengths():
    segments = Segments.from_lengths(torch.tensor([2, 0, 1], dtype=torch.int32))
    assert segments.index_R.tolist() == [0, 0, 2]
    assert (segments.num_sequences, segments.num_tokens) == (2, 3)


def test_gradients():
    segments = Segments.from_lengths([3, 0, 1, 4])
    values_R = torch.randn(8, dtype=torch.float64, requires_grad=True)
    values_S = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(segments.sum, (values_R,))
    assert torch.autograd.gradcheck(segments.mean, (values_R,))
    assert torch.autograd.gradcheck(segments.spread, (values_S,))


def test_float32_sums_lose_nothing_forward_or_backward():
    segments = Segments.from_lengths([3])
    assert segments.sum(torch.tensor([1e8, 1.0, -1e8])).item() == 1.0
    # One after the other in float32, a hundred thousand times 0.1 is off in the fourth digit.
    segments = Segments.from_lengths([100_000])
    tenths_R = torch.full((100_000,), 0.1)
    assert segments.mean(tenths_R).item() == tenths_R[0].item()
    one_S = torch.ones(1, requires_grad=True)
    (segments.spread(one_S) * tenths_R).sum().backward()
    assert one_S.grad.item() == pytest.approx(1e4, rel=1e-7)


def test_an_empty_sequence_reaches_no_token():
    values_S = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    spread_R = Segments.from_lengths([1, 0, 2]).spread(values_S)
    assert spread_R.tolist() == [1.0, 2.0, 2.0]
    spread_R.sum().backward()
    assert values_S.grad.tolist() == [1.0, 0.0, 2.0]


@settings(max_examples=50, deadline=None)
@given(lengths=RAGGED)
def test_mean_undoes_spread(lengths):
    segments = Segments.from_lengths(lengths)
    values_S = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    expected_S = torch.where(segments.lengths_S > 0, values_S, 0)
    torch.testing.assert_close(segments.mean(segments.spread(values_S)), expected_S)


@settings(max_examples=50, deadline=None)
@given(lengths=RAGGED, size=st.integers(1, 4), data=st.data())
def test_ranks_that_share_the_tokens_see_whole_sequences(lengths, size, data):
    """Whichever tokens a rank holds, none included: sums and means of whole sequences, values and gradients."""
    owner_R = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=sum(lengths), max_size=sum(lengths))))
    whole = Segments.from_lengths(lengths)
    # Multiples of 1/8 add up without rounding, in any order.
    draw = torch.Generator().manual_seed(sum(lengths))
    values_R = (torch.randint(-80, 80, (whole.num_tokens,), generator=draw).double() / 8).requires_grad_()
    weight_S = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)

    def on_rank(rank, over_ranks):
        mine = (owner_R == rank).nonzero().flatten()
        part = Segments.from_lengths(lengths, index_R=whole.index_R[mine], over_ranks=over_ranks)
        sum_S, mean_S = part.sum(values_R[mine]), part.mean(values_R[mine])
        return mine, part, sum_S, mean_S, (part.spread(mean_S * weight_S) * values_R.detach()[mine]).sum()

    parts = in_parts(size, on_rank)
    for mine, part, sum_S, mean_S, _ in parts:
        assert torch.equal(part.lengths_S, whole.lengths_S)
        assert (part.num_sequences, part.num_tokens) == (whole.num_sequences, whole.num_tokens)
        assert torch.equal(part.share_R, whole.share_R[mine])
        assert torch.equal(sum_S, whole.sum(values_R)) and torch.equal(mean_S, whole.mean(values_R))
    total = sum(loss for *_, loss in parts)
    expected = (whole.spread(whole.mean(values_R) * weight_S) * values_R.detach()).sum()
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=1e-14)
    (found_R,), (expected_R,) = (torch.autograd.grad(loss, values_R) for loss in (total, expected))
    torch.testing.assert_close(found_R, expected_R, rtol=1e-14, atol=1e-14)


def test_partial_sums_are_rounded_when_all_ranks_have_added_up():
    """1e8 + 1 in float32 is 1e8."""

    def on_rank(rank, over_ranks):
        values_R = torch.tensor([[1e8, 1.0], [-1e8]][rank])
        segments = Segments.from_lengths([3], index_R=torch.tensor([[0, 0], [0]][rank]), over_ranks=over_ranks)
        return segments.sum(values_R)

    for sum_S in in_parts(2, on_rank):
        assert sum_S.dtype == torch.float32 and sum_S.tolist() == [1.0]
