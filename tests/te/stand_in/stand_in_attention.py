"""Attention of Transformer Engine's compiled extension, on packed sequences, in torch.

What cuDNN computes, and the kernels that its ring over context-parallel ranks uses: a rank holds two chunks of every
sequence (its halves), and statistics are [T, H], or [H, T] where the ring keeps them.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "get_fused_attn_backend",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
]

VERSION = tuple(int(part) for part in version("transformer-engine").split(".")[:2])
F16_ARBITRARY_SEQLEN = 1


def get_fused_attn_backend(*args: Any) -> Any:
    """cuDNN's, for everything that is asked for here; with the reason for a refusal from 2.18 on."""
    return F16_ARBITRARY_SEQLEN if VERSION < (2, 18) else (F16_ARBITRARY_SEQLEN, "")


# Positional arguments of transformer_engine/pytorch/cpp_extensions/fused_attn.py.
_NEWER = VERSION >= (2, 18)
_FORWARD = (
    *("max_q", "max_kv", "is_training", "scale", "dropout", "zero_fill", "layout"),
    *(("o_format", "scale_inv_format") if _NEWER else ()),
    *("bias_type", "mask_type", "softmax_type", "window"),
    *(("bottom_right",) if _NEWER else ()),
    *("cu_q", "cu_kv", "q", "k", "v", "fake_dtype", "padded_q", "padded_kv", "page_k", "page_v", "s_quantizer"),
    *("o_quantizer", "bias", "softmax_offset", "rng_gen", "rng_elements", "max_logit", "cuda_graph"),
)
_BACKWARD = (
    *("max_q", "max_kv", "scale", "dropout", "zero_fill", "layout"),
    *(("o_format", "do_format", "dqkv_layout", "scale_inv_format", "do_scale_inv_format") if _NEWER else ()),
    *("bias_type", "mask_type", "softmax_type", "window"),
    *(("bottom_right",) if _NEWER else ()),
    *("deterministic", "cu_q", "cu_kv", "q", "k", "v", "o", "do", "fake_dtype"),
    *(() if _NEWER else ("dqkv_dtype",)),
    *("aux", "padded_q", "padded_kv", "s_quantizer", "dp_quantizer", "dqkv_quantizer", "cuda_graph"),
)


def _parts(given: dict[str, Any]) -> Any:
    """(tokens of queries, tokens of keys, hidden [Lq, Lk]) of every sequence."""
    import transformer_engine_torch as tex

    causal = given["mask_type"] == tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK
    assert causal or given["mask_type"] == tex.NVTE_Mask_Type.NVTE_PADDING_MASK
    assert given["layout"] == tex.NVTE_QKV_Layout.NVTE_THD_THD_THD and given["dropout"] == 0.0
    assert given["cu_q"].dtype == given["cu_kv"].dtype == torch.int32, "cuDNN takes no other boundaries"
    for name in ("q", "kv"):
        assert given[f"padded_{name}"] is None or torch.equal(given[f"padded_{name}"], given[f"cu_{name}"])
        assert int(given[f"cu_{name}"].diff().max()) <= given[f"max_{name}"]
    boundaries = zip(given["cu_q"].tolist(), given["cu_kv"].tolist(), strict=True)
    for (q0, kv0), (q1, kv1) in pairwise(boundaries):
        hidden = torch.ones(q1 - q0, kv1 - kv0, dtype=torch.bool)
        yield slice(q0, q1), slice(kv0, kv1), hidden.triu(1) if causal else ~hidden


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[H, Lq, Lk] float32."""
    shared = q.size(1) // k.size(1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(shared, 1)) * scale
    return scores.masked_fill(hidden, -torch.inf)


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """[out [T, H, Dv], log of the sum of exponentials [T, H, 1], state of random numbers]."""
    given = dict(zip(_FORWARD, args, strict=True))
    q, k, v = given["q"], given["k"], given["v"]
    out, stats = q.new_zeros(*q.shape[:2], v.size(2)), torch.zeros(*q.shape[:2], 1)
    for rows, columns, hidden in _parts(given):
        scores = _scores(q[rows], k[columns], hidden, given["scale"])
        lse = scores.logsumexp(-1, keepdim=True)
        values = v[columns].float().repeat_interleave(q.size(1) // v.size(1), 1)
        out[rows] = torch.einsum("hqk,khd->qhd", (scores - lse).exp(), values).to(q.dtype)
        stats[rows] = lse.transpose(0, 1)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """[dq, dk, dv]. P = exp(S - lse), dP = dO V^T, dS = P (dP - rowsum(dO O)): with the statistics and the output of
    the whole sequence these are this part's share of the gradient."""
    given = dict(zip(_BACKWARD, args, strict=True))
    q, k, v, do, o, stats = (given[name] for name in ("q", "k", "v", "do", "o", "aux"))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    shared, scale = q.size(1) // k.size(1), given["scale"]
    for rows, columns, hidden in _parts(given):
        probs = (_scores(q[rows], k[columns], hidden, scale) - stats[0][rows].transpose(0, 1)).exp()
        keys, values = (x[columns].float().repeat_interleave(shared, 1) for x in (k, v))
        dprobs = torch.einsum("qhd,khd->hqk", do[rows].float(), values)
        delta = (do[rows].float() * o[rows].float()).sum(-1).T[..., None]
        dscores = probs * (dprobs - delta) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, keys).to(q.dtype)
        for target, value in (
            (dk, torch.einsum("hqk,qhd->khd", dscores, q[rows].float())),
            (dv, torch.einsum("hqk,qhd->khd", probs, do[rows].float())),
        ):
            target[columns] = value.unflatten(1, (k.size(1), shared)).sum(2).to(k.dtype)
    return [dq, dk, dv, None, None]


# ------------------------------------------------------------------------------------------------- packs and grids


def _slots(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The place of each packed token in a flattened [B, L] grid."""
    return torch.cat([i * max_seqlen + torch.arange(int(n)) for i, n in enumerate(cu_seqlens.diff().tolist())])


def convert_thd_to_bshd(x: Tensor, cu_seqlens: Tensor, batch_size: int, max_seqlen: int) -> Tensor:
    """[T, H, D] -> [B, L, H, D], zeros where there is no token."""
    slots = _slots(cu_seqlens, max_seqlen)
    spread = x.new_zeros(batch_size * max_seqlen, *x.shape[1:]).index_copy(0, slots, x[: len(slots)])
    return spread.view(batch_size, max_seqlen, *x.shape[1:])


def convert_bshd_to_thd(x: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The inverse."""
    collected = x.flatten(0, 1).index_select(0, _slots(cu_seqlens, x.size(1)))
    return torch.cat([collected, x.new_zeros(num_tokens - len(collected), *x.shape[2:])])


# ------------------------------------------------------------------------------------- the ring of context parallelism


def _halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the first and of the second half of every sequence of a rank; `cu_seqlens` are the rank's own."""
    bounds = cu_seqlens.tolist()
    first = [torch.arange(a, (a + b) // 2) for a, b in pairwise(bounds)]
    second = [torch.arange((a + b) // 2, b) for a, b in pairwise(bounds)]
    return torch.cat(first), torch.cat(second)


def thd_read_half_tensor(x: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    return x.index_select(-3, _halves(cu_seqlens)[half])


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, length: int) -> Tensor:
    assert lse_packed
    return lse[:, _halves(cu_seqlens)[1]]


def thd_second_half_lse_correction(lse: Tensor, of_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    assert lse_packed
    second = _halves(cu_seqlens)[1]
    lse[:, second] = torch.logaddexp(lse[:, second], of_step.view(len(lse), -1))


def thd_out_correction(
    out: Tensor,
    of_step: Tensor,
    old_lse: Tensor,
    lse: Tensor,
    lse_of_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """out = out exp(old_lse - lse) + of_step exp(lse_of_step - lse), for the tokens that the step covers."""
    assert lse_packed
    tokens = _halves(cu_seqlens)[1] if only_second_half else torch.arange(len(out))
    kept = (old_lse[:, tokens] - lse[:, tokens]).exp().T[..., None]
    added = (lse_of_step - lse[:, tokens]).exp().T[..., None]
    out[tokens] = (out[tokens].float() * kept + of_step.view(out[tokens].shape).float() * added).to(out.dtype)


def thd_grad_correction(grad: Tensor, of_step: Tensor, cu_seqlens: Tensor, first: str, second: str) -> None:
    """`first` and `second` say what happens to each half: nothing, zero, or `of_step` is copied or added. It covers
    both halves, or only the one that is changed."""
    halves = _halves(cu_seqlens)
    whole = len(of_step) == len(grad)
    for tokens, action in zip(halves, (first, second), strict=True):
        if action == "zero":
            grad[tokens] = 0
        elif action in ("copy", "add"):
            value = of_step[tokens] if whole else of_step
            grad[tokens] = value if action == "copy" else grad[tokens] + value
