"""Megatron's gradient reduction and optimizer around a model."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from gspo_megatron.config import OptimizerConfig
from gspo_megatron.device import Lane
from gspo_megatron.mcore.model import PolicyModel


def wrap_model(model: PolicyModel, lane: Lane, settings: OptimizerConfig) -> DistributedDataParallel:
    """Gradient buffers (float32 under bf16), reduced over data-parallel ranks; on a GPU while the backward still
    runs."""
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=lane.dtype == torch.bfloat16,
            use_distributed_optimizer=_distributed(lane, settings),
            overlap_grad_reduce=not lane.on_cpu,
            check_for_nan_in_grad=False,  # goes through a CUDA-only state machine; the trainer checks the norm instead
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if not lane.on_cpu:
        model.config.no_sync_func = ddp.no_sync
    return ddp


def build_optimizer(ddp: DistributedDataParallel, lane: Lane, settings: OptimizerConfig) -> MegatronOptimizer:
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
            [ddp],
            use_gloo_process_groups=False,
        )


def _distributed(lane: Lane, settings: OptimizerConfig) -> bool:
    """The distributed optimizer casts its gradient shards to float32, so float64 runs go without."""
    return settings.distributed and lane.dtype != torch.float64
