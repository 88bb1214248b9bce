"""What a process finds out about its own machine, without starting another process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from gspo_megatron.device.facts import Gpu, Machine, Package, version_of

DISTRIBUTIONS = {"transformer_engine.pytorch": "transformer-engine", "megatron.core": "megatron-core"}
UNKNOWN = "of unknown version"


def this_process() -> Machine:
    """What a run finds in its own process, on its own GPU. Imports Transformer Engine, where it is installed: call it
    once the environment is set."""
    import torch

    found = torch_and_gpus()
    gpus: tuple[Gpu, ...] = ()
    if found.get("gpus"):
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        gpus = (Gpu(name, capability, torch.cuda.mem_get_info()[1] / 2**30),)
    driver, te = driver_of_kernel(), Package()
    if importlib.util.find_spec("transformer_engine") is not None:
        te = package_of("transformer-engine", imported("transformer_engine.pytorch"))
    return Machine(
        torch=Package(found["version"]),
        torch_cuda=version_of(found["cuda"]),
        gpus=gpus,
        gpu_error=found.get("gpu_error"),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        driver=driver,
        driver_cuda=cuda_of_driver() if driver else (),
        transformer_engine=te,
    )


def set_variables(variables: Mapping[str, str], rank: int) -> None:
    """Sets variables of this process's environment, for a package that is imported after that, and those of torchrun
    where one process runs without it."""
    os.environ.update(variables)
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("LOCAL_RANK", "0")


def torch_and_gpus() -> dict[str, Any]:
    import torch

    answer: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.version.cuda is None:
        return answer
    try:
        torch.cuda.init()
        answer["gpus"] = [
            (p.name, (p.major, p.minor), p.total_memory / 2**30)
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    except Exception as error:
        answer["gpu_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    with suppress(Exception):
        answer["nccl"] = torch.cuda.nccl.version()
    return answer


def imported(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Not there at all, or there and one of its own parts is missing.
        if error.name is not None and name.startswith(error.name):
            known = installed(DISTRIBUTIONS.get(name, name))
            return {"version": known, "error": str(error) if known else None}
        return {"version": UNKNOWN, "error": f"{type(error).__name__}: {error}"}
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        return {"version": UNKNOWN, "error": f"{type(error).__name__}: {lines[0]}"}
    root = sys.modules[name.split(".")[0]]
    own = getattr(module, "__version__", None) or getattr(root, "__version__", None)
    return {"version": str(own or installed(DISTRIBUTIONS.get(name, name)) or UNKNOWN)}


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_of(name: str, answer: Mapping[str, Any]) -> Package:
    """What is installed under another name, such as a development build, may still import."""
    version = installed(name) or answer.get("version")
    return Package(version, answer.get("error") if version else None)


def driver_of_kernel() -> str | None:
    """`580.82.07` of the file that the driver itself writes; None: there is no driver."""
    with suppress(OSError):
        if found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text()):
            return found[0]
    return None


def cuda_of_driver() -> tuple[int, ...]:
    import ctypes

    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return ()
    except (OSError, AttributeError):
        return ()
    return number.value // 1000, number.value % 1000 // 10
