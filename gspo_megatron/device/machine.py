"""What a GPU run finds on its machine, and what is missing for it.

    machine = Machine.of_this_process()
    for problem in problems(machine, Needs(dtype="bf16", fp8="blockwise")): ...

The facts are collected once, in `of_this_process`; `problems` is a pure function of them, so every refusal is tested
without a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.device.precision import RECIPES, Recipe

BUILT_TOGETHER = "nvcr.io/nvidia/pytorch:26.06-py3 has PyTorch 2.13, CUDA 13.3 and a Transformer Engine built for them"
"""Versions that were built together (https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/
rel-26-06.html)."""

OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""By CUDA's major version: the oldest Linux driver that runs its programs
(https://docs.nvidia.com/cuda/cuda-toolkit-release-notes, minor version compatibility)."""

FP32_ATTENTION = (2, 11)
"""The first Transformer Engine whose attention takes packed sequences in float32 (its unfused one)."""


@dataclass(frozen=True)
class Machine:
    """The GPU of a process and the libraries that drive it. An empty text: not there.

    Attributes:
        gpu, num_gpus: name of this process's GPU, and how many the process sees.
        gpu_error: what starting CUDA said, where torch sees no GPU.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
        capability: compute capability, (9, 0) for Hopper.
        memory_gib, free_gib: of the GPU, and what other processes have left of it.
        driver: version of NVIDIA's kernel driver.
        torch, cuda, nccl: version of torch, and of the CUDA and NCCL it was built for.
        triton, transformer_engine: versions of the packages.
        transformer_engine_error: what `import transformer_engine.pytorch` said, where it did not work.
    """

    gpu: str = ""
    num_gpus: int = 0
    gpu_error: str = ""
    visible: str | None = None
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0
    free_gib: float = 0.0
    driver: str = ""
    torch: str = ""
    cuda: str = ""
    nccl: str = ""
    triton: str = ""
    transformer_engine: str = ""
    transformer_engine_error: str = ""

    @classmethod
    def of_this_process(cls) -> Machine:
        """Imports Transformer Engine, where it is installed: call it once the environment is set."""
        gpu: dict[str, Any] = {}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            gpu = {
                "gpu": torch.cuda.get_device_name(),
                "num_gpus": torch.cuda.device_count(),
                "capability": torch.cuda.get_device_capability(),
                "memory_gib": total / 2**30,
                "free_gib": free / 2**30,
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            }
        has_te = find_spec("transformer_engine") is not None
        return cls(
            **gpu,
            gpu_error="" if gpu else _error_of(torch.cuda.init),
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            driver=_driver(),
            torch=torch.__version__,
            cuda=torch.version.cuda or "",
            triton=_version("triton") or _version("pytorch-triton"),
            transformer_engine=_version("transformer-engine") or ("of unknown version" if has_te else ""),
            transformer_engine_error=_error_of(lambda: import_module("transformer_engine.pytorch")) if has_te else "",
        )

    @property
    def has_transformer_engine(self) -> bool:
        return bool(self.transformer_engine) and not self.transformer_engine_error


@dataclass(frozen=True)
class Needs:
    """What a run asks of its machine: the values of precision.dtype, fp8 and transformer_engine, and of parallel.cp."""

    dtype: str = "bf16"
    fp8: str = "none"
    transformer_engine: str = "auto"
    cp: int = 1

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.fp8]

    @property
    def needs_transformer_engine(self) -> bool:
        return self.transformer_engine == "on" or "local" not in self.recipe.layers

    def uses_transformer_engine(self, machine: Machine) -> bool:
        """Whether the model is built from its layers. `auto` leaves float32 to Megatron's local layers: Transformer
        Engine's fast attention takes bf16 alone."""
        if self.needs_transformer_engine:
            return True
        return self.transformer_engine == "auto" and self.dtype == "bf16" and bool(machine.transformer_engine)


@dataclass(frozen=True)
class Problem:
    """What is wrong, with the value and the rule; and what to do."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def problems(machine: Machine, needs: Needs) -> Iterator[Problem]:
    """Everything that keeps a run from working on this machine, the first cause first."""
    if not machine.gpu:
        yield _no_gpu(machine)
        return
    yield from _of_recipe(machine, needs)
    yield from _of_transformer_engine(machine, needs)
    yield from _of_attention(machine, needs)


def _no_gpu(machine: Machine) -> Problem:
    if not machine.cuda:
        return Problem(
            f"torch {machine.torch} was built without CUDA and sees no GPU",
            "install a build for CUDA (https://pytorch.org), or set precision.device=cpu",
        )
    what = f"torch {machine.torch} for CUDA {machine.cuda} sees no GPU"
    if machine.visible in ("", "-1"):
        return Problem(f"{what}: CUDA_VISIBLE_DEVICES={machine.visible} hides them all", "unset CUDA_VISIBLE_DEVICES")
    major = _numbers(machine.cuda)[0]
    oldest = OLDEST_DRIVERS.get(major, "")
    if machine.driver and _numbers(machine.driver) < _numbers(oldest):
        return Problem(
            f"{what}: the driver {machine.driver} is older than {oldest}, the first that runs CUDA {major}",
            f"upgrade the driver, or install a torch built for CUDA {_newest_cuda(machine.driver)}",
        )
    return Problem(
        f"{what} ({machine.gpu_error or 'torch.cuda.is_available() is false'})",
        "`nvidia-smi` must list one, in a container too (docker run --gpus all); or set precision.device=cpu",
    )


def _newest_cuda(driver: str) -> str:
    """The newest CUDA that a driver runs, as in `12`."""
    majors = [major for major, oldest in OLDEST_DRIVERS.items() if _numbers(oldest) <= _numbers(driver)]
    return str(max(majors, default=min(OLDEST_DRIVERS)))


def _of_recipe(machine: Machine, needs: Needs) -> Iterator[Problem]:
    """The GPU and CUDA that a number format needs."""
    recipe = needs.recipe
    instead = next((name for name, other in RECIPES.items() if other.quantizes and _runs(other, machine)), "none")
    least, oldest = _dotted(recipe.capability), _dotted(recipe.cuda)
    if not _has_capability(recipe, machine):
        below = f" and below {_dotted(recipe.capability_below)}" if recipe.capability_below else ""
        yield Problem(
            f"precision.fp8={needs.fp8} needs a GPU of compute capability {least} or above{below}, and {machine.gpu} "
            f"has {_dotted(machine.capability)}",
            f"set precision.fp8={instead}",
        )
    elif not _has_cuda(recipe, machine):
        yield Problem(
            f"precision.fp8={needs.fp8} needs CUDA {oldest} or newer, and torch {machine.torch} was built for CUDA "
            f"{machine.cuda or 'none'}",
            f"install a torch for CUDA {oldest} or newer and a Transformer Engine built for it ({BUILT_TOGETHER}), or "
            f"set precision.fp8={instead}",
        )


def _of_transformer_engine(machine: Machine, needs: Needs) -> Iterator[Problem]:
    if not needs.uses_transformer_engine(machine):
        return
    asked = f"precision.transformer_engine={needs.transformer_engine}"
    if needs.recipe.quantizes:
        asked = f"precision.fp8={needs.fp8}"
    without = "set precision.transformer_engine=off" + (" and precision.fp8=none" if needs.recipe.quantizes else "")
    if not machine.transformer_engine:
        yield Problem(
            f"{asked} needs Transformer Engine, which is not installed",
            f"pip install 'gspo_megatron[te]' ({BUILT_TOGETHER}), or {without}",
        )
    elif machine.transformer_engine_error:
        yield Problem(
            f"{asked}: Transformer Engine {machine.transformer_engine} is installed, but `import "
            f"transformer_engine.pytorch` fails with {machine.transformer_engine_error}",
            f"it must be built for torch {machine.torch} and CUDA {machine.cuda} ({BUILT_TOGETHER}); install it again, "
            f"or {without}",
        )
    elif () < _numbers(machine.transformer_engine) < needs.recipe.transformer_engine:
        yield Problem(
            f"precision.fp8={needs.fp8} needs Transformer Engine {_dotted(needs.recipe.transformer_engine)} or newer, "
            f"and {machine.transformer_engine} is installed",
            f"upgrade it ({BUILT_TOGETHER}), or set precision.fp8=none",
        )


def _of_attention(machine: Machine, needs: Needs) -> Iterator[Problem]:
    """Attention that has no kernel for what is asked."""
    if not needs.uses_transformer_engine(machine):
        if needs.cp > 1:
            yield Problem(
                f"parallel.cp={needs.cp} on a GPU needs Transformer Engine and precision.dtype=bf16: attention without "
                "it holds a mask of every query with every key, so its memory grows with the square of the length",
                "set parallel.cp=1, or install Transformer Engine (pip install 'gspo_megatron[te]') and set "
                "precision.dtype=bf16",
            )
    elif needs.dtype == "fp32" and needs.cp > 1:
        yield Problem(
            f"parallel.cp={needs.cp} with precision.dtype=fp32: Transformer Engine computes float32 with its unfused "
            "attention alone, which has no context parallelism",
            "set precision.dtype=bf16, or parallel.cp=1",
        )
    elif needs.dtype == "fp32" and () < _numbers(machine.transformer_engine) < FP32_ATTENTION:
        yield Problem(
            f"precision.dtype=fp32: no attention of Transformer Engine {machine.transformer_engine} takes packed "
            f"sequences in float32, those of {_dotted(FP32_ATTENTION)} and newer do",
            "set precision.dtype=bf16, or precision.transformer_engine=off",
        )


def _runs(recipe: Recipe, machine: Machine) -> bool:
    return _has_capability(recipe, machine) and _has_cuda(recipe, machine)


def _has_capability(recipe: Recipe, machine: Machine) -> bool:
    below = recipe.capability_below
    return machine.capability >= recipe.capability and (below is None or machine.capability < below)


def _has_cuda(recipe: Recipe, machine: Machine) -> bool:
    return _numbers(machine.cuda) >= recipe.cuda


def _numbers(text: str) -> tuple[int, ...]:
    """`12.9` -> (12, 9), `2.10.0+abc` -> (2, 10, 0); () for an empty text."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text)[0])))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _error_of(call: Callable[[], Any]) -> str:
    """What `call` raised, in one line; empty where it did not."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(".")
    return ""


def _driver() -> str:
    """`580.82.07` of /proc/driver/nvidia/version, which the driver itself writes."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text()) if path.is_file() else None
    return found[0] if found else ""
