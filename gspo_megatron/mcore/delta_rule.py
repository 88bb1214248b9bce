"""The gated delta rule: attention of linear cost, whose memory is one matrix a head.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T          o_t = S_t^T q_t / sqrt(D)

for keys and queries of length 1: at decay a_t, what the state holds under the key k_t is replaced by v_t, to the share
b_t. arXiv 2412.06464 (Yang, Kautz, Hatamizadeh: Gated Delta Networks), Eq. 10 and Section 3.3. Pure torch, in float32
or, in a float64 run, float64.

Shapes: B sequences (rows), Q value heads, L positions, D width of a key, Dv of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo_megatron.models.qwen3_next import CHUNK


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """[B, Q, L, D] queries and keys, [B, Q, L, Dv] values, [B, Q, L] log a and b -> outputs [B, Q, L, Dv] and the last
    state [B, Q, D, Dv]. The first state is 0; a position with log a = b = 0 leaves it as it is.

    In a chunk with G_i = sum_{j <= i} log a_j and E_ij = exp(G_i - G_j) for j <= i, 0 elsewhere, the rows U of

        (I + strictly lower part of diag(b) K K^T * E) U = diag(b) (V - diag(exp G) K S)

    are what the rule adds under each key, so that

        O = diag(exp G) Q S + (Q K^T * E) U         S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T U.

    The system does not depend on S: its solutions for V and for K S are found for all chunks at once.
    """
    length, dtype = query.size(2), value.dtype
    chunk = min(chunk, length)
    query, key, value, log_decay, rate = _precise(query, key, value, log_decay, rate)
    query, key = unit(query) * query.size(-1) ** -0.5, unit(key)
    missing = -length % chunk
    query, key, value = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for x in (query, key, value))
    log_decay, rate = (F.pad(x, (0, missing)).unflatten(2, (-1, chunk)) for x in (log_decay, rate))

    summed = log_decay.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    decay = (summed[..., :, None] - summed[..., None, :]).masked_fill(later, float("-inf")).exp()
    since_start = summed.exp()[..., None]
    rated = rate[..., None] * key
    system = rated @ key.mT * decay  # its diagonal is taken as 1, what is above it as 0
    right = torch.cat([rate[..., None] * value, since_start * rated], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    added, forgotten = solved.split([value.size(-1), key.size(-1)], dim=-1)
    within = query @ key.mT * decay
    reading = since_start * query
    to_end = (summed[..., -1:] - summed).exp()[..., None] * key
    over_chunk = summed[..., -1].exp()[..., None, None]

    state = value.new_zeros(*value.shape[:2], key.size(-1), value.size(-1))
    out = []
    for i in range(query.size(2)):
        new = added[:, :, i] - forgotten[:, :, i] @ state
        out.append(reading[:, :, i] @ state + within[:, :, i] @ new)
        state = over_chunk[:, :, i] * state + to_end[:, :, i].mT @ new
    return torch.cat(out, dim=2)[:, :, :length].to(dtype), state


def delta_rule_step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for one position: [B, Q, D] queries and keys, [B, Q, Dv] values, [B, Q] log a and b, and the state
    before it -> outputs [B, Q, Dv] and the state after it."""
    dtype = value.dtype
    query, key, value, log_decay, rate = _precise(query, key, value, log_decay, rate)
    query, key = unit(query) * query.size(-1) ** -0.5, unit(key)
    state = log_decay.exp()[..., None, None] * state
    new = rate[..., None] * (value - (key[..., None, :] @ state).squeeze(-2))
    state = state + key[..., None] * new[..., None, :]
    return (query[..., None, :] @ state).squeeze(-2).to(dtype), state


def unit(x: Tensor) -> Tensor:
    """x / |x|, where 1e-6 is added to the square."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _precise(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
