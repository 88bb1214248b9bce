"""The experts of a layer in Megatron's local spec, one matmul after another.

Shapes: T tokens of this rank's experts, in the order of the experts; E experts of this rank; H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class WholeExperts(SequentialMLP):
    """y = W_down (p * f(gate) * (up + offset)) + p * b_down, [gate, up] = W x + b, for the tokens of each expert, bit
    for bit as Megatron's, whose own cannot be trained with biases. f, the offset and a clamp are the config's.

    Where no expert is split over ranks (etp = 1), its tensor-parallel linear layers have nothing to communicate, but
    their autograd nodes and checks, four pairs per expert, take longer than the matmuls of a small model. Hooks of
    these layers, which wait for an overlapped gather of weights (optimizer.overlap), are called all the same.
    """

    def forward(self, hidden_TH: Tensor, tokens_per_expert_E: Tensor, probs_T: Tensor) -> tuple[Tensor, Tensor | None]:
        first = self.local_experts[0].linear_fc1
        if first.bias is None and (self.tp_group.size() > 1 or first._forward_pre_hooks):
            return super().forward(hidden_TH, tokens_per_expert_E, probs_T)
        counts, out = tokens_per_expert_E.tolist(), []
        for expert, x, p in zip(self.local_experts, hidden_TH.split(counts), probs_T.split(counts), strict=True):
            for layer in (expert.linear_fc1, expert.linear_fc2):
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, ())
            # Experts without tokens are included: their weights get a gradient of zeros.
            gate, up = F.linear(x, expert.linear_fc1.weight, expert.linear_fc1.bias).chunk(2, dim=-1)
            weighted = (self._gated(gate, up) * p[:, None]).to(x.dtype)  # probabilities are float32 in bf16
            y = F.linear(weighted, expert.linear_fc2.weight)
            bias = expert.linear_fc2.bias
            out.append(y if bias is None else y + (bias * p[:, None]).to(y.dtype))
        return torch.cat(out), None

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        limit, offset = self.config.activation_func_clamp_value, self.config.glu_linear_offset
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return self.config.activation_func(gate) * (up + offset if offset else up)
