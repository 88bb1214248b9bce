"""The GPU of a process: environment variables first, then the first call to CUDA.

What CUDA, NCCL and Transformer Engine read from the environment, they read once: when CUDA starts, or when they are
imported. So the variables are set before either, and a value that the user has set stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.device.precision import RECIPES


@dataclass(frozen=True)
class Variable:
    """An environment variable that a run needs.

    Attributes:
        name, value: as they are set where the user has not.
        why: what the value does.
        accepted: the user's values that serve as well.
        otherwise: what becomes of any other value of the user's: refused, kept with a warning, or kept.
        aliases: other names of the same setting.
    """

    name: str
    value: str
    why: str
    accepted: tuple[str, ...] = ()
    otherwise: Literal["refuse", "warn", "keep"] = "warn"
    aliases: tuple[str, ...] = ()


ALWAYS = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "with one hardware queue, kernels start in the order they were queued, so that communication of tensor and "
        "context parallel overlaps with matmuls (GPUs before Blackwell)",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "micro-batches differ in length, and segments that grow keep their memory from fragmenting",
        otherwise="keep",
        aliases=("PYTORCH_ALLOC_CONF",),
    ),
)
DETERMINISTIC = (
    Variable(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "0",
        "the backward of Transformer Engine's attention adds in a fixed order",
        otherwise="refuse",
    ),
    Variable(
        "CUBLAS_WORKSPACE_CONFIG",
        ":4096:8",
        "cuBLAS gives equal products equal workspaces, and so equal sums",
        accepted=(":16:8",),
        otherwise="refuse",
    ),
    Variable(
        "NCCL_ALGO",
        "Ring",
        "reductions across ranks add in a fixed order, which NVLink's in-switch sums do not",
        accepted=("Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
        otherwise="refuse",
    ),
)
"""With precision.deterministic. The values are those that Megatron-LM's --deterministic-mode accepts."""


def variables_of(fp8: str, deterministic: bool) -> tuple[Variable, ...]:
    """What a run with these values of precision.fp8 and precision.deterministic needs."""
    of_recipe = (
        Variable(name, value, f"precision.fp8={fp8} is computed with it; Transformer Engine reads it when imported")
        for name, value in RECIPES[fp8].environment.items()
    )
    return (*ALWAYS, *of_recipe, *(DETERMINISTIC if deterministic else ()))


def set_variables(variables: Iterable[Variable], environment: MutableMapping[str, str]) -> list[str]:
    """Sets what the user has not set. Returns a sentence for each value of the user's that the run would rather not
    have.

    Raises:
        ConfigError: a value of the user's contradicts what was asked for in the settings.
    """
    warnings = []
    for variable in variables:
        names = [name for name in (variable.name, *variable.aliases) if name in environment]
        if not names:
            environment[variable.name] = variable.value
            continue
        value = environment[names[0]]
        if variable.otherwise == "keep" or value in (variable.value, *variable.accepted):
            continue
        wanted = " or ".join((variable.value, *variable.accepted))
        if variable.otherwise == "refuse":
            raise ConfigError(
                f"precision.deterministic=true with {names[0]}={value} in the environment: {variable.why} only with "
                f"{wanted}; unset {names[0]}, or set precision.deterministic=false"
            )
        warnings.append(
            f"{names[0]}={value} in the environment is kept; a run sets {wanted}: {variable.why}. Unset it to get that"
        )
    return warnings


def open_gpu(local_rank: int) -> torch.device:
    """The GPU of this process, made current: the first call to CUDA that starts it.

    Raises:
        ConfigError: there are fewer GPUs than this node has processes.
    """
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this process sees {count} GPU{'s' * (count > 1)}{seen}: every process needs "
            f"its own; start torchrun with --nproc_per_node {count}, and let every process see all GPUs of its node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
