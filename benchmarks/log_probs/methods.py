"""The ways of computing log-probs that benchmarks/log_probs/run.py compares, behind one signature.

A method's `open(inputs)` imports what it needs and returns `log_probs(inputs) -> log p(y), [N]`, differentiable in the
hidden states and the weight. The frameworks behave as they do in training: they compute every row of the micro-batch,
ours only rows that have a target; logits come from Megatron's own linear layer, with weight-gradient fusion where it is
installed.

Shape suffixes: N rows, m this rank's contiguous part of them (all of them on one process), V vocabulary, Vp this
rank's contiguous part of it, H hidden size.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.log_probs import linear_log_probs
from gspo_megatron.log_probs.products import factor_dtype


@dataclass(frozen=True)
class Inputs:
    """The inputs of every method. `weight_VpH` has `main_grad` (float32 zeros) and `grad_added_to_main_grad`, as under
    Megatron. `targets_N` has a token for every row, `scored_targets_N` IGNORED outside responses. The group
    has t ranks; with t > 1 the hidden states are split over them (sequence parallel)."""

    hidden_mH: Tensor
    weight_VpH: Any
    targets_N: Tensor
    scored_targets_N: Tensor
    d_log_probs_N: Tensor
    group: dist.ProcessGroup

    @property
    def sequence_parallel(self) -> bool:
        return self.group.size() > 1


LogProbs = Callable[[Inputs], Tensor]
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """`gradients`: the coarsest format that the gradient of a logit is rounded to when hidden states and weight are
    float32. `packages`: what must be installed for it besides Megatron-Core."""

    name: str
    open: Callable[[Inputs], LogProbs]
    packages: tuple[str, ...] = ()
    needs_gpu: bool = False
    vocab_parallel: bool = False
    gradients: torch.dtype = torch.float32
    is_ours: bool = False

    def missing(self, device: torch.device, ranks: int) -> str | None:
        """Why the method cannot run there, or None."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if self.needs_gpu and device.type == "cpu":
            return "needs a GPU"
        if absent:
            return f"not installed ({', '.join(absent)})"
        return None if self.vocab_parallel or ranks == 1 else "not vocab-parallel"


# --- ours ---


def ours(kept: float) -> Callable[[Inputs], LogProbs]:
    """linear_log_probs as the trainer calls it. `kept`: the fraction of exponentials that stays in memory."""

    def open_ours(inputs: Inputs) -> LogProbs:
        item_bytes = factor_dtype(inputs.hidden_mH).itemsize
        store_bytes = int(kept * len(inputs.targets_N) * len(inputs.weight_VpH) * item_bytes)

        def log_probs(inputs: Inputs) -> Tensor:
            return linear_log_probs(
                inputs.hidden_mH,
                inputs.weight_VpH,
                inputs.scored_targets_N,
                group=inputs.group,
                sequence_parallel=inputs.sequence_parallel,
                store_bytes=store_bytes,
                validate=False,
            )[0]

        return log_probs

    return open_ours


# --- on logits ---


def open_log_softmax(_: Inputs) -> LogProbs:
    def log_probs(inputs: Inputs) -> Tensor:
        log_p_NV = (inputs.hidden_mH @ inputs.weight_VpH.T).float().log_softmax(-1)
        return log_p_NV.gather(1, inputs.targets_N[:, None])[:, 0]

    return log_probs


def on_megatron_logits(open_cross_entropy: Callable[[Inputs], CrossEntropy]) -> Callable[[Inputs], LogProbs]:
    """log p from the logits of Megatron's ColumnParallelLinear; the cross-entropy takes logits, [N, 1, Vp], and
    targets, [N, 1]."""

    def open_on_logits(inputs: Inputs) -> LogProbs:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import layers

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=inputs.group.size())
        cross_entropy = open_cross_entropy(inputs)

        def log_probs(inputs: Inputs) -> Tensor:
            logits_N1Vp = layers.linear_with_grad_accumulation_and_async_allreduce(
                inputs.hidden_mH[:, None],
                inputs.weight_VpH,
                bias=None,
                gradient_accumulation_fusion=layers._grad_accum_fusion_available,
                allreduce_dgrad=False,  # the reduce-scatter of sequence parallel takes its place
                sequence_parallel=inputs.sequence_parallel,
                tp_group=inputs.group,
            )
            return -cross_entropy(logits_N1Vp, inputs.targets_N[:, None]).flatten()

        return log_probs

    return open_on_logits


def open_native(_: Inputs) -> CrossEntropy:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy


def open_fused(inputs: Inputs) -> CrossEntropy:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return lambda logits, targets: fused_vocab_parallel_cross_entropy(logits, targets, inputs.group)


def open_transformer_engine(inputs: Inputs) -> CrossEntropy:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return lambda logits, targets: parallel_cross_entropy(logits, targets, 0.0, False, inputs.group)


# --- without logits ---


def without_setup(name: str) -> ModuleType:
    """Imports a module of verl without running its packages' __init__, which would start Ray and the rest of a training
    framework."""
    for package in ("verl", "verl.utils"):
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            assert spec is not None and spec.submodule_search_locations is not None
            bare = sys.modules[package] = ModuleType(package)
            bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations)
    return importlib.import_module(name)


def open_verl_torch(_: Inputs) -> LogProbs:
    fused = without_setup("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return lambda inputs: fused(inputs.hidden_mH, inputs.weight_VpH, inputs.targets_N)[0]


def open_verl_triton(_: Inputs) -> LogProbs:
    fused = without_setup("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda inputs: fused(inputs.hidden_mH, inputs.weight_VpH, inputs.targets_N, 1.0, "none")[0]


def open_liger_chunked(_: Inputs) -> LogProbs:
    fused = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase.chunk_forward
    return lambda inputs: fused(inputs.hidden_mH[None], inputs.weight_VpH, inputs.targets_N[None])[0]


def open_liger_triton(_: Inputs) -> LogProbs:
    fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda inputs: -fused(inputs.weight_VpH, inputs.hidden_mH, inputs.targets_N)


def open_liger_hopper(_: Inputs) -> LogProbs:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    fused = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda inputs: -fused(inputs.hidden_mH, inputs.weight_VpH, inputs.targets_N)


REFERENCE = "Megatron-Core, native"
METHODS = {
    method.name: method
    for method in (
        Method(REFERENCE, on_megatron_logits(open_native), vocab_parallel=True),
        Method("ours, recompute", ours(0), vocab_parallel=True, is_ours=True),
        Method("ours, half kept", ours(0.5), vocab_parallel=True, is_ours=True),
        Method("ours, all kept", ours(1), vocab_parallel=True, is_ours=True),
        Method("Megatron-Core, fused", on_megatron_logits(open_fused), vocab_parallel=True, gradients=torch.bfloat16),
        Method(
            "Transformer Engine",
            on_megatron_logits(open_transformer_engine),
            packages=("transformer_engine",),
            needs_gpu=True,
        ),
        Method("verl, torch", open_verl_torch, packages=("verl",)),
        Method("verl, Triton", open_verl_triton, packages=("verl", "triton"), needs_gpu=True),
        Method("Liger-Kernel, chunked", open_liger_chunked, packages=("liger_kernel",)),
        Method("Liger-Kernel, Triton", open_liger_triton, packages=("liger_kernel", "triton"), needs_gpu=True),
        Method("Liger-Kernel, Hopper", open_liger_hopper, packages=("liger_kernel", "cutlass"), needs_gpu=True),
        Method("log_softmax", open_log_softmax),
    )
}
