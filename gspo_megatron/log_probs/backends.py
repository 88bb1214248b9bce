"""Which kernels are used: torch's, or Triton's where those run, the same on all ranks of a group.

Triton compiles a kernel when it is first launched, so only a launch shows whether its compiler, the assembler, the C
compiler of its launchers and the driver can make ours work. `agree` therefore launches each of them once, on a few
rows. A rank that fell back by itself would round differently from the others: those that share its vocabulary, and its
data-parallel replicas. A run agrees over all of its ranks, a call by itself over the ranks of its vocabulary.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TextIO, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.log_probs import torch_kernels
from gspo_megatron.log_probs.blocks import Kernels
from gspo_megatron.log_probs.shards import Shards

BACKENDS = ("auto", "torch", "triton")
HOSTS = ("cpu", "meta")
"""Types of devices on which `auto` does not try Triton."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TESTED_TRITON = ("3.5.1", "3.6.0", "3.8.0", "3.9.0")
"""The versions that `make test-triton` compiles the kernels with."""
CHOICES = (
    "train.log_prob_backend (in Python backend=) chooses the kernels: auto falls back to torch's, torch never tries "
    "Triton, triton makes this an error"
)

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What the ranks of a group have agreed on, equal on all of them."""

    backend: str
    warning: str = ""
    """Of one line: why the kernels are not Triton's, where they should be."""


def agree(backend: str, device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Choice:
    """`torch` or `triton`, for hidden states of this dtype on this kind of device. Where Triton comes into question,
    the first call for a device, dtype and group is collective in the group.

    auto: Triton's on GPUs with what they need, else torch's.

    Raises:
        ConfigError: an unknown backend, or `triton` where its kernels do not run on every rank of the group.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "triton" and dtype not in TRITON_DTYPES:
        raise ConfigError(f"backend='triton' does not support {_name(dtype)}; use torch or auto")
    is_candidate = device.type not in HOSTS and dtype in TRITON_DTYPES
    if backend == "torch" or (backend == "auto" and not is_candidate):
        return Choice("torch")
    trial = _worst_trial(device, dtype, group)
    if trial.state == RUNS:
        return Choice("triton")
    if backend == "triton":
        raise ConfigError(trial.text)
    return Choice("torch", trial.text if trial.state == FAILED else "")


def choose(backend: str, x: Tensor, group: dist.ProcessGroup | None) -> Kernels:
    """The kernels for hidden states like x, by `agree` in the group. Its first rank logs a warning, once."""
    choice = agree(backend, x.device, x.dtype, group)
    if choice.warning and Shards.of(group).rank == 0:
        _warn(choice.warning)
    return _triton_kernels() if choice.backend == "triton" else torch_kernels


@cache
def _warn(text: str) -> None:
    _log.warning("%s", text)


class _Trial(NamedTuple):
    """What came of launching the kernels."""

    state: int
    text: str = ""


RUNS, NOT_MEANT_TO, FAILED = range(3)


@cache
def _worst_trial(device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup | None) -> _Trial:
    """The trial of the rank where it went worst. Collective. Kernels that are not meant to run on one rank and run on
    another have failed."""
    mine, size = _try(device, dtype), Shards.of(group).size
    if size == 1:
        return mine
    trials = [mine] * size
    dist.all_gather_object(trials, mine, group=group)
    worst = max(trials)
    if worst.state == RUNS:
        return worst
    is_uneven = any(trial.state == RUNS for trial in trials)
    return _Trial(FAILED if is_uneven else worst.state, f"rank {trials.index(worst)} of {size}: {worst.text}")


@cache
def _try(device: torch.device, dtype: torch.dtype) -> _Trial:
    """Launches every kernel once. Compiles what a call with sizes that are multiples of 16 needs."""
    version = "of no version"
    try:
        if find_spec("triton") is None or find_spec("triton.tools.tensor_descriptor") is None:
            return _Trial(NOT_MEANT_TO, f"Triton's log-prob kernels need Triton {TESTED_TRITON[0]} or newer. {CHOICES}")
        triton = import_module("triton")
        version = triton.__version__
        if not triton.knobs.runtime.interpret:
            architecture = triton.runtime.driver.active.get_current_target().arch
            # Their tiles need the shared memory and the copy engine of Hopper.
            if not (isinstance(architecture, int) and architecture >= 90):
                text = f"Triton's log-prob kernels need compute capability 9.0 or newer, {device} has {architecture}"
                return _Trial(NOT_MEANT_TO, f"{text}. {CHOICES}")
        with _silence():  # Triton prints the whole program where ptxas fails
            _launch_all(_triton_kernels(), device, dtype)
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        return _Trial(
            FAILED,
            f"Triton {version} cannot run the log-prob kernels for {_name(dtype)} on {device}: {_in_one_line(error)}. "
            f"Tested with Triton {', '.join(TESTED_TRITON)}. {CHOICES}",
        )
    return _Trial(RUNS)


def _launch_all(kernels: Any, device: torch.device, dtype: torch.dtype) -> None:
    rows, columns, width = 16, 512, 64
    hidden_bH = torch.ones(rows, width, device=device, dtype=dtype)
    weight_cH = torch.ones(columns, width, device=device, dtype=dtype)
    z_bc = torch.zeros(rows, columns, device=device)
    kept_bc = torch.empty_like(z_bc, dtype=dtype)
    columns_b = torch.zeros(rows, device=device, dtype=torch.int64)
    row_b = torch.ones(rows, device=device)
    for with_entropy in (False, True):
        kernels.linear_statistics(hidden_bH, weight_cH, columns_b, 1.0, with_entropy=with_entropy)
        kernels.row_statistics(z_bc, columns_b, with_entropy=with_entropy)
        kernels.row_statistics(z_bc, columns_b, with_entropy=with_entropy, kept_bc=kept_bc)
    kernels.gradients_of_kept(kept_bc, columns_b, row_b, row_b)
    kernels.logit_gradients(z_bc, columns_b, row_b, row_b, out_bc=kept_bc)
    kernels.logit_gradients(z_bc, columns_b, row_b, row_b, (row_b, row_b), out_bc=kept_bc)
    kept_bc.cpu()  # waits for the device: a launch that it refuses shows here


_silencing = threading.Lock()


@contextmanager
def _silence() -> Iterator[None]:
    """Drops what this thread prints. `sys.stdout` belongs to the whole process, so other threads go on printing."""
    out, this_thread = sys.stdout, threading.get_ident()

    class Others:
        def write(self, text: str) -> int:
            return len(text) if threading.get_ident() == this_thread else out.write(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(out, name)

    with _silencing:
        sys.stdout = cast(TextIO, Others())
        try:
            yield
        finally:
            sys.stdout = out


def _triton_kernels() -> Any:
    return import_module("gspo_megatron.log_probs.triton_kernels")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_one_line(error: Exception, limit: int = 300) -> str:
    """Its type and message; of a long one, which may quote a kernel and a command, the beginning and the end."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
