"""The experts of the local spec equal Megatron's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from gspo_megatron.mcore.experts import WholeExperts
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_model import build

H = 16


def both(dtype: str, counts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """(output, gradients of inputs and weights) of ours and of Megatron's, from the same module."""
    _, _, _, models = build(1, dtype=dtype)
    experts = models[0].decoder.layers[0].mlp.experts
    assert type(experts) is WholeExperts
    number_format = experts.local_experts[0].linear_fc1.weight.dtype
    draw = torch.Generator().manual_seed(3)
    x_TH, d_out_TH = (torch.randn(sum(counts), H, generator=draw).to(number_format) for _ in range(2))
    probs_T = torch.rand(sum(counts), generator=draw).to(torch.promote_types(number_format, torch.float32))
    results = []
    for forward in (WholeExperts.forward, SequentialMLP.forward):
        inputs = [x_TH.clone().requires_grad_(), probs_T.clone().requires_grad_()]
        out_TH, bias = forward(experts, inputs[0], torch.tensor(counts), inputs[1])
        assert bias is None and out_TH.dtype == number_format
        results.append([out_TH, *torch.autograd.grad(out_TH, [*inputs, *experts.parameters()], d_out_TH)])
    return results[0], results[1]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("counts", [[5, 1, 7, 3], [0, 9, 0, 2], [0, 0, 0, 0]])
def test_ours_are_megatrons(dtype: str, counts: list[int]) -> None:
    [(ours, megatrons)] = run_distributed(both, 1, dtype, counts)
    assert len(ours) == 3 + 8 and ours[0].shape == (sum(counts), H)
    for a, b in zip(ours, megatrons, strict=True):
        assert torch.equal(a, b)
    assert any(x.any() for x in ours[3:]) == any(counts)
