"""Programs that try to get out of a sandbox, and what they aim at.

    python -m tests.rewards.attacks UID ISOLATION...      prints {isolation: {attack: [how it ended, output, seconds]}}

Run as user UID, who owns the victims: a folder of a run, a process, sockets. Each program does little, so that nothing
is lost where it succeeds, and prints CONTAINED, or what it did.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gspo_megatron.rewards import isolations
from gspo_megatron.rewards.sandbox import Limits, Sandbox
from gspo_megatron.testing.time_limits import time_factor

SECRET = "decoy-s3cret"
LIMITS = Limits(seconds=0.5 * time_factor(), memory=2**29, output=2**18)

HEAD = """
import ctypes, os, resource, signal, socket, sys, threading, time
ME, VICTIM, RUN, READABLE, PORT, ABSTRACT = {me}, {victim}, {run!r}, {readable!r}, {port}, {abstract!r}
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(action, *arguments, **keywords):
    "Notes what was done, unless it raised."
    name = getattr(action, "__name__", str(action)) + str(arguments)[:60]
    try: value = action(*arguments, **keywords)
    except (OSError, MemoryError, RuntimeError, ValueError) as error: return error
    done.append(name)
    return value
def called(name, *arguments):
    if getattr(libc, name)(*arguments) >= 0: done.append(name)
def read(path):
    with open(path, "rb") as file: return file.read()
def write(path):
    with open(path, "wb") as file: file.write(b"x")
"""
TAIL = """
print("CONTAINED" if not done else done)
"""

ATTACKS = {
    "fork_bomb": """
for _ in range(50):
    if attempt(os.fork) == 0: time.sleep(1); os._exit(0)
""",
    "daemon": """
if attempt(os.fork) == 0:
    os.setsid()
    os.closerange(0, 3)
    time.sleep(20); os._exit(0)
""",
    "child_holds_stdout": """
if attempt(os.fork) == 0: time.sleep(20); os._exit(0)
""",
    "thread_bomb": """
stop = threading.Event()
threading.stack_size(65536)
for i in range(1500):
    if isinstance(attempt(threading.Thread(target=stop.wait, daemon=True).start), RuntimeError): break
if len(done) < 1000: done.clear()
""",
    "execute": """
attempt(os.execv, "/usr/bin/true", ["true"])
attempt(os.posix_spawn, sys.executable, ["python", "-c", "print('hello')"], {})
""",
    "memory_at_once": "attempt(bytearray, 100 << 30)",
    "memory_by_processes": """
for _ in range(6):
    if attempt(os.fork) == 0:
        bytearray(b"1" * (200 << 20)); time.sleep(1); os._exit(0)
""",
    "memory_by_memfd": "attempt(os.memfd_create, 'm')",
    "raise_own_limits": """
attempt(resource.setrlimit, resource.RLIMIT_AS, (2**40, 2**40))
""",
    "disk_fill": """
for folder in ("/tmp", ".", "/dev/shm", "/dev", "/", "/var/tmp", "/run", RUN, os.path.dirname(os.__file__)):
    attempt(write, folder + "/fill")
""",
    "connect_to_loopback": "attempt(socket.create_connection, ('127.0.0.1', PORT), 1)",
    "route_outside": """
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9)))  # sends nothing
""",
    "netlink": "attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
    "abstract_socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect(ABSTRACT))",
    "path_socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect(RUN + '/socket'))",
    "environment_of_others": """
found = [attempt(read, f"/proc/{pid}/environ") for pid in ("self", VICTIM, ME, 1)]
if not any(isinstance(text, bytes) and b"decoy" in text for text in found): done.clear()
""",
    "own_environment": "done += [name for name in os.environ if 'DECOY' in name]",
    "read_the_run": "attempt(read, RUN + '/checkpoint'); attempt(os.listdir, RUN)",
    "read_files": """
for path in ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/cpuinfo", "/proc/mounts"): attempt(read, path)
for path in ("/home", "/tmp", "/proc", "/sys", "/var", "/opt", "/run"): attempt(os.listdir, path)
""",
    "write_outside": """
for folder in (RUN, "/usr/lib", "/var/tmp", "/dev/shm", "/etc", "/tmp", sys.prefix + "/lib"):
    attempt(write, folder + "/evil"); attempt(os.mkdir, folder + "/folder")
""",
    "symlink": """
attempt(os.symlink, RUN, "/tmp/link"); attempt(os.symlink, RUN + "/checkpoint", "result.json")
attempt(write, "/tmp/link/evil"); attempt(read, "/tmp/link/checkpoint")
""",
    "change_files": """
attempt(os.chmod, RUN + "/checkpoint", 0); attempt(os.utime, RUN + "/checkpoint", (0, 0))
attempt(os.truncate, RUN + "/checkpoint", 0); attempt(os.rename, RUN + "/checkpoint", RUN + "/gone")
attempt(os.unlink, RUN + "/checkpoint"); attempt(os.link, RUN + "/checkpoint", "/tmp/hard")
attempt(os.setxattr, RUN + "/checkpoint", "user.x", b"x"); attempt(os.chown, RUN + "/checkpoint", os.getuid(), -1)
""",
    "empty_what_it_may_read": """
path = READABLE + "/module.py"
assert read(path) == b"installed"  # it is among what may be read
attempt(os.open, path, os.O_RDONLY | os.O_TRUNC); attempt(os.truncate, path, 0); attempt(write, path)
""",
    "signal_others": """
for pid in (ME, VICTIM, -1): attempt(os.kill, pid, 0)
""",
    "signal_by_owner": """
import fcntl
end, _ = os.pipe()
attempt(fcntl.fcntl, end, fcntl.F_SETOWN, VICTIM)
""",
    "ptrace": "called('ptrace', 16, VICTIM, 0, 0)",
    "read_memory_of_others": "called('process_vm_readv', VICTIM, None, 0, None, 0, 0)",
    "limit_others": "attempt(resource.prlimit, VICTIM, resource.RLIMIT_CORE, (0, 0))",
    "slow_others_down": """
attempt(os.setpriority, os.PRIO_PROCESS, VICTIM, 10)
attempt(os.sched_setaffinity, VICTIM, [0])
attempt(os.sched_setscheduler, VICTIM, os.SCHED_IDLE, os.sched_param(0))
""",
    "shared_memory": "called('shmget', 0x51515151, 4096, 0o1666); called('semget', 0x51515151, 1, 0o1666)",
    "new_namespaces": "called('unshare', 0x10000000); called('unshare', 0x40000000)",
    "mount": "called('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "io_uring": "called('syscall', 425, 1, ctypes.create_string_buffer(120))",
    "keyring": "called('syscall', 250 if os.uname().machine == 'x86_64' else 219, 0, -3, 0)",
    "become_root": """
for action in (os.setuid, os.setgid): attempt(action, 0)
attempt(os.posix_spawn, "/usr/bin/su", ["su", "-c", "id"], {})
""",
    "devices": """
for name in ("mem", "kvm", "fuse", "vda", "sda", "nvidia0", "nvidiactl", "dri/card0", "tty", "ptmx"):
    attempt(os.open, "/dev/" + name, os.O_RDONLY)
""",
    "inherited_descriptors": """
for descriptor in range(3, 64): attempt(os.fstat, descriptor)
""",
    "infinite_output": "while True: print('x' * 65536)",
    "infinite_errors": "while True: print('x' * 65536, file=sys.stderr)",
    "spin": "while True: pass",
    "ignore_signals": """
for number in (1, 2, 3, 14, 15, 24): signal.signal(number, signal.SIG_IGN)
time.sleep(60)
""",
    "close_and_stay": "os.closerange(0, 3); time.sleep(60)",
    "survive_the_parent": "called('prctl', 1, 0, 0, 0, 0)",
}
ENDS = {
    "infinite_output": "too_much_output",
    "infinite_errors": "too_much_output",
    "spin": "timed_out",
    "ignore_signals": "timed_out",
    "close_and_stay": "timed_out",
}
"""How a program ends that does not end by itself."""
HARMLESS = ("connect_to_loopback", "abstract_socket", "path_socket", "read_the_run", "read_files", "signal_others")
HARMLESS += ("environment_of_others", "child_holds_stdout", "limit_others", "new_namespaces")
"""Those that are run without an isolation, too, to see that they can get out."""


@contextmanager
def victims() -> Iterator[str]:
    """The head of every program, which knows what to aim at."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir="/dev/shm") as readable,  # bwrap shows the folders around it, too
        socket.socket() as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        name = f"\0decoy{os.getpid()}"
        abstract.bind(name)
        server.bind(("127.0.0.1", 0))
        Path(folder, "checkpoint").write_text("weights")
        module = Path(readable, "module.py")
        module.write_text("installed")
        module.chmod(0o666)  # only the isolation protects it
        os.chmod(readable, 0o755)
        isolations.SYSTEM = (*isolations.SYSTEM, readable)
        os.chmod(folder, 0o755)
        with socket.socket(socket.AF_UNIX) as path:
            path.bind(f"{folder}/socket")
            for each in (abstract, server, path):
                each.listen(8)
            os.environ["DECOY"] = SECRET
            process = subprocess.Popen(["/usr/bin/sleep", "600"])
            try:
                port = server.getsockname()[1]
                aims = {"me": os.getpid(), "victim": process.pid, "run": folder, "readable": readable}
                yield HEAD.format(**aims, port=port, abstract=name)
                assert process.poll() is None and Path(folder, "checkpoint").read_text() == "weights"
                assert Path(folder, "checkpoint").stat().st_mode & 0o777 == 0o644
                assert module.read_text() == "installed"
            finally:
                process.kill()
                process.wait()


def main() -> None:
    user = int(sys.argv[1])
    _become(user)
    python = sys.executable if os.access(os.path.realpath(sys.executable), os.X_OK) else "/usr/bin/python3"
    found = {}
    with victims() as head, ThreadPoolExecutor(8) as threads:
        for isolation in sys.argv[2:]:
            run = partial(_ended, Sandbox(isolation, LIMITS, python), head)
            names = [name for name in ATTACKS if isolation != "none" or name in HARMLESS]
            found[isolation] = {name: threads.submit(run, name) for name in names}
        # All of them at once: some wait for their time to be over.
        ends = {isolation: {name: run.result() for name, run in runs.items()} for isolation, runs in found.items()}
    print(json.dumps(ends))


def _ended(box: Sandbox, head: str, name: str) -> tuple[str, str, float]:
    begin = time.monotonic()
    end = box.run(head + ATTACKS[name] + TAIL)
    return end.how, (end.output[:300] or end.errors[-300:].encode()).decode(), time.monotonic() - begin


def _become(user: int) -> None:
    if user == os.getuid():
        return
    isolations.bwrap()  # where it is: the other user may not be able to import what tells
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    os.chdir("/")
    os.environ["HOME"] = "/"


if __name__ == "__main__":
    main()
