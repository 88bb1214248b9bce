"""Stopping on request: a signal or a time limit sets a flag; the run saves at its next safe point and exits.

    SIGTERM, SIGUSR1          what schedulers send before a time limit or a preemption
    SIGINT                    Ctrl-C; a second one quits at once, without saving. Right after one of the others it is
                              the same request: a parent that gets Ctrl-C, too, hands it on as SIGTERM
    checkpoint.exit_after_s   seconds after the start of the process

A run that does not reach a safe point within the grace period, for example in a collective that hangs, prints every
thread's stack and exits. A second signal leaves it only URGENT_S seconds.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STOPPED = 75
"""Exit status of a run that saved and stopped on request (EX_TEMPFAIL of sysexits.h): start again to continue."""
STOPPED_BY_GUARD = 70
"""Exit status of a run that a guard stopped (EX_SOFTWARE): a person has to look into it."""
FAILED = 1
"""Exit status of every other error, as Python's own: starting again may help."""
REFUSED = 2
"""Exit status for settings, prompts or a checkpoint that cannot work."""
QUIT = 130
"""Exit status after a second Ctrl-C: 128 + SIGINT, as shells have it."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


URGENT_S = 30.0
SAME_S = 5.0
"""Signals this close together count as one: schedulers signal every process of a job, and torchrun forwards what it
receives."""


class StopRequest:
    """A flag that a signal or a time limit sets on this process; `reason` says why.

    Args:
        exit_after_s: seconds from now until it is set; 0: never.
        grace_s: seconds from a signal until every thread's stack is printed and the process exits with status 1.
        forwarded: whether a launcher hands on what it gets, so that one Ctrl-C arrives twice.
        say: called with a line for the user when the first signal arrives.
    """

    def __init__(
        self,
        *,
        exit_after_s: float = 0.0,
        grace_s: float = 600.0,
        forwarded: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.reason, self._forwarded, self._say = "", forwarded, say
        self._grace_s, self._exit_after_s = grace_s, exit_after_s
        self._deadline = time.monotonic() + exit_after_s if exit_after_s > 0 else None
        self._first_signal: float | None = None
        self._quits_after_s = SAME_S

    def is_set(self) -> bool:
        if not self.reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"checkpoint.exit_after_s={self._exit_after_s:g} has passed"
        return bool(self.reason)

    def __enter__(self) -> StopRequest:
        """Handles the signals from here on."""
        # Python runs a handler between two bytecodes of the main thread, which may be inside a collective for minutes.
        # The number of a signal arrives on this pipe at once, for a thread that only waits for it.
        self._pipe_out, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in self._handlers_before.items():
            # A run that was asked to stop is on its way out: a further signal must not take its exit status.
            signal.signal(number, signal.SIG_IGN if self.reason else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe_in)
        self._thread.join()
        os.close(self._pipe_out)

    def _listen(self) -> None:
        while numbers := os.read(self._pipe_out, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._on_signal(signal.Signals(number).name)

    def _on_signal(self, name: str) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self.reason, self._first_signal, left_s = name, now, self._grace_s
            # Of a Ctrl-C at a terminal, a SIGINT may be handled after the SIGTERM that a parent made of it.
            again_at_once = name == "SIGINT" and not self._forwarded
            self._quits_after_s = 0.0 if again_at_once else SAME_S
            again = "; Ctrl-C again quits without saving" if name == "SIGINT" else ""
            self._say(f"{name}: saving at the next safe point, then exiting{again}")
        elif name == "SIGINT" and now - self._first_signal >= self._quits_after_s:
            print("SIGINT again: quitting without saving", file=sys.stderr, flush=True)
            os._exit(QUIT)
        elif now - self._first_signal < SAME_S:
            return
        else:
            left_s = URGENT_S
            print(f"{name}, another signal: {left_s:g} s left to save", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(left_s, exit=True, file=sys.__stderr__ or sys.stderr)
