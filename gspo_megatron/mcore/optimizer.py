"""Megatron's gradient reduction and optimizer around a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from gspo_megatron.config import OptimizerConfig
from gspo_megatron.device import Lane
from gspo_megatron.mcore.model import PolicyModel


def wrap_model(chunks: Sequence[PolicyModel], lane: Lane, settings: OptimizerConfig) -> list[DistributedDataParallel]:
    """Gradient buffers (float32 under bf16), reduced over data-parallel ranks; on a GPU while the backward still
    runs."""
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=lane.dtype == torch.bfloat16,
                use_distributed_optimizer=_distributed(lane, settings),
                overlap_grad_reduce=not lane.on_cpu,
                # Its check goes through a CUDA-only state machine; MegatronPolicy.update looks at the norm instead.
                check_for_nan_in_grad=False,
            ),
            chunk,
            # The gradients of later chunks are ready first, and small: one bucket each.
            disable_bucketing=i > 0,
        )
        for i, chunk in enumerate(chunks)
    ]
    config = chunks[0].config  # one for all chunks
    config.finalize_model_grads_func = finalize_model_grads
    if not lane.on_cpu:
        config.no_sync_func = [ddp.no_sync for ddp in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def build_optimizer(chunks: list[DistributedDataParallel], lane: Lane, settings: OptimizerConfig) -> MegatronOptimizer:
    """AdamW over this rank's shard of parameters, gradient norm clipped over all ranks."""
    with lane.optimizer_scope():
        return get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                clip_grad=settings.clip_grad,
                bf16=lane.dtype == torch.bfloat16,
                params_dtype=torch.bfloat16 if lane.dtype == torch.bfloat16 else torch.float32,
                use_distributed_optimizer=_distributed(lane, settings),
            ),
            chunks,
            use_gloo_process_groups=False,
        )


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """The moments and step counts that torch's Adam makes at its first step, for a checkpoint to be loaded into.

    Megatron's distributed optimizer reads the step count before it loads one (distrib_optimizer.py state_dict, in
    0.16.1 and 0.19.2). Adams of other packages count steps per group, and are left alone.
    """
    for _, parameter, state in _torch_adam_states(optimizer):
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def restore_step_counts(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter its step count, after a checkpoint was loaded.

    Megatron's distributed optimizer loads the count into the parameter groups, and hands all parameters one tensor,
    which keeps its old value, and which torch's Adam would increment once for each of them (distrib_optimizer.py
    load_state_dict and _set_main_param_and_optimizer_states, in 0.16.1 and 0.19.2).
    """
    for group, _, state in _torch_adam_states(optimizer):
        state["step"] = torch.tensor(float(group.get("step", state["step"])))


def _torch_adam_states(optimizer: MegatronOptimizer) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Tensor]]]:
    """(group, parameter, its state) where the optimizer inside is torch's."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield group, parameter, part.optimizer.state[parameter]


def _distributed(lane: Lane, settings: OptimizerConfig) -> bool:
    """The distributed optimizer casts its gradient shards to float32, so float64 runs go without."""
    return settings.distributed and lane.dtype != torch.float64
