"""FP8 on the CPU: Megatron's and Transformer Engine's control flow around Transformer Engine's own reference of current
scaling, which quantises and multiplies in torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.device.precision import RECIPES

RECIPE = "tensorwise"
FACTORY = "transformer_engine.pytorch.custom_recipes.reference_current_scaling.current_scaling_ref_factory"
SETTINGS = (f"precision.fp8={RECIPE}",)


def has_reference() -> bool:
    """Since 2.11 or later: 2.10 has a reference of other formats only."""
    try:
        return tuple(map(int, version("transformer-engine").split(".")[:2])) > (2, 10)
    except PackageNotFoundError:  # tests of this folder are left out
        return False


def use_reference() -> None:
    """Makes the row of RECIPES compute with the reference, in this process, on a CPU."""
    settings = {"fp8": "hybrid", "fp8_recipe": "custom", "fp8_quantizer_factory": FACTORY}
    RECIPES[RECIPE] = replace(RECIPES[RECIPE], layers=("local", "te"), megatron=settings)
    torch._scaled_mm = scaled_product


def scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool, bias: Any
) -> Tensor:
    """What the reference calls; torch's own prepares a kernel for every new shape, which takes longer than all else."""
    product = (a.float() @ b.float()) * (scale_a * scale_b)
    return (product if bias is None else product + bias).to(out_dtype)


class Watched:
    """Counts what the reference does, from now on.

    Attributes:
        products: sizes (rows, columns, inner) of every product, and how often.
        quantised: tensors that were quantised: "weight" or "other", by whether a parameter was.
    """

    def __init__(self) -> None:
        from torch.nn import Parameter
        from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

        self.products: Counter[tuple[int, ...]] = Counter()
        self.quantised: Counter[str] = Counter()
        qgemm, quantize = CurrentScalingQuantizerRef.qgemm, CurrentScalingQuantizerRef._quantize

        def counted_product(quantizer: Any, qx: Any, qw: Any, *args: Any, **kwargs: Any) -> Any:
            self.products[(len(qx), len(qw), qx.size(-1))] += 1
            return qgemm(quantizer, qx, qw, *args, **kwargs)

        def counted_quantise(quantizer: Any, tensor: Any) -> Any:
            self.quantised["weight" if isinstance(tensor, Parameter) else "other"] += 1
            return quantize(quantizer, tensor)

        CurrentScalingQuantizerRef.qgemm = counted_product
        CurrentScalingQuantizerRef._quantize = counted_quantise
