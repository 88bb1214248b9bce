"""What a machine and its packages are, as far as a run depends on it. Plain values: nothing here decides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
class Machine:
    """The GPUs of a run and the libraries that drive them. Everything is absent by default."""

    torch: Package = Package()
    torch_cuda: Version = ()
    """The CUDA version that torch was built with; () for a CPU build."""
    gpus: tuple[Gpu, ...] = ()
    """In a run, its process's own."""
    gpu_error: str | None = None
    """Why torch sees no GPU."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES; None where it is not set."""
    driver: str | None = None
    driver_cuda: Version = ()
    """The newest CUDA that the driver runs; () where it does not say."""
    transformer_engine: Package = Package()

    @property
    def hides_gpus(self) -> bool:
        """Whether CUDA_VISIBLE_DEVICES hides them all."""
        return self.visible is not None and self.visible.strip() in ("", "-1")

    @property
    def weakest(self) -> Gpu:
        """The GPU of the lowest compute capability."""
        return min(self.gpus, key=lambda gpu: gpu.capability)


@dataclass(frozen=True)
class Facts(Machine):
    """A machine, and what the doctor alone asks about. That is in order by default."""

    python: Version = (3, 12, 3)
    nccl: Version = ()
    megatron: Package = Package("0.16.1")
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
