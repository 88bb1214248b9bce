"""Transformer Engine's compiled extension, as far as the layers of this package call it, in torch.

Signatures are those of transformer_engine/pytorch/csrc/pybind.cpp in 2.10 and 2.20. A function that is not here exists
all the same, and says so when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from importlib.metadata import version
from typing import Any

import torch
from stand_in_attention import *  # noqa: F403  (functions of the extension, under their own names)
from torch import Tensor

VERSION = tuple(int(part) for part in version("transformer-engine").split(".")[:2])

# ------------------------------------------------------------------------------------------------------- enumerations


class DType(IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{name}" for i in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{i}" for i in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)
_BACKENDS = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
if VERSION < (2, 18):
    _BACKENDS["NVTE_F16_max512_seqlen"] = 0
NVTE_Fused_Attn_Backend = IntEnum("NVTE_Fused_Attn_Backend", _BACKENDS)
DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Names(type):
    """A class with any attribute, numbered as they are read: an enumeration whose values do not matter, or a class that
    is only named."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return vars(cls)[name]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _Names(name, (), {}) if name[0].isupper() else _missing(name)
    setattr(sys.modules[__name__], name, made)
    return made


def _missing(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"Transformer Engine called transformer_engine_torch.{name}, which the stand-in for its compiled extension "
            "lacks; write it in torch in tests/te/stand_in/transformer_engine_torch.py"
        )

    call.__name__ = name
    return call


# ------------------------------------------------------------------------------------------------------------ versions


def get_cudnn_version() -> int:
    return 91500


def get_cublasLt_version() -> int:
    return 130000


def get_num_cublas_streams() -> int:
    return 4


# ------------------------------------------------------------------------------------------------------ matrix products


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    """cuBLAS is column-major: C = op(B) op(A) in torch's terms, accumulated in float32 at least."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    return (b.T if transb else b) @ (a.T if transa else a)


def _store(value: Tensor, out: Tensor, accumulate: bool) -> None:
    """Adds in float32 at least and rounds once."""
    out.copy_((out.to(value.dtype) if accumulate else 0) + value.view(out.shape))


def bgrad_quantize(grad_output: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """A bias's gradient, summed over rows, and the quantised gradient of the output."""
    return grad_output.flatten(0, -2).sum(0), quantizer(grad_output)


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_type: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """With a bias: added to the product; where `b` is a gradient of that (`grad`), the bias's gradient comes second."""
    assert quantizer is None and not gelu and comm_overlap is None and alpha == 1.0
    value = _product(a, transa, b, transb)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.flatten(0, -2).to(value.dtype).sum(dim=0).to(bias.dtype)
    elif bias is not None:
        value += bias
    if out is None:
        shape = value.shape if transb else (*b.shape[:-1], value.shape[-1])
        out = torch.empty(shape, dtype=a.dtype if out_dtype is None else DTYPES[DType(int(out_dtype))])
    _store(value, out, accumulate)
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transa: bool,
    b: Sequence[Tensor],
    transb: bool,
    out: Sequence[Tensor],
    out_dtype: DType,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: DType,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[Tensor]:
    assert not any(x.numel() for x in bias)
    outs = out[0].split([int(m) for m in m_splits]) if single_output else out
    for one_a, one_b, one_out in zip(a, b, outs, strict=True):
        if isinstance(one_a, Tensor):
            _store(_product(one_a, transa, one_b, transb), one_out, accumulate)
        else:
            _reference_product(one_a, transa, one_b, transb, one_out, accumulate, grad)
    return bias


def _reference_product(a: Any, transa: bool, b: Any, transb: bool, out: Tensor, accumulate: bool, grad: bool) -> None:
    """Of tensors that Transformer Engine's own reference has quantised. The real extension does not take them."""
    from transformer_engine.pytorch.custom_recipes.gemm import custom_gemm

    layout = ("T" if transa else "N") + ("T" if transb else "N")
    custom_gemm(a, b, None, out.dtype, layout=layout, out=out, accumulate=accumulate, grad=grad)


# --------------------------------------------------------------------------------------------------------------- norms


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """(y, nothing, 1 / sqrt(mean(x^2) + eps)), y = x * that * weight."""
    assert quantizer is None and out is None and not zero_centered_gamma
    wide = x.float()
    rsigma = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return (wide * rsigma[..., None] * weight.float()).to(x.dtype), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    normed, wide = x.float() * rsigma[..., None], dy.float()
    weighted = wide * weight.float()
    dx = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rsigma[..., None]
    return dx.to(x.dtype), (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)


# ------------------------------------------------------------------------------------------------- padding of experts


def fused_multi_row_padding(x: Tensor, out: Tensor, rows: Sequence[int], padded_rows: Sequence[int]) -> None:
    out.zero_()
    for part, padded in zip(x.split(list(rows)), out.split(list(padded_rows)), strict=True):
        padded[: len(part)].copy_(part)


def fused_multi_row_unpadding(x: Tensor, out: Tensor, padded_rows: Sequence[int], rows: Sequence[int]) -> None:
    for padded, part in zip(x.split(list(padded_rows)), out.split(list(rows)), strict=True):
        part.copy_(padded[: len(part)])


# ----------------------------------------------------------------------------- gradient norm, clipping, optimizer


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([x.float().norm() for x in lists[0]]) if lists[0] else torch.zeros(1)
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w_mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW, float32: lists of gradients, parameters, first and second moments."""
    assert adam_w_mode and bias_correction and len(lists) == 4
    for gradient, parameter, first, second in zip(*lists, strict=True):
        assert parameter.dtype == torch.float32
        gradient = gradient.float()
        parameter.mul_(1 - lr * weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
        parameter.addcdiv_(first / (1 - beta1**step), denominator, value=-lr)


# Names that transformer_engine.pytorch.optimizers imports.
for _name in ("adam_fp8", "adam_capturable", "adam_capturable_master", "sgd", "scale_tensor", "unscale_l2norm"):
    setattr(sys.modules[__name__], f"multi_tensor_{_name}", _missing(f"multi_tensor_{_name}"))
