"""A program that ends with the process that started it, however that ends.

    program = Watched(["python", "-m", "server"], log=Path("server.log"), environment={"PORT": "8000"})
    program.status()     # None while it runs
    program.end()

This file is also what stands between the two: a small process that holds the end of a pipe from the starter, and ends
the program, with every process of its group, once the pipe closes. The kernel closes it even after kill -9. A signal
at the death of the parent would not do: Linux sends it when the thread that started the program ends.

It also removes what Python's multiprocessing of the program has left in /dev/shm, and a folder for the program's other
short-lived files: killed processes cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

GRACE_S = 20.0
"""For the program after SIGTERM, and for processes that it leaves behind to clean up."""
LOOK_S = 2.0
"""How often the watcher looks which memory the program shares."""
SHARED = "/dev/shm/psm_"
"""Where multiprocessing.shared_memory puts it."""
PR_SET_PDEATHSIG = 1
OF_TORCHRUN = ("GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
"""Variables that say which rank of a run a process is: the program is none of them."""
OF_RANKS = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
PYTHONPATH = "PYTHONPATH"
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class Watched:
    """A running program. `environment`: variables besides those of this process, and `usual`: where this one has none
    of the name. `gpus`: numbers of those that it
    sees; None: as this process. `grace_s`: to end by itself. `niceness`: how far it steps back for others that want
    its cores. `scratch`: a variable that names it a folder of its own, which is removed when it has ended. `modules`:
    a folder that it imports from before those of PYTHONPATH. Its output goes to `log`, after what is there."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        usual: Mapping[str, str] = MappingProxyType({}),
        gpus: Sequence[int] | None = None,
        grace_s: float = GRACE_S,
        niceness: int = 0,
        scratch: str = "",
        modules: Path | None = None,
    ) -> None:
        seen = {} if gpus is None else {VISIBLE_GPUS: ",".join(map(str, gpus))}
        own = {k: v for k, v in os.environ.items() if not k.startswith(OF_TORCHRUN) and k not in OF_RANKS}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(grace_s), str(niceness), scratch, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**usual, **own, **environment, **seen, **_python_path(modules)},
                start_new_session=True,
            )

    def status(self) -> int | None:
        """Its exit status, negative after a signal; None while it runs."""
        return self._watcher.poll()

    def end(self) -> None:
        """Ends the program, if it runs; returns when nothing of it is left."""
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        self._watcher.wait()


def _python_path(modules: Path | None) -> dict[str, str]:
    if modules is None:
        return {}
    return {PYTHONPATH: os.pathsep.join([str(modules), *filter(None, [os.environ.get(PYTHONPATH)])])}


def main(grace_s: float, niceness: int, scratch: str, command: Sequence[str]) -> int:
    """Runs the program until it ends, or until the pipe on standard input closes."""
    # Only the starter ends the program: what a terminal or a batch system sends to everyone would be too early.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Not below the run's folder: the path of a socket has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="gspo_megatron_") if scratch else ""
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **({scratch: folder} if scratch else {})},
        start_new_session=True,
        preexec_fn=lambda: _as_started(niceness),
    )
    ended = os.pidfd_open(program.pid)
    ready, shared = list[int](), set[str]()
    while not ready:
        ready, _, _ = select.select([ended, sys.stdin.fileno()], [], [], LOOK_S)
        shared |= _shared_by(program.pid)
    if ended not in ready:
        _signal_group(program.pid, signal.SIGTERM)
        select.select([ended], [], [], grace_s)
    # Its own helpers remove what it shared, once it is gone.
    status = program.wait() if program.poll() is not None else None
    until = time.monotonic() + grace_s / 4
    while status is not None and _signal_group(program.pid, 0) and time.monotonic() < until:
        time.sleep(0.05)
    _signal_group(program.pid, signal.SIGKILL)
    status = program.wait()
    for path in shared:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _as_started(niceness: int) -> None:
    """In the program, before it begins: the signals of a new process, and the end of the watcher ends it. USR1 stays
    ignored: a batch system may send it to every process of a job, for runs to save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.nice(niceness)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _shared_by(group: int) -> set[str]:
    """Files of shared memory that the group's processes have mapped."""
    found = set()
    for entry in os.listdir("/proc"):
        # A process may end at any moment, and others are not ours to look into.
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry)) == group:
                maps = Path(f"/proc/{entry}/maps").read_text()
                found |= {path for line in maps.splitlines() if (path := line.split()[-1]).startswith(SHARED)}
    return found


def _signal_group(group: int, number: int) -> bool:
    """Whether there is such a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
