"""Megatron's gradient reduction and optimizer around a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from gspo_megatron.config.sections import OptimizerConfig
from gspo_megatron.device import Device
from gspo_megatron.mcore.model import PolicyModel


def wrap_model(
    chunks: Sequence[PolicyModel], device: Device, settings: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Gradient buffers (float32 under bf16), reduced over data-parallel ranks."""
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=device.dtype == torch.bfloat16,
                use_distributed_optimizer=is_distributed(device, settings),
                overlap_grad_reduce=_overlaps(device, settings),
                overlap_param_gather=_overlaps(device, settings) and is_distributed(device, settings),
                # Megatron's check uses a CUDA-only state machine; MegatronPolicy.update checks the norm instead.
                check_for_nan_in_grad=False,
            ),
            chunk,
            # The gradients of later chunks are ready first, and small: one bucket each.
            disable_bucketing=i > 0,
        )
        for i, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        add_weight_gradients_in_float32(chunk)
    config = chunks[0].config  # one for all chunks
    config.finalize_model_grads_func = finalize_model_grads
    if _overlaps(device, settings):
        # Only the last micro-batch's backward reduces.
        config.no_sync_func = [ddp.no_sync for ddp in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def add_weight_gradients_in_float32(model: torch.nn.Module) -> None:
    """Transformer Engine's layers add a weight's gradient to the buffer themselves, in float32; otherwise every
    micro-batch's would be rounded to bf16 first, and added by another kernel.

    Set on the modules: TransformerConfig.gradient_accumulation_fusion would also ask Megatron's own vocabulary layer
    for it, which needs Apex.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def build_optimizer(
    chunks: list[DistributedDataParallel], device: Device, settings: OptimizerConfig
) -> MegatronOptimizer:
    """AdamW over this rank's shard of parameters, gradient norm clipped over all ranks."""
    with device.optimizer_scope():
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
                bf16=device.dtype == torch.bfloat16,
                params_dtype=torch.bfloat16 if device.dtype == torch.bfloat16 else torch.float32,
                use_distributed_optimizer=is_distributed(device, settings),
                overlap_param_gather=_overlaps(device, settings) and is_distributed(device, settings),
            ),
            chunks,
            use_gloo_process_groups=False,
        )


def wait_for_weight(chunk: DistributedDataParallel, weight: Tensor) -> None:
    """Waits until the gather of `weight` is complete, where it overlaps with the forward. Modules wait for their own
    weights; this is for one that is read outside its module, the vocabulary matrix."""
    if chunk.ddp_config.overlap_param_gather:
        chunk.param_to_bucket_group[weight].finish_param_sync()


def wait_for_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Waits until all weights that the last update changed are complete. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that count steps per parameter. In torch 2.6, AdamW is not a subclass of Adam."""


class AdamShard(NamedTuple):
    """This rank's optimizer state of a model parameter: for elements `start` to `end` of the flattened parameter, the
    values that are updated (float32 under bf16) and Adam's moments."""

    start: int
    end: int
    main: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def shards_of_adam(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> dict[Tensor, AdamShard]:
    """The shards of the parameters of `chunks`; the tensors are the optimizer's own, to be read or written.

    Moments that Adam has not created yet are created, as zeros.
    """
    model_parameters = {getattr(p, "main_param", p): p for chunk in chunks for p in chunk.parameters()}
    found = {}
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, TORCH_ADAM):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, order) in part.model_param_group_index_map.items():
                span = part._get_model_param_range_map(parameter)["param"]
                main = part.optimizer.param_groups[group]["params"][order]
                found[parameter] = _shard(span.start, span.end, main, part.optimizer.state[main])
        else:
            for main in part.get_parameters():
                state = part.optimizer.state[main]
                found[model_parameters[main]] = _shard(0, main.numel(), main, state)
    return found


def _shard(start: int, end: int, main: Tensor, state: dict[str, Tensor]) -> AdamShard:
    return AdamShard(start, end, *(x.detach().view(-1) for x in (main, state["exp_avg"], state["exp_avg_sq"])))


def get_step_count(optimizer: MegatronOptimizer) -> int:
    """The number of updates that Adam has made."""
    counters = [counter for part in optimizer.chained_optimizers for counter in _step_counters(part.optimizer)]
    return int(max((counter.get("step", 0) for counter in counters), default=0))


def set_step_count(optimizer: MegatronOptimizer, count: int) -> None:
    """Makes Adam continue as after `count` updates."""
    for part in optimizer.chained_optimizers:
        for counter in _step_counters(part.optimizer):
            counter["step"] = torch.tensor(float(count)) if isinstance(part.optimizer, TORCH_ADAM) else count


def _step_counters(adam: torch.optim.Optimizer) -> Iterable[dict[str, Any]]:
    """torch's Adam counts for each parameter; Transformer Engine's and Apex's for each group."""
    return adam.state.values() if isinstance(adam, TORCH_ADAM) else adam.param_groups


def _overlaps(device: Device, settings: OptimizerConfig) -> bool:
    return settings.overlap == "on" or (settings.overlap == "auto" and not device.on_cpu)


def is_distributed(device: Device, settings: OptimizerConfig) -> bool:
    """Whether the optimizer's state is sharded over data-parallel ranks. The distributed optimizer casts its gradient
    shards to float32, so float64 runs do not use it."""
    return settings.distributed and device.dtype != torch.float64
