"""The experts of a layer in Megatron's local spec, one matmul after another.

Shapes: T tokens of this rank's experts, in the order of the experts; E experts of this rank; H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class WholeExperts(SequentialMLP):
    """y = W_down (p * silu(W_gate x) * W_up x) for the tokens of each expert, bit for bit as Megatron's.

    Where no expert is split over ranks (etp = 1), its tensor-parallel linear layers have nothing to communicate, but
    their autograd nodes and checks, four pairs per expert, take longer than the matmuls of a small model. Where hooks
    of these layers wait for an overlapped gather of weights (optimizer.overlap), they are called as Megatron does.
    """

    def forward(self, hidden_TH: Tensor, tokens_per_expert_E: Tensor, probs_T: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1 or self.local_experts[0].linear_fc1._forward_pre_hooks:
            return super().forward(hidden_TH, tokens_per_expert_E, probs_T)
        counts, out = tokens_per_expert_E.tolist(), []
        for expert, x, p in zip(self.local_experts, hidden_TH.split(counts), probs_T.split(counts), strict=True):
            # Experts without tokens are included: their weights get a gradient of zeros.
            gate, up = F.linear(x, expert.linear_fc1.weight).chunk(2, dim=-1)
            weighted = (F.silu(gate) * up * p[:, None]).to(x.dtype)  # the router's probabilities are float32 in bf16
            out.append(F.linear(weighted, expert.linear_fc2.weight))
        return torch.cat(out), None
