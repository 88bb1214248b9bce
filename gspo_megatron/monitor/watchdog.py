"""Finds the rank that is missing when the others cannot continue.

When a rank dies or hangs, a collective fails or waits on the others, in a place that has nothing to do with the cause.
So every rank writes a note to a store that all can read, each second and at each phase: where it is, and the error it
ended with. The rank whose note stops changing is the missing one.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import NamedTuple

from torch.distributed import Store

from gspo_megatron.base.errors import CheckpointError, ConfigError, DataError, EngineError, GuardError, plural

BEAT_S = 1.0
SILENT_BEATS = 5
"""A rank that has written nothing for this many beats is missing."""
STORE_BEATS = 15
"""How many beats the store may take to answer."""
NAMED = 8
"""How many ranks a message lists one by one."""
EXPLAINED = (CheckpointError, ConfigError, DataError, EngineError, GuardError)
"""Errors whose own message says what is wrong."""


class Note(NamedTuple):
    """What a rank wrote last: its host, where in the run it was, for how many seconds, when (seconds since 1970), and
    what ended it."""

    host: str
    where: str
    for_s: float
    time: float
    error: str


class RankWatchdog:
    """While entered, writes this rank's notes and reports on stderr which ranks are missing: when an exception ends the
    run on this rank, and when there was no progress for half of `timeout_s`, the timeout of a collective."""

    def __init__(self, store: Store, rank: int, world_size: int, *, timeout_s: float) -> None:
        self._store, self._rank, self._world_size, self._patience_s = store, rank, world_size, timeout_s / 2
        self._host, self._where, self._since = socket.gethostname(), "the start", time.monotonic()
        self._error, self._ended = "", 0.0
        self._news, self._over = threading.Event(), False
        self._one_writes = threading.Lock()

    def note(self, where: str) -> None:
        """This rank is in `where` from now on. Costs the caller nothing: a thread writes it."""
        self._where, self._since = where, time.monotonic()
        self._news.set()

    def __enter__(self) -> RankWatchdog:
        if self._world_size > 1:
            self._write()
            threading.Thread(target=self._keep_writing, name="notes", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._world_size > 1 and isinstance(error, Exception):
            self._error, self._ended = f"{type(error).__name__}: {error}".strip().splitlines()[0], time.time()
            explained = isinstance(error, EXPLAINED)
            leave = self._write_last if explained else self._tell
            # The store may hang with its node; then only this thread hangs, which nobody waits for.
            teller = threading.Thread(target=leave, name="watchdog", daemon=True)
            teller.start()
            teller.join((SILENT_BEATS + STORE_BEATS) * BEAT_S)
            if not explained:
                if teller.is_alive():
                    self._say("the store with the notes of all ranks does not answer: its node, or rank 0, hangs")
                if self._rank == 0:
                    # Without torchrun the store is in this process, and others are still reading.
                    time.sleep(SILENT_BEATS * BEAT_S)
        self._over = True

    def _keep_writing(self) -> None:
        told = time.monotonic()
        while not self._over:
            self._news.wait(BEAT_S)
            self._news.clear()
            try:
                self._write()
                if time.monotonic() - max(self._since, told) > self._patience_s:
                    told = time.monotonic()
                    missing = self._missing()
                    if not self._error:  # otherwise __exit__ says it
                        self._say(missing)
            except RuntimeError:
                return  # Without its store the run ends soon on every rank, and each reports it.

    def _write(self) -> None:
        with self._one_writes:  # or a note from before the error could replace the one that names it
            for_s = time.monotonic() - self._since
            note = Note(self._host, self._where, for_s, self._ended or time.time(), self._error)
            self._store.set(str(self._rank), json.dumps(note))

    def _write_last(self) -> None:
        """The note with the error, in the store before this process ends: by it the others know which rank failed."""
        with contextlib.suppress(RuntimeError):  # without a store no other rank waits for the note
            self._write()

    def _read(self) -> list[Note]:
        return [Note(*json.loads(note)) for note in self._store.multi_get([str(r) for r in range(self._world_size)])]

    def _tell(self) -> None:
        try:
            self._write()
            self._say(self._missing())
        except RuntimeError as error:
            self._say(f"the store with the notes of all ranks is gone, so its node, or rank 0, is missing ({error})")

    def _missing(self) -> str:
        before = self._read()
        for _ in range(SILENT_BEATS):
            time.sleep(BEAT_S)
            self._write()
        return self._message(before, self._read())

    def _message(self, before: list[Note], notes: list[Note]) -> str:
        """Empty when no rank is missing, or another rank reports it."""
        silent = [rank for rank, note in enumerate(notes) if note == before[rank] and not note.error]
        failed = [rank for rank, note in enumerate(notes) if note.error]
        here = f"this is rank {self._rank}, in {self._where}"
        if silent:
            first = next(rank for rank in range(self._world_size) if rank not in silent)
            if not self._error and self._rank != first:
                return ""
            found = [
                f"rank {rank} (host {note.host}) last reported {time.time() - note.time:.0f} s ago in {note.where}"
                for rank, note in ((rank, notes[rank]) for rank in silent[:NAMED])
            ]
            more = [f"and {plural(len(silent) - NAMED, 'more rank')}"] if len(silent) > NAMED else []
            return "; ".join([*found, *more, here])
        if failed and (first := min(failed, key=lambda rank: notes[rank].time)) != self._rank:
            note = notes[first]
            return f"rank {first} (host {note.host}) failed first, in {note.where}: {note.error}; {here}"
        places = Counter(note.where for note in notes)
        usual, number = places.most_common(1)[0]
        if self._rank == 0 and len(places) > 1:
            # All ranks write notes, and some are elsewhere: either one of those hangs, or the others do.
            found = [
                f"rank {rank} (host {note.host}) has been in {note.where} for {note.for_s:.0f} s"
                for rank, note in enumerate(notes)
                if note.where != usual
            ]
            return "; ".join([*found[:NAMED], f"of {len(notes)} ranks, {number} in {usual}"])
        return ""

    def _say(self, text: str) -> None:
        if text:
            print(f"missing rank: {text}", file=sys.stderr, flush=True)
