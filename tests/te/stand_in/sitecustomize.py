"""Lets Transformer Engine's Python layers be imported without its compiled extension, in every process that has this
folder on PYTHONPATH (`make test-te`).

Python imports `sitecustomize` when it starts. Nothing of torch is imported here: modules of Transformer Engine are
changed when they are loaded, and `transformer_engine_torch` is the file beside this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# transformer_engine/common/__init__.py: neither libtransformer_engine.so nor CUDA's libraries are loaded.
os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")


def without_libraries(common: Any) -> None:
    """The module of the extension is found on sys.path instead."""
    common.load_framework_extension = lambda framework: None


def with_names_of_the_extension(cpp_extensions: Any) -> None:
    """`from transformer_engine_torch import *` takes what the stand-in has; other names are to raise as there."""
    import transformer_engine_torch

    cpp_extensions.__getattr__ = transformer_engine_torch.__getattr__


def on_a_hopper(utils: Any) -> None:
    """What asks torch.cuda for the device, and what is created there."""
    import torch

    utils.get_device_compute_capability = lambda: (9, 0)
    utils.get_sm_count = lambda: 132
    utils._empty_tensor = torch.Tensor
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.Event = _Event


class _Event:
    """Work on the CPU is done when it is queued."""

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


def without_workspace(gemm: Any) -> None:
    """32 MiB for cuBLAS; torch needs none, but its length is passed on."""
    import torch

    gemm.get_cublas_workspace = lambda device, ub, grouped_gemm: [torch.empty(0)] if grouped_gemm else torch.empty(0)


def checks_see_a_device(base: Any) -> None:
    """A module begins by asking whether there is a GPU, and a forward whether its input is on it: both see one, and
    nothing outside these calls does."""
    import torch
    from torch.overrides import TorchFunctionMode

    is_cuda, inside = torch.Tensor.is_cuda.__get__, [0]
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: inside[0] > 0 or is_available()

    class OnDevice(TorchFunctionMode):
        """The CPU is the GPU."""

        def __enter__(self) -> Any:
            inside[0] += 1
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            inside[0] -= 1
            super().__exit__(*error)

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function == is_cuda:  # a new object at every look
                return True
            here = {name: "cpu" if name == "device" and str(x) == "cuda" else x for name, x in (kwargs or {}).items()}
            return function(*args, **here)

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with OnDevice():
                return function(*args, **kwargs)

        return call

    module = base.TransformerEngineBaseModule
    module.__init__ = seen(module.__init__)
    prepare = module.prepare_forward

    def prepare_forward(*args: Any, **kwargs: Any) -> Any:
        prepared = seen(prepare)(*args, **kwargs)
        return _Entered(prepared, seen) if hasattr(prepared, "__enter__") else prepared

    module.prepare_forward = prepare_forward
    base.seen = seen
    base.get_dummy_wgrad = seen(base.get_dummy_wgrad)


def attention_sees_a_device(attention: Any) -> None:
    from transformer_engine.pytorch.module.base import seen

    attention.DotProductAttention.forward = seen(attention.DotProductAttention.forward)


class _Entered:
    """In 2.10 prepare_forward is a context manager, and checks on entry."""

    def __init__(self, manager: Any, seen: Callable[..., Any]) -> None:
        self._manager, self._seen = manager, seen

    def __enter__(self) -> Any:
        return self._seen(self._manager.__enter__)()

    def __exit__(self, *error: Any) -> Any:
        return self._manager.__exit__(*error)


def ring_sends_at_once(context_parallel: Any) -> None:
    """NCCL orders messages by stream. gloo sends from memory that the caller may change before it has left, so an
    exchange is complete when this returns."""
    import torch.distributed as dist

    def exchange(rank: int, sent: Any, to: int, received: Any, source: int, group: Any, batched: Any) -> list[Any]:
        operations = [dist.isend(sent.clone(), to, group), dist.irecv(received, source, group)]
        for operation in operations:
            operation.wait()
        return []

    context_parallel.flash_attn_p2p_communicate = exchange


def reference_writes_where_it_is_told(gemm: Any) -> None:
    """2.20.2, custom_recipes/gemm.py:38: the reference ignores `out` and `accumulate`, so a gradient that is to be
    added to main_grad would be lost."""
    own = gemm.custom_gemm

    def custom_gemm(*args: Any, **kwargs: Any) -> Any:
        names = ("A", "B", "workspace", "out_dtype", "quantization_params", "gelu", "gelu_in", "accumulate", "layout")
        given = dict(zip((*names, "out", "bias", "use_split_accumulator", "grad"), args, strict=False)) | kwargs
        result, *rest = own(**given)
        out = given.get("out")
        if out is not None:
            out.copy_((out if given.get("accumulate") else 0) + result.view(out.shape))
            result = out
        return result, *rest

    gemm.custom_gemm = custom_gemm


def permutation_in_torch(permutation: Any) -> None:
    import stand_in_permutation

    for name, function in vars(stand_in_permutation).items():
        if name.startswith("moe_"):
            setattr(permutation, name, function)


def dispatcher_sees_a_device(token_dispatcher: Any) -> None:
    """Megatron-Core's, which puts its indices on the GPU where Transformer Engine permutes."""
    from transformer_engine.pytorch.module.base import seen

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.__init__ = seen(dispatcher.__init__)


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "transformer_engine.common": without_libraries,
    "transformer_engine.pytorch.cpp_extensions": with_names_of_the_extension,
    "transformer_engine.pytorch.cpp_extensions.gemm": without_workspace,
    "transformer_engine.pytorch.custom_recipes.gemm": reference_writes_where_it_is_told,
    "transformer_engine.pytorch.utils": on_a_hopper,
    "transformer_engine.pytorch.module.base": checks_see_a_device,
    "transformer_engine.pytorch.permutation": permutation_in_torch,
    "megatron.core.transformer.moe.token_dispatcher": dispatcher_sees_a_device,
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention": attention_sees_a_device,
    "transformer_engine.pytorch.attention.dot_product_attention.context_parallel": ring_sends_at_once,
}


class Changed(MetaPathFinder):
    """Calls the entry of CHANGES after a module has been executed, before anyone imports names from it."""

    def __init__(self) -> None:
        self._looking_for: str | None = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CHANGES or name == self._looking_for:
            return None
        self._looking_for = name
        try:
            spec = find_spec(name)
        finally:
            self._looking_for = None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changed())
