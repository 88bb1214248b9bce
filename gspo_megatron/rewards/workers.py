"""Processes that call reward functions for a run: one that hangs, ends, or takes all memory costs a rollout its reward.

    with WorkerPool({"mine": ("my_rewards:concise", {})}, workers=2) as pool:
        pool.functions["mine"].takes                                   # ("response",)
        pool.submit("mine", [{"response": "It is 7."}], ids=[0]).result()

Each process (`worker.py`) has a thread of the pool that starts it, talks to it and replaces it. A process ends when the
thread that started it does, so the threads live as long as the pool. Nothing is forked: with torch in use, locks that
another thread holds would stay locked in the child.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from gspo_megatron.base.errors import ConfigError, shortened
from gspo_megatron.rewards.functions import SCORE, Arguments, Outcome
from gspo_megatron.rewards.user_code import plain
from gspo_megatron.rewards.worker import OF_THE_RUN

START_S = 120.0
"""How long a process may take to import its functions, where reward.timeout_s is shorter."""
MOST_PRINTED = 2**20
"""Bytes that a function may print in one call."""
MOST_REPLY = 2**24
"""Bytes of a reply."""
POLL_S = 0.5
"""A process whose own child holds its pipes ends without closing them: it is looked at this often."""
ENVIRONMENT = ("env", "PYTHONHASHSEED=0", "OMP_NUM_THREADS=1")
"""The same order of sets in every process, and one thread in each: there are as many processes as cores."""
CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gspo_megatron.rewards.worker import main; main()"


class Lost(Exception):
    """A process gave no result and has to be replaced. Says what it did."""


class Called(NamedTuple):
    """What the pool knows of a function without importing it; as in `RewardFunction`."""

    takes: tuple[str, ...]
    batch: bool
    is_async: bool


class Job(NamedTuple):
    """A call. `term` empty: only what the functions are called with is asked for."""

    term: str
    items: Sequence[Arguments]
    ids: Sequence[int]
    result: Future[Any]


class WorkerPool:
    """Up to `workers` processes that call `functions`: (name as for `functions.find`, parameters) by term.

    A call may take `timeout_s`, a setting called `limit`; a process may have `memory_gib` of its own, 0: any. The first
    process starts, and imports the functions, when they are first asked for.

    Raises:
        ConfigError: by `functions` and `submit`: a function cannot be imported or called.
    """

    def __init__(
        self,
        functions: Mapping[str, tuple[str, Mapping[str, Any]]],
        *,
        workers: int = 0,
        timeout_s: float = 60.0,
        memory_gib: float = 4.0,
        seed: int = 0,
        limit: str = "reward.timeout_s",
        returns: str = SCORE,
    ) -> None:
        self.timeout_s = timeout_s
        self._setup = {"functions": functions, "timeout_s": timeout_s, "limit": limit, "seed": seed}
        self._setup["returns"] = returns
        self._setup["memory"] = int(memory_gib * 2**30)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._keepers: list[_Keeper] = []
        self._functions: dict[str, Called] | None = None
        # A pool that nobody closes ends with whoever held it.
        self._end = weakref.finalize(self, _end, self._jobs, self._keepers)
        self.grow(max(workers, 1))

    def grow(self, workers: int) -> None:
        """Allows that many processes."""
        self._keepers += [_Keeper(self._jobs, self._setup) for _ in range(workers - len(self._keepers))]

    @property
    def functions(self) -> dict[str, Called]:
        """How each term's function is called."""
        if self._functions is None:
            self._functions = self._put("", [], []).result()
        assert self._functions is not None
        return self._functions

    def submit(self, term: str, items: Sequence[Arguments], ids: Sequence[int]) -> Future[list[Outcome]]:
        """One outcome for each rollout, of one call; `ids` seed its random numbers."""
        return self._put(term, items, ids)

    def _put(self, term: str, items: Sequence[Arguments], ids: Sequence[int]) -> Future[Any]:
        job = Job(term, items, ids, Future())
        self._jobs.put(job)
        for keeper in self._keepers:
            keeper.begin()
            if not term:  # the first process alone tells
                break
        return job.result

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._end()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(jobs: queue.SimpleQueue[Job | None], keepers: Sequence[_Keeper]) -> None:
    for keeper in keepers:
        keeper.closed = True
    with suppress(queue.Empty):
        while True:  # who waits for one of them is told
            if (job := jobs.get_nowait()) is not None:
                job.result.cancel()
    for _ in keepers:  # before waiting for any: another may take the first
        jobs.put(None)
    for keeper in keepers:
        keeper.end()


class _Keeper:
    """A thread, and the process that it starts, talks to and replaces."""

    def __init__(self, jobs: queue.SimpleQueue[Job | None], setup: Mapping[str, Any]) -> None:
        self._jobs, self._setup = jobs, setup
        self._worker: _Worker | None = None
        self._thread = threading.Thread(target=self._keep, name="reward worker", daemon=True)
        self._begun = self.closed = False

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._thread.start()

    def end(self) -> None:
        """Called by another thread, once `closed` is set: nothing more is begun."""
        if (worker := self._worker) is not None:
            worker.kill()
        if self._begun:
            self._thread.join(timeout=5)

    def _keep(self) -> None:
        # For the processes that this thread starts, which inherit it. The run gets its signals in its main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_RUN)
        while (job := self._jobs.get()) is not None and not self.closed:
            try:
                job.result.set_result(self._done(job) if job.term else self._running().functions)
            except Lost as lost:
                error = ConfigError(f"the process that calls the reward functions {lost}")
                job.result.set_exception(error)
            except BaseException as error:  # who waits for it must hear of it
                job.result.set_exception(error)
        self._replace()

    def _done(self, job: Job) -> list[Outcome]:
        try:
            return self._ask(job)
        except Lost as lost:
            self._replace()
            if len(job.items) > 1 and not self._setup_of(job).batch:
                # Of calls that ran concurrently, only one may be to blame.
                each = zip(job.items, job.ids, strict=True)
                return [self._done(job._replace(items=[item], ids=[id]))[0] for item, id in each]
            return [Outcome({}, f"its process {lost}", lost=True)] * len(job.items)

    def _ask(self, job: Job) -> list[Outcome]:
        worker = self._running()
        # An async function gives up by itself, at the time-out; it is not to be blamed for that.
        limit = self._setup["timeout_s"]
        late = f"gave no result within {self._setup['limit']}={limit:g} s"
        limit += 2 if worker.functions[job.term].is_async else 0
        found = worker.ask({"term": job.term, "items": job.items, "ids": job.ids}, limit, late)
        return [Outcome(*outcome) for outcome in found]

    def _setup_of(self, job: Job) -> Called:
        return self._running().functions[job.term]

    def _running(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self._setup)
        return self._worker

    def _replace(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.close()
            self._worker = None


class _Worker:
    """A process. Only the thread that made it may `ask`."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._replies, theirs = os.pipe()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        command = [*ENVIRONMENT, sys.executable, "-u", "-c", CODE, path, str(os.getpid()), str(theirs)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            start_new_session=True,
        )
        os.close(theirs)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._printed_to = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._requests, self._printed_to, self._replies):
            os.set_blocking(descriptor, False)
        self._reply, self._printed = b"", b""
        limit = max(setup["timeout_s"], START_S)
        try:
            hello = self.ask(setup, limit, f"did not import its functions within {limit:g} s")
            if "refused" in hello:
                raise ConfigError(hello["refused"])
        except BaseException:
            self.kill()
            self.close()
            raise
        self.functions = {term: Called(*called) for term, called in hello["functions"].items()}

    def ask(self, message: Any, timeout_s: float, late: str) -> Any:
        """The reply; `late` is said where there is none in time.

        Raises:
            Lost: there was none.
        """
        request = memoryview(json.dumps(message, default=str).encode() + b"\n")
        poll, end = select.poll(), time.monotonic() + timeout_s
        poll.register(self._requests, select.POLLOUT)
        poll.register(self._replies, select.POLLIN)
        poll.register(self._printed_to, select.POLLIN)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise Lost(late)
            ready = dict(poll.poll(1000 * min(left, POLL_S)))
            if self._printed_to in ready and self._read_printed() == 0:
                poll.unregister(self._printed_to)
            if self._requests in ready and request:
                request = request[self._write(request) :]
                if not request:
                    poll.unregister(self._requests)
            if self._replies in ready:
                self._read_reply()
                if self._reply.endswith(b"\n"):
                    return self._parsed()
            elif self._process.poll() is not None:
                raise Lost(self._death())

    def _write(self, request: memoryview) -> int:
        try:
            return os.write(self._requests, request)
        except BrokenPipeError:
            raise Lost(self._death()) from None

    def _read_reply(self) -> None:
        received = os.read(self._replies, 2**16)
        if not received:
            raise Lost(self._death())
        self._reply += received
        if len(self._reply) > MOST_REPLY:
            raise Lost(f"replied with more than {MOST_REPLY:,} bytes")

    def _parsed(self) -> Any:
        self._read_printed()
        line, self._reply = self._reply, b""
        if self._printed:
            print(plain(self._printed.decode(errors="replace")).rstrip(), file=sys.stderr)
            self._printed = b""
        try:
            return json.loads(line)
        except ValueError:
            raise Lost(f"replied {shortened(repr(line))}, which is not a result") from None

    def _read_printed(self) -> int | None:
        """The number of bytes read: 0 where there will be no more, None where there are none now."""
        try:
            received = os.read(self._printed_to, 2**16)
        except BlockingIOError:
            return None
        self._printed += received
        if len(self._printed) > MOST_PRINTED:
            raise Lost(f"printed more than {MOST_PRINTED:,} bytes")
        return len(received)

    def _death(self) -> str:
        """How the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        with suppress(Lost):
            while self._read_printed():
                pass
        status = self._process.returncode
        if status is None:
            how = "closed the pipe of its results"
        elif status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        said = plain(self._printed[-500:].decode(errors="replace")).strip()
        return f"{how}{f'; it last printed: {said}' if said else ''}"

    def kill(self) -> None:
        """Ends the process, and those of its session that it has started. Any thread may call it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        os.close(self._replies)
        self._process.stdin.close()
        self._process.stdout.close()
