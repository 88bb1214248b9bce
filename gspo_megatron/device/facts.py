"""What a machine and its packages are, as far as a run depends on it. Plain values: nothing here decides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gspo_megatron.device.machine import Machine

Version = tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """A package: its version, and the message of the exception that importing it raised."""

    version: str | None = None
    error: str | None = None

    @property
    def works(self) -> bool:
        return self.version is not None and self.error is None

    @property
    def number(self) -> Version:
        """`2.13.0a0+8145` -> (2, 13, 0); () where it is not installed."""
        return version_of(self.version)


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch sees."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    used_gib: float = 0.0
    """In use before this run, by any process."""


@dataclass(frozen=True)
class Kernel:
    """The log-prob kernel: compiled for `architecture` (90: Hopper; None: the GPU's own, which was not
    asked), and run where there is a GPU."""

    architecture: int | None = 90
    ran: bool = False
    seconds: float = 0.0
    largest_error: float | None = None
    """Largest difference from the torch kernels of a log-prob or a gradient, relative to its largest value."""
    error: str | None = None
    tested: tuple[str, ...] = ()
    """The versions of Triton that it is tested with."""


@dataclass(frozen=True)
class Facts:
    """A machine, with everything present and in order by default."""

    python: Version = (3, 12, 3)
    torch: Package = Package("2.13.0")
    torch_cuda: Version = (13, 0)
    """The CUDA version that torch was built with; () for a CPU build."""
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None
    """Why torch sees no GPU."""
    nccl: Version = ()
    driver: str | None = None
    driver_cuda: Version = ()
    """The newest CUDA that the driver runs."""
    megatron: Package = Package("0.16.1")
    transformer_engine: Package = Package("2.18.0")
    pair_error: str | None = None
    """Why Megatron-Core cannot use this Transformer Engine."""
    apex: Package = Package()
    triton: Package = Package("3.7.1")
    kernel: Kernel = Kernel()
    environment: Mapping[str, str] = field(default_factory=dict)
    shared_memory_gib: float = 64.0
    locked_memory_gib: float | None = None
    """How much a process may lock; None: without limit."""
    directory: str = "runs"
    directory_error: str | None = None
    free_disk_gib: float = 1000.0
    host_memory_gib: float = 256.0
    cores: int = 16
    host_name: str = "node"
    host_name_error: str | None = None
    """Why the name has no address."""
    clock_behind_s: float = 0.0
    """How far the clock is behind the newest file of this package."""
    pins: Mapping[str, tuple[str, str | None]] | None = None
    """By package: the version that is tested, and the one that is installed. None: the list was not found."""

    @property
    def machine(self) -> Machine:
        """What a run would find, for the rules that it checks itself."""
        gpu = self.gpus[0] if self.gpus else Gpu("", (0, 0), 0.0)
        te = self.transformer_engine
        return Machine(
            gpu=gpu.name,
            num_gpus=len(self.gpus),
            gpu_error=self.gpu_error or "",
            visible=self.environment.get("CUDA_VISIBLE_DEVICES"),
            capability=min((each.capability for each in self.gpus), default=(0, 0)),
            memory_gib=gpu.memory_gib,
            free_gib=gpu.memory_gib - gpu.used_gib,
            driver=self.driver or "",
            torch=self.torch.version or "",
            cuda=text_of(self.torch_cuda),
            nccl=text_of(self.nccl),
            triton=self.triton.version or "",
            transformer_engine=te.version or "",
            transformer_engine_error=te.error or "",
        )


def version_of(text: str | None) -> Version:
    """The numbers at the start of a version: `13.0` -> (13, 0), `2.13.0a0+8145` -> (2, 13, 0)."""
    numbers: list[int] = []
    for part in (text or "").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def text_of(version: Version) -> str:
    return ".".join(map(str, version))
