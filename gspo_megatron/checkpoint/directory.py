"""The directory of a run's checkpoints: a save is atomic, and a damaged checkpoint is noticed.

    store = CheckpointDirectory(run_dir / "checkpoints", keep=2)
    partial = store.begin(position, num_bytes)      # step_000010.tmp, into which every rank writes
    store.commit(partial)                           # synced, hashed into manifest.json, renamed, pointed to by `latest`
    path, problems = store.open("latest")           # verified

This file does not know what a checkpoint holds. Everything is called on the one process that writes files; where
several nodes write into `partial`, on a shared file system, the caller waits for all of them before commit.

Newest means written last: every manifest holds a number, one more than any other in the directory had. A run that
continues from an early checkpoint writes newer ones at lower steps than those it had left behind, and resumes from the
newer ones. File times are not used. The file `latest` names the newest for people and scripts; it is checked, never
trusted. The file `best` names the one that is kept for its evaluation.

Names: step_000010            a checkpoint; it is complete as soon as it has this name
       step_000010.tmp        being written or deleted, or left so by a process that died; the next begin removes it
       step_000010.before_7   a checkpoint that number 7 is about to replace; it stays if number 7 is never completed
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError, shortened
from gspo_megatron.base.files import read_regular, sync
from gspo_megatron.checkpoint.manifest import looks_intact, number_of, seal, verify, write_synced
from gspo_megatron.checkpoint.names import BEFORE, PARTIAL, name_of, position_of, position_of_path, progress

POINTER, BEST = "latest", "best"
SPARE_BYTES = 16 << 20
"""What must stay free besides a checkpoint and a twentieth of its size: for metrics, rollouts, the next manifest."""


def outdated(
    saved: Sequence[Position], *, keep: int, keep_every: int = 0, best: Position | None = None
) -> list[Position]:
    """Which of the checkpoints `saved`, in the order they were written, to delete now that the last one is complete.

    The last `keep` stay, those after every `keep_every`-th step, and `best`. Those at later steps than the one just
    written stay too: they were left behind by a run that continued from an early checkpoint, until it reaches them
    again.
    """
    past = [position for position in saved if progress(position) <= progress(saved[-1])]
    return [
        position
        for position in past[:-keep]
        if not (keep_every and position.steps and not position.updates and position.steps % keep_every == 0)
        and not (best and name_of(position) == name_of(best))
    ]


class CheckpointDirectory:
    """The checkpoints of one directory. One save at a time: begin, write, commit."""

    def __init__(self, directory: Path, *, keep: int, keep_every: int = 0) -> None:
        """`keep` (1 or more) and `keep_every` as in `outdated`."""
        assert keep > 0, "checks of the settings come before"
        self.directory, self.keep, self.keep_every = directory, keep, keep_every

    def begin(self, position: Position, num_bytes: int | None) -> Path:
        """An empty directory for the files of a checkpoint of about `num_bytes` (None: unknown), on the file system of
        the checkpoints. What dead processes left unfinished is removed first.

        Raises:
            CheckpointError: too little space is free, or nothing can be written. A quota that the file system does not
                count in its free space shows only while writing.
        """
        partial = self.directory / (name_of(position) + PARTIAL)
        size = num_bytes or 0
        needed = size + size // 20 + SPARE_BYTES
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            for path in self.directory.iterdir():
                if path.suffix == PARTIAL and position_of(path.stem):
                    shutil.rmtree(path, ignore_errors=True)
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise CheckpointError(
                    f"{self.directory} has {_mib(free)} free, {partial.stem} needs {_mib(needed)} ({_mib(size)}, 5 % "
                    f"and {_mib(SPARE_BYTES)} spare); free some space, lower checkpoint.keep={self.keep}, or move "
                    "run.dir to a larger disk"
                )
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be written ({error}); make it writable, or move run.dir elsewhere"
            ) from error
        return partial

    def commit(self, partial: Path, best: Position | None = None) -> Path:
        """Turns the directory from `begin`, now filled, into the newest checkpoint; then deletes outdated ones. The
        file `best` names the checkpoint of that position, which stays, if there is one.

        If the process dies in here, the newest checkpoint is the previous one or this one, intact. An existing one at
        this position is replaced.

        Raises:
            CheckpointError: something cannot be written. Earlier checkpoints are then unchanged.
        """
        final = partial.with_suffix("")
        number = 1 + int(max((n for path in self._all() if (n := number_of(path)) < math.inf), default=0))
        try:
            seal(partial, number)
            if final.exists():
                os.rename(final, final.with_suffix(f"{BEFORE}{number}"))
            os.rename(partial, final)
            sync(self.directory)
            self._point(POINTER, final.name)
            if best and (self.directory / name_of(best)).is_dir():
                self._point(BEST, name_of(best))
            else:
                (self.directory / BEST).unlink(missing_ok=True)
            sync(self.directory)
            self._retire(best)
        except OSError as error:
            raise CheckpointError(
                f"{partial} could not be completed ({error}); earlier checkpoints are unchanged; free some space, "
                f"make {self.directory} writable, or move run.dir elsewhere"
            ) from error
        return final

    def _point(self, pointer: str, name: str) -> None:
        fresh = self.directory / (pointer + PARTIAL)
        write_synced(fresh, f"{name}\n".encode())
        os.replace(fresh, self.directory / pointer)

    def best(self) -> Path:
        """The checkpoint that the file `best` names.

        Raises:
            CheckpointError: it names none.
        """
        name = self._pointed_to(BEST)
        if not position_of(name) or not (self.directory / name).is_dir():
            raise CheckpointError(
                f"checkpoint.load=best: {self.directory / BEST} "
                + (f"names {shortened(repr(name), 60)}, which is not there" if name else "does not exist")
                + "; a run keeps its best checkpoint with checkpoint.keep_best=eval/accuracy; otherwise use latest"
            )
        return self.directory / name

    def is_empty(self) -> bool:
        """Whether there is no checkpoint, intact or not."""
        return not self._all()

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and what is wrong with newer ones.

        One without a readable manifest could be the newest, so it counts as newer. Nothing is changed or deleted.
        """
        problems: list[str] = []
        for path in reversed(self._all()):
            try:
                verify(path)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                return path, problems
        return None, problems

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """`newest`, and what is wrong with `latest`, too."""
        newest, problems = self.newest()
        found, expected = self._pointed_to(POINTER), newest.name if newest else ""
        if found != expected:
            named = f"names {found!r}" if found else "is missing or empty"
            problems.append(f"{self.directory / POINTER} {named}; the newest intact checkpoint is {expected or 'none'}")
        return newest, problems

    def open(self, which: str) -> tuple[Path | None, list[str]]:
        """The verified checkpoint that checkpoint.load=`which` stands for, and the problems found, to be printed.

        `none`: no checkpoint. `latest`: the newest intact one; None, a fresh start, where nothing was ever saved. A
        path: that one only.

        Raises:
            CheckpointError: that one, or every one of the directory, cannot be used.
        """
        if which == "none":
            return None, []
        if which == "latest":
            newest, problems = self.newest_intact()
            if problems and not newest:
                raise CheckpointError(
                    f"checkpoint.load=latest: no intact checkpoint in {self.directory}: {'; '.join(problems)}; set "
                    "checkpoint.load=none to start from scratch, or to the path of another run's checkpoint"
                )
            return newest, problems
        path = Path(which)
        try:
            verify(path)
        except CheckpointError as error:
            beside, _ = CheckpointDirectory(path.parent, keep=self.keep).newest_intact()
            instead = beside or self.newest_intact()[0]
            found = f"the newest intact checkpoint is {instead}" if instead else "there is no intact checkpoint"
            raise CheckpointError(
                f"checkpoint.load={which!r}: {error}; {found}: set checkpoint.load={instead or 'none'}"
            ) from error
        return path, []

    def _all(self) -> list[Path]:
        """In the order they were written. Those without a readable manifest are last."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read ({error}); make it readable") from error
        paths = [path for name in names if position_of((path := self.directory / name).stem)]
        found = [path for path in paths if not path.suffix or path.suffix.startswith(BEFORE)]
        return sorted(found, key=lambda path: (number_of(path), progress(position_of_path(path))))

    def _pointed_to(self, pointer: str) -> str:
        try:
            return read_regular(self.directory / pointer).decode(errors="replace").strip()
        except OSError:
            return ""

    def _retire(self, best: Position | None) -> None:
        """Deletes outdated checkpoints. A visibly damaged one neither counts as kept nor is deleted: its owner may want
        to look at it."""
        paths = self._all()
        replaced = [path for path in paths if path.suffix and path.with_suffix("").exists()]
        whole = [path for path in paths if path not in replaced and looks_intact(path)]
        saved = [position_of_path(path) for path in whole]
        gone = outdated(saved, keep=self.keep, keep_every=self.keep_every, best=best)
        for path in [*replaced, *(path for path in whole if position_of_path(path) in gone)]:
            # A half-deleted checkpoint must not keep its name. Files that another process still reads may be slow to
            # disappear (NFS): the next begin tries again.
            doomed = path.with_suffix(PARTIAL)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
