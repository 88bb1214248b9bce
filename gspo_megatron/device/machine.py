"""What a machine lacks for a run.

    machine = this_process()  # device/own.py
    for problem in problems(machine, Needs(dtype="bf16", fp8="blockwise")): ...

Every rule is a pure function of the facts, so each refusal is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gspo_megatron.device.facts import Machine, text_of, version_of
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
        is_installed = machine.transformer_engine.version is not None
        return self.transformer_engine == "auto" and self.dtype == "bf16" and is_installed


@dataclass(frozen=True)
class Problem:
    """What is wrong, with the value and the rule; and what to do."""

    what: str
    fix: str
    is_certain: bool = True
    """Whether it is known to keep a run from working."""

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def problems(machine: Machine, needs: Needs) -> Iterator[Problem]:
    """Everything that keeps a run from working on this machine, the first cause first."""
    if not machine.gpus:
        yield _no_gpu(machine)
        return
    yield from _of_recipe(machine, needs)
    yield from _of_transformer_engine(machine, needs)
    yield from _of_attention(machine, needs)


def driver_problem(machine: Machine) -> Problem | None:
    """The driver is too old for torch's CUDA, or nobody can say; None: it is new enough, or there is none."""
    if machine.driver is None or not machine.torch_cuda:
        return None
    major, oldest = machine.torch_cuda[0], OLDEST_DRIVERS.get(machine.torch_cuda[0])
    if not machine.driver_cuda and oldest is None:
        return Problem(
            f"the driver {machine.driver} was not compared with what CUDA {major} needs, which is not known here (the "
            f"newest known: {max(OLDEST_DRIVERS)})",
            "compare it with the table of drivers in CUDA's release notes (docs.nvidia.com/cuda)",
            is_certain=False,
        )
    runs = f", which runs CUDA {text_of(machine.driver_cuda)}," if machine.driver_cuda else ""
    if machine.driver_cuda >= (major,) if machine.driver_cuda else version_of(machine.driver) >= version_of(oldest):
        return None
    first = f"{oldest}, the first that runs CUDA {major}" if oldest else f"CUDA {major} asks for"
    return Problem(
        f"the driver {machine.driver}{runs} is older than {first}",
        f"upgrade the driver, or install a torch built for CUDA {_newest_cuda(machine)}",
    )


def _newest_cuda(machine: Machine) -> int:
    """The major version of the newest CUDA that the driver runs."""
    if machine.driver_cuda:
        return machine.driver_cuda[0]
    driver = version_of(machine.driver)
    return max((n for n, oldest in OLDEST_DRIVERS.items() if version_of(oldest) <= driver), default=min(OLDEST_DRIVERS))


def _no_gpu(machine: Machine) -> Problem:
    if not machine.torch_cuda:
        return Problem(
            f"torch {machine.torch.version} was built without CUDA and sees no GPU",
            "install a build for CUDA (https://pytorch.org), or set precision.device=cpu",
        )
    what = f"torch {machine.torch.version} for CUDA {text_of(machine.torch_cuda)} sees no GPU"
    if machine.hides_gpus:
        return Problem(f"{what}: CUDA_VISIBLE_DEVICES={machine.visible} hides them all", "unset CUDA_VISIBLE_DEVICES")
    old = driver_problem(machine)
    if old is not None and old.is_certain:
        return Problem(f"{what}: {old.what}", old.fix)
    unknown = "" if old is None else f"; {old.what}: {old.fix}"
    return Problem(
        f"{what} ({machine.gpu_error or 'torch.cuda.is_available() is false'}){unknown}",
        "`nvidia-smi` must list one, in a container too (docker run --gpus all); or set precision.device=cpu",
    )


def _of_recipe(machine: Machine, needs: Needs) -> Iterator[Problem]:
    """The GPU and CUDA that a number format needs."""
    recipe = needs.recipe
    instead = next((name for name, other in RECIPES.items() if other.quantizes and _runs(other, machine)), "none")
    least, oldest, weakest = text_of(recipe.capability), text_of(recipe.cuda), machine.weakest
    if not has_capability(recipe, machine):
        below = f" and below {text_of(recipe.capability_below)}" if recipe.capability_below else ""
        too_new = weakest.capability >= recipe.capability and recipe.why_below
        why = f" ({recipe.why_below})" if too_new else ""
        yield Problem(
            f"precision.fp8={needs.fp8} needs a GPU of compute capability {least} or above{below}, and {weakest.name} "
            f"has {text_of(weakest.capability)}{why}",
            f"set precision.fp8={instead}",
        )
    elif not _has_cuda(recipe, machine):
        yield Problem(
            f"precision.fp8={needs.fp8} needs CUDA {oldest} or newer, and torch {machine.torch.version} was built for "
            f"CUDA {text_of(machine.torch_cuda) or 'none'}",
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
    if machine.transformer_engine.version is None:
        yield Problem(
            f"{asked} needs Transformer Engine, which is not installed",
            f"pip install 'gspo_megatron[te]' ({BUILT_TOGETHER}), or {without}",
        )
    elif machine.transformer_engine.error:
        yield Problem(
            f"{asked}: Transformer Engine {machine.transformer_engine.version} is installed, but `import "
            f"transformer_engine.pytorch` fails with {machine.transformer_engine.error}",
            f"it must be built for torch {machine.torch.version} and CUDA {text_of(machine.torch_cuda)} "
            f"({BUILT_TOGETHER}); install it again, or {without}",
        )
    elif () < machine.transformer_engine.number < needs.recipe.transformer_engine:
        yield Problem(
            f"precision.fp8={needs.fp8} needs Transformer Engine {text_of(needs.recipe.transformer_engine)} or newer, "
            f"and {machine.transformer_engine.version} is installed",
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
    elif needs.dtype == "fp32" and () < machine.transformer_engine.number < FP32_ATTENTION:
        yield Problem(
            f"precision.dtype=fp32: no attention of Transformer Engine {machine.transformer_engine.version} takes "
            f"packed sequences in float32, those of {text_of(FP32_ATTENTION)} and newer do",
            "set precision.dtype=bf16, or precision.transformer_engine=off",
        )


def _runs(recipe: Recipe, machine: Machine) -> bool:
    return has_capability(recipe, machine) and _has_cuda(recipe, machine)


def has_capability(recipe: Recipe, machine: Machine) -> bool:
    """Whether its GPUs can compute in this format."""
    has, below = machine.weakest.capability, recipe.capability_below
    return has >= recipe.capability and (below is None or has < below)


def _has_cuda(recipe: Recipe, machine: Machine) -> bool:
    return machine.torch_cuda >= recipe.cuda
