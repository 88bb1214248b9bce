"""The patches to Megatron-Core, with the versions that need them. Nothing else in the package patches Megatron.

Each entry of PATCHES and CPU_PATCHES names the code it patches; tests/device/test_cpu.py fails when the
installed version no longer needs it. Stand-ins for torch.cuda itself are in device/cpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from torch.overrides import TorchFunctionMode

from gspo_megatron.base.errors import ConfigError

VERSION = version("megatron-core")


def _te_general_gemm() -> None:
    """0.16.1, transformer/moe/moe_utils.py:1192: the router reads a name that only a Transformer Engine import
    defines."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _splits_on_cpu() -> None:
    """0.16.1 and 0.19.2, transformer/moe/moe_utils.py maybe_move_tensor_to_cpu: converts only GPU
    tensors to NumPy, but all_to_all_single takes split sizes as integers, not as tensors."""
    move = moe_utils.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy() if as_numpy else tensor
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _no_device_rng() -> None:
    """0.16.1 and 0.19.2, tensor_parallel/random.py _set_cuda_rng_state: queues a callback until CUDA is
    initialised, which never happens on a CPU; activation recompute would grow that queue at every layer."""
    mcore_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: None


class _Float64Stays(TorchFunctionMode):
    """x.float() is x where x is float64, and a softmax of it stays float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.softmax and args[0].dtype == torch.float64:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


def _routes_in_float64() -> None:
    """0.16.1 and 0.19.2, transformer/moe/moe_utils.py topk_routing_with_score_function and
    compute_routing_scores_for_aux_loss: a router's scores are float32 even from float64 logits. On a CPU the last bit
    of a sigmoid depends on how many there are, since vector instructions and the loop over the rest round differently:
    layouts would differ by 1e-8. All layouts share the error of a softmax, so that only another program shows it."""
    for name in ("topk_routing_with_score_function", "compute_routing_scores_for_aux_loss"):
        setattr(router, name, _keeping_float64(getattr(router, name)))


def _keeping_float64(route: Callable[..., Any]) -> Callable[..., Any]:
    def routed(logits: Any, *args: Any, **kwargs: Any) -> Any:
        with _Float64Stays() if logits.dtype == torch.float64 else nullcontext():
            return route(logits, *args, **kwargs)

    return routed


PATCHES: tuple[Callable[[], None], ...] = (_te_general_gemm,)
CPU_PATCHES: tuple[Callable[[], None], ...] = (_splits_on_cpu, _no_device_rng, _routes_in_float64)


def apply_patches(on_cpu: bool) -> None:
    """Applies the patches. Call once, after process groups exist and before a model is built."""
    for apply in PATCHES + (CPU_PATCHES if on_cpu else ()):
        apply()


def set_experts(mlp: Any, module: type) -> None:
    """Makes `module` the experts of a layer's spec, if it has any: 0.16.1 nests ModuleSpec objects, 0.19.2 partial
    functions."""
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    experts = getattr(submodules, "experts", None)
    if isinstance(experts, partial):
        submodules.experts = partial(module, *experts.args, **experts.keywords)
    elif experts is not None:
        experts.module = module


def mark_expert_parameters(model: torch.nn.Module, experts_have_own_groups: bool) -> None:
    """What 0.16.1 gets wrong about experts' parameters, and 0.19.2 gets right.

    - tensor_parallel/layers.py:886: their gradient is reduced over the expert groups only when EP > 1. With TP > 1,
      ETP < TP and EP = 1 it would be reduced over the dense group, and each tensor-parallel rank would keep the
      gradient of its own tokens.
    - extensions/transformer_engine.py TEGroupedLinear: the matrices are made as if nothing were sharded, so
      tensor_parallel/layers.py:89 takes them for copies, and the gradient norm has only those of tensor-parallel rank
      0.

    And what neither has right about biases of experts, which are not split (etp = 1): tensor_parallel/layers.py marks
    the second matrix's as a dense layer's, whose gradient is summed over tensor-parallel ranks and counted on the first
    one. Those ranks may hold other experts; the expert groups have reduced it already.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            if experts_have_own_groups:
                parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]


def check_transformer_engine() -> None:
    """Both versions: where one name that Megatron-Core imports from Transformer Engine is missing, it goes on without,
    and fails at the first layer.

    Raises:
        ConfigError: it does, although Transformer Engine itself can be imported.
    """
    if extensions.HAVE_TE:
        return
    module = "transformer_engine.pytorch.fp8"
    try:
        import_module(module)
        missing = f"it lacks a name of {module}"
    except ImportError as error:
        missing = str(error)
    raise ConfigError(
        f"Megatron-Core {VERSION} cannot use the Transformer Engine that is installed ({missing}); install a pair that "
        "works together (docs/dependencies.md), or set precision.transformer_engine=off and precision.fp8=none"
    )
