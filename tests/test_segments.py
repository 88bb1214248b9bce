from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.objective import Segments


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
@given(lengths=st.lists(st.integers(0, 6), max_size=8))
def test_mean_undoes_spread(lengths):
    segments = Segments.from_lengths(lengths)
    values_S = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    expected_S = torch.where(segments.lengths_S > 0, values_S, 0)
    torch.testing.assert_close(segments.mean(segments.spread(values_S)), expected_S)
