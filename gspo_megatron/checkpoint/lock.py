"""The lock of a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

from gspo_megatron.base.errors import ConfigError


class RunLock:
    """Keeps a second run out of a run directory: `with RunLock(directory) as lock:` on the process that writes files.

    `run.lock` is locked with flock(2) and says who holds it. The kernel frees the lock once its holder and all
    processes forked by it are gone, however they died: a file left behind does no harm. Where the file system has no
    flock, `lock.warning` says so and nothing keeps a second run out. Where flock is local to a node (Lustre with
    `localflock`, NFS with `local_lock`), a second run is noticed on the same node only.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.warning = directory, ""

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            ConfigError: another run holds it, or the directory cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Through a link another's file would be emptied.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file: TextIO = os.fdopen(os.open(self.directory / "run.lock", flags, 0o666), "a+")
            self._lock()
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, started {since}\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"run.dir={self.directory} cannot be written ({error}); set another run.dir") from error
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"run.dir={self.directory} is in use by {holder}; only one run may write into a directory at a time: "
                "wait for it, stop it, or set another run.dir"
            ) from None
        except OSError as error:
            self.warning = f"run.dir={self.directory} cannot be locked ({error}): nothing keeps a second run out of it"

    def __exit__(self, *exception: object) -> None:
        self._file.close()
