"""What `gspo_megatron.doctor` checks, as a table: a check is a function of the facts.

A finding is OK; a NOTE, to be read once; a LIMIT: a run can start, but not with everything; or WRONG: no run can start.
Every finding that is not OK says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from gspo_megatron.base.errors import plural
from gspo_megatron.device.cuda import set_variables, variables_of
from gspo_megatron.device.facts import Facts, Gpu, Package, text_of
from gspo_megatron.device.machine import Needs, Problem, driver_problem, has_capability, problems
from gspo_megatron.device.precision import RECIPES

PYTHON_LEAST = (3, 10)
TORCH_LEAST = (2, 6)
MEGATRON_TESTED = ((0, 16, 1), (0, 19, 2))
HOPPER, AMPERE = (9, 0), (8, 0)
SOME_GPU = Gpu("a GPU", (0, 0), 0.0)
"""Stands for the one that an image will run on."""
KERNEL_TOLERANCE = 2.0**-7
"""bf16 factors, and a bf16 matrix D in the backward."""


class State(Enum):
    OK = "ok"
    NOTE = "note"
    LIMIT = "limit"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """`found`: what is there. `problem` and `advice`: what is wrong and what to do; empty where all is well."""

    state: State
    found: str
    problem: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Check:
    name: str
    judge: Callable[[Facts], Finding]
    at_build: bool = True
    """Whether it can be answered while an image is built: without the GPU and the machine that will run it."""


def ok(found: str) -> Finding:
    return Finding(State.OK, found)


def python(f: Facts) -> Finding:
    if f.python < PYTHON_LEAST:
        needed = text_of(PYTHON_LEAST)
        return Finding(
            State.WRONG, text_of(f.python), f"older than {needed}", f"make the environment with Python {needed}"
        )
    return ok(text_of(f.python))


def torch(f: Facts) -> Finding:
    found = f"{f.torch.version}, " + (f"CUDA {text_of(f.torch_cuda)}" if f.torch_cuda else "a CPU build")
    if not f.torch.works:
        return _broken("torch", f.torch, State.WRONG, "pip install -r requirements/torch.txt (docs/dependencies.md)")
    if f.torch.number < TORCH_LEAST:
        return Finding(State.WRONG, found, f"older than {text_of(TORCH_LEAST)}", "install a newer one")
    return ok(found)


def driver(f: Facts) -> Finding:
    if f.driver is None:
        if f.torch_cuda:
            problem = "no NVIDIA driver, so no GPU; runs use the CPU, which works"
            return Finding(State.NOTE, "none", problem, "on a GPU machine: docker run --gpus all; nvidia-smi")
        return ok("none; this torch needs none")
    found = f.driver + (f", runs CUDA {text_of(f.driver_cuda)}" if f.driver_cuda else "")
    old = driver_problem(f)
    if old is None:
        return ok(found)
    return Finding(State.WRONG if old.is_certain else State.LIMIT, found, old.what, old.fix)


def gpus(f: Facts) -> Finding:
    if not f.gpus:
        if f.driver is None or not f.torch_cuda:
            if f.driver is not None:
                problem = "torch is a CPU build, so runs use the CPU"
                advice = "install a CUDA build of torch to use the GPU (docs/dependencies.md)"
                return Finding(State.LIMIT, "none that torch can use", problem, advice)
            advice = "nothing to do: precision.device=auto, the default, takes the CPU"
            return Finding(State.NOTE, "none", "the CPU lane works", advice)
        if f.hides_gpus:
            problem, advice = f"CUDA_VISIBLE_DEVICES={f.visible!r} hides them", "unset CUDA_VISIBLE_DEVICES"
        else:
            problem = f.gpu_error or "torch sees none, though there is a driver"
            advice = "docker run --gpus all; nvidia-smi must list them inside the container"
        return Finding(State.WRONG, "none", problem, advice)
    kinds = {(gpu.name, gpu.capability, round(gpu.memory_gib)) for gpu in f.gpus}
    found = f"{len(f.gpus)} x " + "; ".join(f"{name}, sm_{a}{b}, {gib} GiB" for name, (a, b), gib in sorted(kinds))
    weakest = f.weakest.capability
    if weakest < AMPERE:
        problem = "no bf16 before compute capability 8.0"
        return Finding(State.LIMIT, found, problem, "use precision.dtype=fp32, or newer GPUs")
    if weakest < HOPPER:
        problem = "before 9.0: no FP8, and torch kernels for log-probs"
        return Finding(State.LIMIT, found, problem, "precision.fp8=none; H100 or newer for the rest")
    if len(kinds) > 1:
        problem = "GPUs of different kinds: every step waits for the slowest"
        return Finding(State.LIMIT, found, problem, "CUDA_VISIBLE_DEVICES chooses those that are alike")
    if used := [f"{i}: {gpu.used_gib:.1f}" for i, gpu in enumerate(f.gpus) if gpu.used_gib > 2]:
        problem = f"memory in use by other processes, GiB by GPU: {', '.join(used)}"
        return Finding(State.LIMIT, found, problem, "nvidia-smi lists the processes; end them, or use other GPUs")
    return ok(found)


def nccl(f: Facts) -> Finding:
    if not f.torch_cuda:
        return ok("not needed: gloo")
    if not f.nccl:
        problem = "this torch has no NCCL, so GPUs cannot talk to each other"
        return Finding(State.WRONG if f.gpus else State.LIMIT, "none", problem, "install a torch for Linux from PyPI")
    return ok(text_of(f.nccl))


def megatron(f: Facts) -> Finding:
    tested = " and ".join(map(text_of, MEGATRON_TESTED))
    if not f.megatron.works:
        advice = "pip install -r requirements/megatron.txt"
        if "resiliency" in (f.megatron.error or ""):
            advice = "pip uninstall nvidia-resiliency-ext (older than 0.6 breaks Megatron-Core from 0.17 on)"
        elif f.megatron.error and f.megatron.error == f.transformer_engine.error:
            advice = "Megatron-Core imports Transformer Engine: install it in full, or uninstall it"
        return _broken("Megatron-Core", f.megatron, State.WRONG, advice)
    found = str(f.megatron.version)
    if f.megatron.number[:3] < MEGATRON_TESTED[0]:
        problem = f"older than {text_of(MEGATRON_TESTED[0])}"
        return Finding(State.WRONG, found, problem, "pip install -r requirements/megatron.txt")
    if f.megatron.number[:3] not in MEGATRON_TESTED:
        return Finding(State.LIMIT, found, f"not tested here; {tested} are", "install one of those, or run make test")
    return ok(found)


def transformer_engine(f: Facts) -> Finding:
    te = f.transformer_engine
    if te.version is None and not f.torch_cuda:
        return ok("not needed: this torch has no CUDA")
    found = te.version or "not installed"
    on_a_gpu = replace(f, gpus=f.gpus or (SOME_GPU,))
    problem = next(problems(on_a_gpu, Needs(transformer_engine="on")), None)
    if problem is None and f.pair_error:
        advice = "install a pair that works together (docs/dependencies.md)"
        return Finding(State.LIMIT, found, f.pair_error, advice)
    return ok(found) if problem is None else Finding(State.LIMIT, found, problem.what, problem.fix)


def apex(f: Facts) -> Finding:
    if f.apex.version is None:
        return ok("not installed; not needed")
    if not f.apex.works:
        return Finding(State.NOTE, str(f.apex.version), str(f.apex.error), "not needed: uninstall it, or rebuild it")
    return ok(str(f.apex.version))


def triton(f: Facts) -> Finding:
    kernel, found = f.kernel, f"Triton {f.triton.version}"
    on_gpu = bool(f.torch_cuda)
    if not f.triton.version:
        if not on_gpu:
            return ok("Triton not installed; the CPU uses torch")
        problem = "log-probs use torch kernels, with the logits in memory"
        return Finding(State.LIMIT, "not installed", problem, "pip install the Triton that your torch asks for")
    if kernel.error:
        where = "on this GPU" if kernel.ran else f"to compile for sm_{kernel.architecture}"
        problem = f"the log-prob kernel fails {where}: {kernel.error}"
        tested = f"; tested with Triton {', '.join(kernel.tested)}" if kernel.tested else ""
        advice = f"runs fall back to torch kernels{tested}"
        return Finding(State.LIMIT if on_gpu else State.NOTE, found, problem, advice)
    if kernel.largest_error is not None and not kernel.largest_error <= KERNEL_TOLERANCE:
        problem = f"the log-prob kernel is off by {kernel.largest_error:.1e}, more than {KERNEL_TOLERANCE:.1e}"
        return Finding(State.WRONG, found, problem, "do not train with it: another Triton, and please report it")
    what = f"runs, error {kernel.largest_error:.0e}" if kernel.ran else f"compiles for sm_{kernel.architecture}"
    return ok(f"{found}; the log-prob kernel {what} ({kernel.seconds:.0f} s)")


def fp8(f: Facts) -> Finding:
    """Which rows of RECIPES the GPUs, torch's CUDA and Transformer Engine can compute."""
    if not f.torch_cuda:
        return ok("not needed: this torch has no CUDA")
    quantizing = [name for name, recipe in RECIPES.items() if recipe.quantizes]
    complaints = {name: problem_of_recipe(name, f) for name in quantizing}
    working = [name for name, problem in complaints.items() if problem is None]
    found = f"precision.fp8={' or '.join(working)}" if working else "no recipe works"
    best = next((name for name in quantizing if not f.gpus or has_capability(RECIPES[name], f)), quantizing[0])
    problem = complaints[best]
    if problem is not None and not f.transformer_engine.works:
        return Finding(State.LIMIT, found, "Transformer Engine does not work", "see there, or use precision.fp8=none")
    return ok(found) if problem is None else Finding(State.LIMIT, found, problem.what, problem.fix)


def problem_of_recipe(name: str, f: Facts) -> Problem | None:
    """The first thing that keeps a run with precision.fp8=`name` from working."""
    gpus = f.gpus or (replace(SOME_GPU, capability=RECIPES[name].capability),)
    return next(problems(replace(f, gpus=gpus), Needs(fp8=name)), None)


def environment(f: Facts) -> Finding:
    worst = max(_of_environment(f), key=lambda each: list(State).index(each.state), default=None)
    found = ", ".join(f"{k}={v}" for k, v in sorted(f.environment.items())) or "nothing set; defaults are"
    return ok(found) if worst is None else Finding(worst.state, found, worst.problem, worst.advice)


def _of_environment(f: Facts) -> Iterator[Finding]:
    e = f.environment
    started = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in e]
    if "RANK" in started and len(started) < 4:
        problem = f"{', '.join(started)} without the rest: a run would wait for processes that nobody starts"
        yield Finding(State.WRONG, "", problem, "unset RANK, or start with torchrun")
    if not f.torch_cuda:
        return
    # A run sets what is not set, and warns of what it would have set otherwise.
    for warning in set_variables(variables_of("blockwise", deterministic=False), dict(e)):
        name = warning.split("=")[0]
        yield Finding(State.LIMIT, "", warning.removesuffix(". Unset it to get that"), f"unset {name}")
    for name, value, harm in (
        ("TRITON_INTERPRET", "1", "kernels are interpreted on the CPU"),
        ("CUDA_LAUNCH_BLOCKING", "1", "every kernel is waited for"),
        ("NVTE_FUSED_ATTN", "0", "context parallel needs fused attention"),
    ):
        if e.get(name) == value:
            yield Finding(State.LIMIT, "", f"{name}={value}: {harm}", f"unset {name}")


def shared_memory(f: Facts) -> Finding:
    found = f"{f.shared_memory_gib:.2f} GiB in /dev/shm"
    if len(f.gpus) > 1 and f.shared_memory_gib < 1:
        problem = "NCCL between the GPUs of a node needs about 1 GiB"
        return Finding(State.LIMIT, found, problem, "docker run --ipc=host, or --shm-size=8g")
    return ok(found)


def locked_memory(f: Facts) -> Finding:
    found = "no limit" if f.locked_memory_gib is None else f"{f.locked_memory_gib:.3g} GiB"
    if f.gpus and f.locked_memory_gib is not None:
        problem = "several nodes over InfiniBand need it without limit"
        return Finding(State.NOTE, found, problem, "docker run --ulimit memlock=-1; ulimit -l unlimited")
    return ok(found)


def disk(f: Facts) -> Finding:
    found = f"{f.free_disk_gib:.0f} GiB free for {f.directory}"
    if f.directory_error:
        return Finding(State.WRONG, found, f.directory_error, "set run.dir to a directory that you may write to")
    if f.free_disk_gib < 1:
        return Finding(State.WRONG, found, "less than 1 GiB", "free some, or set run.dir to another file system")
    if f.gpus and f.free_disk_gib < 100:
        problem = "a checkpoint takes 14 bytes a parameter with the optimizer's state"
        return Finding(State.LIMIT, found, problem, "set run.dir to a larger file system, or checkpoint.keep=1")
    return ok(found)


def host(f: Facts) -> Finding:
    found = f"{plural(f.cores, 'core')}, {f.host_memory_gib:.0f} GiB"
    if f.cores < len(f.gpus):
        problem = f"fewer cores than the {plural(len(f.gpus), 'process')} of the GPUs"
        return Finding(State.LIMIT, found, problem, "srun --cpus-per-task, docker run --cpus")
    return ok(found)


def host_name(f: Facts) -> Finding:
    if f.host_name_error:
        problem = f"does not resolve ({f.host_name_error}): torchrun would wait for it five minutes, and fail"
        return Finding(State.WRONG, f.host_name, problem, f"add `127.0.0.1 {f.host_name}` to /etc/hosts")
    return ok(f.host_name)


def clock(f: Facts) -> Finding:
    if f.clock_behind_s > 60:
        found = f"{f.clock_behind_s:.0f} s behind the files of this package"
        problem = "ages of checkpoints and lock files would be wrong"
        return Finding(State.LIMIT, found, problem, "set the clock (chronyd, ntpd)")
    return ok("not behind the files of this package")


def pins(f: Facts) -> Finding:
    if f.pins is None:
        return ok("no pins.txt here to compare with (--pins FILE)")
    other = [f"{name} {have} (tested: {want})" for name, (want, have) in f.pins.items() if have not in (None, want)]
    if other:
        advice = "pip install -c requirements/pins.txt, if something does not work"
        return Finding(State.NOTE, f"{len(other)} differ", "; ".join(other), advice)
    return ok(f"{sum(have is not None for _, have in f.pins.values())} packages as pinned")


def _broken(name: str, package: Package, state: State, advice: str) -> Finding:
    if package.version is None and package.error is None:
        return Finding(state, "not installed", f"{name} is needed", advice)
    return Finding(state, package.version or "?", f"import fails: {package.error}", advice)


CHECKS = (
    Check("Python", python),
    Check("PyTorch", torch),
    Check("driver", driver, at_build=False),
    Check("GPUs", gpus, at_build=False),
    Check("NCCL", nccl),
    Check("Megatron-Core", megatron),
    Check("Transformer Engine", transformer_engine),
    Check("Apex", apex),
    Check("Triton kernel", triton),
    Check("FP8", fp8),
    Check("environment", environment),
    Check("shared memory", shared_memory, at_build=False),
    Check("locked memory", locked_memory, at_build=False),
    Check("disk", disk, at_build=False),
    Check("host", host, at_build=False),
    Check("host name", host_name, at_build=False),
    Check("clock", clock, at_build=False),
    Check("pinned packages", pins),
)


def examine(facts: Facts, *, build: bool) -> list[tuple[str, Finding]]:
    """(name, finding) of every check that can be answered."""
    return [(check.name, check.judge(facts)) for check in CHECKS if check.at_build or not build]


def passes(findings: list[tuple[str, Finding]], *, build: bool) -> bool:
    """A run can start. An image is built for every kind of run, so that there a LIMIT fails too."""
    bad = {State.WRONG, State.LIMIT} if build else {State.WRONG}
    return not any(finding.state in bad for _, finding in findings)
