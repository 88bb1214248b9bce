"""Gathers the facts of facts.py for the doctor.

What may crash, hang or never return is asked in a process of its own, with a time limit.

python -m gspo_megatron.device.gather torch        what one of those processes runs; prints JSON
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from gspo_megatron.device.facts import Facts, Gpu, Kernel, Package, version_of
from gspo_megatron.device.own import cuda_of_driver, driver_of_kernel, imported, installed, package_of, torch_and_gpus

ENVIRONMENT = ("CUDA_", "NVTE_", "NCCL_", "TORCH_NCCL_", "PYTORCH_", "TRITON_", "MASTER_")
"""Beginnings of the names of environment variables that a run's outcome or speed depends on."""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
PROBES: Mapping[str, tuple[str, ...]] = {
    "torch": ("gspo_megatron.device.gather", "torch"),
    "transformer_engine": ("gspo_megatron.device.gather", "transformer_engine.pytorch"),
    "apex": ("gspo_megatron.device.gather", "apex"),
    "megatron": ("gspo_megatron.device.gather", "megatron.core"),
    "pair": ("gspo_megatron.mcore.try_te",),
    "host_name": ("gspo_megatron.device.gather", "host_name"),
    "kernel": ("gspo_megatron.log_probs.try_kernels", "cuda", "90"),
}
UNLIMITED = 1 << 60
"""Bytes; larger limits mean none."""


def gather(directory: Path, pins: Path | None, limit_s: float) -> Facts:
    """Everything at once; no part takes longer than about `limit_s`."""
    # A package that is not there needs no process to say so.
    found = ask({name: probe for name, probe in PROBES.items() if _is_there(name)}, limit_s)
    found |= {name: {} for name in PROBES.keys() - found.keys()}
    driver, used_gib = _driver_and_use()
    used_gib = seen(used_gib, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch_says = found["torch"]
    gpus = [
        Gpu(name, tuple(capability), memory_gib, used_gib[i] if i < len(used_gib) else 0.0)
        for i, (name, capability, memory_gib) in enumerate(torch_says.get("gpus", ()))
    ]
    free_gib, directory_error = _disk(directory)
    return Facts(
        python=sys.version_info[:3],
        torch=package_of("torch", torch_says),
        torch_cuda=version_of(torch_says.get("cuda")),
        gpus=tuple(gpus),
        gpu_error=torch_says.get("gpu_error"),
        nccl=tuple(torch_says.get("nccl", ())),
        driver=driver,
        driver_cuda=cuda_of_driver() if driver else (),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        megatron=package_of("megatron-core", found["megatron"]),
        transformer_engine=package_of("transformer-engine", found["transformer_engine"]),
        pair_error=found["pair"].get("error"),
        apex=package_of("apex", found["apex"]),
        triton=Package(installed("triton") or installed("pytorch-triton")),
        kernel=_kernel(found["kernel"]),
        environment={k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT) or k in TORCHRUN},
        shared_memory_gib=_shared_memory_gib(),
        locked_memory_gib=_locked_memory_gib(),
        directory=str(directory),
        directory_error=directory_error,
        free_disk_gib=free_gib,
        host_memory_gib=_host_memory_gib(),
        host_name=socket.gethostname(),
        host_name_error=found["host_name"].get("error"),
        cores=len(os.sched_getaffinity(0)),
        clock_behind_s=max(0.0, max(p.stat().st_mtime for p in Path(__file__).parent.glob("*.py")) - time.time()),
        pins=_compared(pins),
    )


def ask(probes: Mapping[str, Sequence[str]], limit_s: float) -> dict[str, dict[str, Any]]:
    """The JSON that each `python -m ...` prints on its last line; {"error": ...} where it prints none, crashes, or does
    not end within `limit_s`. All run at the same time."""
    # As one process of a run would see it, and without the wish to join one.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))}
    started = time.monotonic()
    answers = {}
    with ExitStack() as files:
        running = []
        for name, arguments in probes.items():
            # Not pipes: whoever reads one waits for every process that holds its other end.
            out, errors = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            command = [sys.executable, "-W", "ignore", "-m", *arguments]
            # A session of its own: what the probe starts ends with it.
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, start_new_session=True)
            running.append((name, process, out, errors))
        for name, process, out, errors in running:
            try:
                status = process.wait(max(0.1, started + limit_s - time.monotonic()))
                answers[name] = _answer(status, _text(out), _text(errors))
            except subprocess.TimeoutExpired:
                answers[name] = {"error": f"no answer within {limit_s:.0f} s"}
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A process that waits for a driver cannot be killed, and nobody waits for it here.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
    return answers


def _answer(status: int, out: str, errors: str) -> dict[str, Any]:
    with suppress(ValueError, IndexError):
        answer = json.loads(out.strip().splitlines()[-1])
        if status == 0 and isinstance(answer, dict):
            return answer
    if status < 0:
        return {"error": f"crashed ({signal.Signals(-status).name})"}
    lines = errors.strip().splitlines()
    return {"error": lines[-1] if lines else f"exit status {status}"}


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def _root() -> str:
    return str(Path(__file__).parents[2])


def _is_there(probe: str) -> bool:
    if probe == "pair":
        return all(map(_is_there, ("megatron", "transformer_engine")))
    return probe in ("kernel", "host_name") or importlib.util.find_spec(probe) is not None


def _kernel(answer: Mapping[str, Any]) -> Kernel:
    known = {"architecture", "ran", "seconds", "largest_error", "error"}
    told = {key: value for key, value in answer.items() if key in known}
    return Kernel(**told, tested=tuple(answer.get("tested", ())))


def _driver_and_use() -> tuple[str | None, list[float]]:
    """The driver's version, and GiB in use on every GPU, which only nvidia-smi tells."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
        return rows[0][0], [float(used) / 1024 for _, used in rows]
    return driver_of_kernel(), []


def seen(used_gib: list[float], visible: str | None) -> list[float]:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; empty where it does not number them."""
    if visible is None:
        return used_gib
    numbers = [name.strip() for name in visible.split(",")]
    if not all(number.isdecimal() and int(number) < len(used_gib) for number in numbers):
        return []
    return [used_gib[int(number)] for number in numbers]


def _disk(directory: Path) -> tuple[float, str | None]:
    """Free GiB where `directory` is or would be made, and why nothing can be written there."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
        error = None
    except OSError as raised:
        error = str(raised)
    return shutil.disk_usage(place).free / 2**30, error


def _shared_memory_gib() -> float:
    try:
        return shutil.disk_usage("/dev/shm").total / 2**30
    except OSError:
        return 0.0


def _locked_memory_gib() -> float | None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or limit > UNLIMITED else limit / 2**30


def _host_memory_gib() -> float:
    """Of the machine, or of this container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / 2**30


def _compared(pins: Path | None) -> dict[str, tuple[str, str | None]] | None:
    """The pinned and the installed version of the packages that setup.py names and pins.txt pins."""
    if pins is None or not pins.is_file():
        return None
    from packaging.requirements import Requirement

    lines = pins.read_text().partition("# Brought by those")[0].splitlines()
    found = {}
    for requirement in map(Requirement, filter(None, (line.split("#")[0].strip() for line in lines))):
        if requirement.marker is None or requirement.marker.evaluate():
            (pinned,) = requirement.specifier
            found[requirement.name] = (pinned.version, installed(requirement.name))
    return found


# --- what the processes run ---


def host_name() -> dict[str, Any]:
    """The address of this host's name, by which the processes of torchrun find each other."""
    try:
        socket.getaddrinfo(socket.getfqdn(socket.gethostname()), None)
    except OSError as error:
        return {"error": str(error)}
    return {}


def main(name: str) -> None:
    own: Mapping[str, Callable[[], dict[str, Any]]] = {"torch": torch_and_gpus, "host_name": host_name}
    print(json.dumps(own[name]() if name in own else imported(name)))


if __name__ == "__main__":
    main(sys.argv[1])
