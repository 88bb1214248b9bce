"""Runs a Python program that nobody has read, with limits to what it sees, reaches and takes.

    sandbox = Sandbox("auto", Limits(seconds=2))
    sandbox.run("print(int(input()) + 1)", b"41").output        # b"42\n"

Two isolations hold, tried in this order: bubblewrap (namespaces: the program has its own network, processes and file
system of a few read-only folders), and Landlock where a kernel or a container allows no namespaces. Under both, a list
of system calls (`seccomp.py`) leaves no fork, exec, socket or signal, nothing can be written but standard output, and
the program ends with whoever started it. Limits of resources alone do not isolate, so they are no fallback.

A program is only talked to through pipes: nothing that it leaves behind is opened, and what it prints is only text.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards import launcher
from gspo_megatron.rewards.isolations import AUTO, ISOLATIONS, NOBODY, Interpreter, Isolation, interpreter
from gspo_megatron.rewards.seccomp import filter_of
from gspo_megatron.rewards.worker import OF_THE_RUN

LAUNCHER = Path(launcher.__file__).read_text()
START_S = 20.0
"""How long a sandbox may take until the program begins; not part of the program's time."""
POLL_S = 0.2
MOST_THREADS = 256
"""Of a program, besides what its user has running: limits count threads by user."""
COUNTED_EVERY_S = 10.0
"""How often the user's threads are counted: a run starts threads of its own, too."""
MOST_ERRORS = 2000
"""Bytes of standard error that are kept."""
ENVIRONMENT = {"HOME": "/", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that a program finds in its environment. The same order of sets in every process, and no pool of threads for
every core, whose stacks would use up the address space."""


Call = tuple[str, list[Any]] | str
"""A function of a program with its arguments, or an expression."""


class Limits(NamedTuple):
    """Of one run of a program.

    Attributes:
        seconds: of computing, in whole seconds, all threads together; waiting included, it may take twice as long.
        memory: bytes of address space.
        output: bytes that it may print.
    """

    seconds: float = 5.0
    memory: int = 2**30
    output: int = 2**20

    def resources(self) -> dict[int, tuple[int, int]]:
        """For setrlimit."""
        whole = max(1, -int(-self.seconds // 1))
        threads = MOST_THREADS + _tasks_of(NOBODY if os.getuid() == 0 else os.getuid())
        return {
            int(resource.RLIMIT_AS): (self.memory, self.memory),
            int(resource.RLIMIT_CPU): (whole, whole + 1),  # a second after SIGXCPU, SIGKILL
            int(resource.RLIMIT_FSIZE): (0, 0),
            int(resource.RLIMIT_NOFILE): (64, 64),
            int(resource.RLIMIT_NPROC): (threads, threads),
            int(resource.RLIMIT_CORE): (0, 0),
        }


class Ended(NamedTuple):
    """How a run of a program ended.

    Attributes:
        how: exited, timed_out, too_much_output, or sandbox_failed: the program was not begun.
        status: its exit status, or minus the signal that ended it.
        output: what it printed, at most Limits.output bytes.
        errors: the first of its standard error; of a failed sandbox, what went wrong.
    """

    how: str
    status: int
    output: bytes
    errors: str


class Sandbox:
    """Runs programs under one of ISOLATIONS, or for `auto` the first of AUTO that works. One that is named is not tried
    (`settled` does), since every process that calls a reward has a sandbox of its own.

    Raises:
        ConfigError: no isolation works on this machine, or no Python is at `python`.
    """

    def __init__(self, isolation: str = "auto", limits: Limits = Limits(), python: str | None = None) -> None:  # noqa: B008
        self.isolation = ISOLATIONS[settled(isolation, python) if isolation == "auto" else isolation]
        self._start = _Start.of(self.isolation, interpreter(python))
        self.limits = limits
        self._resources, self._as_of = limits.resources(), time.monotonic()

    def run(self, program: str, stdin: bytes = b"", calls: Sequence[Call] | None = None) -> Ended:
        """Runs `program` as a script that reads `stdin`; with `calls`, calls its functions instead, or evaluates
        expressions in it, and the output is a line of JSON for each that ended: `[result]`, of an expression its
        repr(), or `{"error": the name of what was raised}`."""
        if time.monotonic() > self._as_of + COUNTED_EVERY_S:
            self._resources, self._as_of = self.limits.resources(), time.monotonic()
        return self._start.run(program, stdin, calls, self.limits, self._resources)


@lru_cache
def settled(isolation: str, python: str | None = None) -> str:
    """The name of the isolation: what `auto` stands for on this machine, once it has been tried.

    Raises:
        ConfigError: it does not work.
    """
    reasons = ""
    for name in AUTO if isolation == "auto" else (isolation,):
        reason = complaint(ISOLATIONS[name], interpreter(python))
        if not reason:
            return name
        reasons += f"\n  {name}: {reason}"
    raise ConfigError(
        f"reward.code.isolation={isolation} does not work on this machine:{reasons}\nFix one of them, or set "
        "reward.code.isolation=none to run the model's programs unprotected: they may do whatever you may"
    )


TRIAL = """
import os, socket
through = []
def attempt(name, action):
    try: action()
    except OSError: return
    through.append(name)
def fork():
    if os.fork() == 0: os._exit(0)
attempt("fork", fork)
attempt("open /etc/passwd", lambda: open("/etc/passwd"))
attempt("open a socket", socket.socket)
attempt("write to /tmp", lambda: open("/tmp/sandbox", "w"))
print(through)
"""
"""Prints what it can do and must not."""


def complaint(isolation: Isolation, python: Interpreter) -> str:
    """Why the isolation cannot be used here; empty where it can. Runs a program in it that tries to get out."""
    if reason := isolation.unavailable():
        return reason
    try:
        start = _Start.of(isolation, python)
    except NotImplementedError as error:
        return str(error)
    limits = Limits(seconds=START_S)
    ended = start.run(TRIAL if isolation.filters else "print([])", b"", None, limits, limits.resources())
    if ended.how == "exited" and ended.status == 0 and ended.output == b"[]\n":
        return ""
    said = ended.errors.strip() or f"a program {ended.how} with status {ended.status} and said {ended.output!r}"
    hint = isolation.hint(said)
    return " ".join(said.splitlines()[-1:]) + (f" ({hint})" if hint else "")


class _Start(NamedTuple):
    """How programs are started."""

    command: list[str]
    task: dict[str, Any]

    @classmethod
    def of(cls, isolation: Isolation, python: Interpreter) -> _Start:
        """How programs start under an isolation, on this Python.

        Raises:
            NotImplementedError: the processor's system calls are not known.
        """
        # -s -S: no folder of the user's, and no code of installed packages, runs before the isolation holds.
        inside = [python.executable, "-s", "-S", "-c", LAUNCHER]
        task = {
            "readable": isolation.readable(python),
            "user": NOBODY if os.getuid() == 0 and isolation.filters else None,
            "filter": filter_of() if isolation.filters else b"",
            "parent": None if isolation.has_own_processes else os.getpid(),
            "path": python.packages,
        }
        return cls([*isolation.command(python), *inside], task)

    def run(
        self,
        program: str,
        stdin: bytes,
        calls: Sequence[Call] | None,
        limits: Limits,
        resources: dict[int, tuple[int, int]],
    ) -> Ended:
        """See `Sandbox.run`."""
        task = {**self.task, "limits": resources, "program": program, "calls": calls and list(calls)}
        written = repr(task).encode("utf-8", "backslashreplace")
        try:
            with _signals_blocked():
                process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            return Ended("sandbox_failed", 0, b"", str(error))
        try:
            return _Exchange(process, struct.pack("<Q", len(written)) + written + stdin, limits).result()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks the run's signals, also in processes that are started meanwhile: a scheduler signals every process of a
    job, and a program that this ended would score 0."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Exchange:
    """Writes to a process and reads from it until it ends, has printed too much, or its time is over."""

    def __init__(self, process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._request = memoryview(request)
        self._output, self._errors = bytearray(), bytearray()
        self._printed = 0
        self._begun = False
        self._end = time.monotonic() + START_S
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._to, self._out, self._err = (pipe.fileno() for pipe in (process.stdin, process.stdout, process.stderr))
        self._poll = select.poll()
        for descriptor in (self._to, self._out, self._err):
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLOUT if descriptor == self._to else select.POLLIN)
        self._open = {self._out, self._err}

    def result(self) -> Ended:
        how = self._how()
        if not self._begun:
            timed_out = how == "timed_out"
            end = f"did not begin within {START_S:g} s" if timed_out else f"ended with status {self._status}"
            said = self._errors.decode(errors="replace").strip()
            return Ended("sandbox_failed", self._status, b"", said or f"the launcher {end}")
        output = bytes(self._output[len(launcher.READY) :])
        return Ended(how, self._status, output, self._errors.decode(errors="replace"))

    @property
    def _status(self) -> int:
        status = self._process.returncode or 0
        # bwrap reports a signal as a shell does.
        return 128 - status if status > 128 else status

    def _how(self) -> str:
        while self._open:
            if (left := self._end - time.monotonic()) <= 0:
                return "timed_out"
            ready = self._poll.poll(1000 * min(left, POLL_S))
            for descriptor, _ in ready:
                if descriptor == self._to:
                    self._write()
                else:
                    self._read(descriptor)
            if self._printed > self._limits.output:
                return "too_much_output"
            # Where it could fork, a child may hold the pipes of a process that has ended.
            if not ready and self._process.poll() is not None:
                break
        with suppress(subprocess.TimeoutExpired):  # it may have closed its pipes and go on
            self._process.wait(max(0.01, self._end - time.monotonic()))
            return "timed_out" if self._status == -signal.SIGXCPU else "exited"
        return "timed_out"

    def _write(self) -> None:
        try:
            self._request = self._request[os.write(self._to, self._request[: 2**16]) :]
        except BrokenPipeError:
            self._request = self._request[:0]
        if not self._request:
            self._poll.unregister(self._to)
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _read(self, descriptor: int) -> None:
        received = os.read(descriptor, 2**16)
        if not received:
            self._poll.unregister(descriptor)
            self._open.remove(descriptor)
        if descriptor == self._err:
            self._errors += received[: MOST_ERRORS - len(self._errors)]
            self._printed += len(received)
            return
        self._output += received
        if self._begun:
            self._printed += len(received)
        elif self._output.startswith(launcher.READY):
            self._begun = True
            self._end = time.monotonic() + 2 * self._limits.seconds
            self._printed += len(self._output) - len(launcher.READY)


def _tasks_of(user: int) -> int:
    """Threads of a user on this machine."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"{entry.path}/task"))
    return count
