"""Processes that call reward functions: what a function does there stays there, and costs its own rollout only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.rewards.functions import Outcome
from gspo_megatron.rewards.rewards import Rewards, refuse_unscored, score_rollouts
from gspo_megatron.rewards.worker import OF_THE_RUN
from gspo_megatron.rewards.workers import WorkerPool
from gspo_megatron.run.stop import SIGNALS
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[2]
HOSTILE = """
import asyncio, os, random, signal, subprocess, sys, time

class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def hang(): time.sleep(10_000)
def spin():
    while True: pass
def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
    hang()
def abort(): os.abort()
def exit_at_once(): os._exit(0)
def print_without_end():
    while True: print("noise" * 1000)
def take_memory(): bytearray(10 * 2**30)
def close_everything(): os.closerange(3, 100)
def hold_pipes():
    if os.fork() == 0: hang()
    os._exit(3)
def last_words():
    print("\\x1b[31mthe disk is full")
    os._exit(9)
def leave(): sys.exit(0)
def say_nothing(): raise Silent
def interrupt(): raise KeyboardInterrupt
def told_to_end():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): os.kill(os.getpid(), number)
    program = subprocess.Popen(["sleep", "100"])
    program.terminate()
    return float(-program.wait())
def fork():
    if os.fork() == 0: return 0.0
    return 1.0
def change_state():
    os.chdir("/"); random.seed(1); sys.stdout = None; sys.path.clear()
    return 1.0
def where(): return {"score": 1.0, "here": float(os.path.exists("hostile.py"))}
def draw(): return random.random()
def read_stdin(): return float(len(sys.stdin.read()))
def be_true(): return True

def f(response): return globals()[response]()
def doubled(responses, truncated): return [2.0 * len(r) for r in responses]
def too_few(responses): return [1.0]
async def after(response):
    if response == "block": time.sleep(10_000)
    await asyncio.sleep(float(response))
    return 1.0
def process(): return float(os.getpid())
"""
GIB = 0.5
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    """Two processes, used by all tests here: whatever one has met, the next finds it working."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(HOSTILE)
    before, path = Path.cwd(), list(sys.path)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    functions = {name: (f"hostile:{name}", {}) for name in ("f", "doubled", "too_few", "after")}
    with WorkerPool(functions, workers=2, timeout_s=TIMEOUT_S, memory_gib=GIB, seed=5) as pool:
        yield pool
    os.chdir(before)
    sys.path[:] = path


def outcome(pool: WorkerPool, does: str, id: int = 0) -> Outcome:
    (found,) = pool.submit("f", [{"response": does}], [id]).result(timeout=30 * time_factor())
    return found


@pytest.mark.parametrize(
    ("does", "error"),
    [
        ("hang", "gave no result within reward.timeout_s=1 s"),
        ("deaf", "gave no result within"),
        ("abort", "was ended by SIGABRT"),
        ("exit_at_once", "ended with status 0"),
        ("print_without_end", "printed more than 1,048,576 bytes"),
        ("close_everything", "ended with status 1; it last printed: Traceback"),
        ("hold_pipes", "ended with status 3"),
        ("last_words", r"ended with status 9; it last printed: \x1b[31mthe disk is full"),
        ("take_memory", "MemoryError"),
    ],
)
def test_a_process_that_fails_costs_one_rollout(pool: WorkerPool, does: str, error: str) -> None:
    failed = pool.submit("f", [{"response": does}], [0])
    others = [pool.submit("f", [{"response": "where"}], [i]) for i in range(4)]
    (found,) = failed.result(timeout=30 * time_factor())
    assert found.lost and error in found.error
    assert [other.result()[0].values["score"] for other in others] == [1.0] * 4


@pytest.mark.parametrize(
    ("does", "error"),
    [
        ("leave", "SystemExit: 0"),
        ("say_nothing", "Silent: its text cannot be had, RuntimeError"),
        ("interrupt", "KeyboardInterrupt"),
        ("no_such_function", "KeyError"),
        ("be_true", r"it returned True (bool); expected an int or a float"),
    ],
)
def test_a_function_that_fails_is_the_functions_fault(pool: WorkerPool, does: str, error: str) -> None:
    found = outcome(pool, does)
    assert error in found.error and not found.lost and not found.values


def test_calls_do_not_see_each_other(pool: WorkerPool) -> None:
    """Every call starts in the run's folder, with random numbers of its rollout, and reads nothing."""
    drawn = [outcome(pool, "draw", id).values["score"] for id in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    for does in ("fork", "change_state", "fork", "change_state"):
        assert outcome(pool, does).values == {"score": 1.0}
    for _ in range(4):
        assert outcome(pool, "where").values == {"score": 1.0, "here": 1.0}
    assert outcome(pool, "draw", 1).values["score"] == drawn[0] and outcome(pool, "read_stdin").values["score"] == 0


def test_what_asks_the_run_to_stop_costs_no_reward(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals every process of a job: neither a call nor the start of a process is lost. Programs that a
    function starts still end when they are told to."""
    assert set(OF_THE_RUN) == set(SIGNALS)
    for _ in range(4):
        assert outcome(pool, "told_to_end").values == {"score": float(signal.SIGTERM)}

    class Signalled(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            for number in OF_THE_RUN:
                self.send_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    with WorkerPool({"f": ("hostile:f", {})}, timeout_s=TIMEOUT_S) as other:
        assert outcome(other, "where").values["score"] == 1.0


def test_a_batch_gets_lists_and_returns_one(pool: WorkerPool) -> None:
    assert pool.functions["doubled"].takes == ["response", "truncated"] and pool.functions["doubled"].batch
    items = [{"response": "a" * i, "truncated": False} for i in range(3)]
    assert [o.values for o in pool.submit("doubled", items, [0, 1, 2]).result()] == [
        {"score": 2.0 * i} for i in range(3)
    ]
    errors = [o.error for o in pool.submit("too_few", [{"response": "a"}] * 3, [0, 1, 2]).result()]
    assert errors == ["ValueError: it returned 1 score for 3 responses"] * 3


def test_async_calls_run_together_and_one_that_blocks_is_found(pool: WorkerPool) -> None:
    items = [{"response": text} for text in ("0.5", "0.5", "0.5", "100")]
    start = time.monotonic()
    found = pool.submit("after", items, range(4)).result()
    assert time.monotonic() - start < TIMEOUT_S + 1.5 * time_factor()
    assert [o.values for o in found] == [{"score": 1.0}] * 3 + [{}] and found[3].lost
    found = pool.submit("after", [{"response": "0"}, {"response": "block"}], range(2)).result()
    assert found[0].values == {"score": 1.0} and found[1].lost


def test_a_large_text_goes_both_ways(pool: WorkerPool) -> None:
    """Ten megabytes, with a lone surrogate and a NUL."""
    text = "\udfff\0é" + "x" * 10**7
    (found,) = pool.submit("doubled", [{"response": text, "truncated": True}], [0]).result()
    assert found.values == {"score": 2.0 * len(text)}


def test_the_processes_import_no_torch_and_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, sys\ndef f(response):\n    print('torch' in sys.modules)\n    return float(os.getpid())\n"
        "def spin(response):\n    while True: pass\n"
    )
    code = (
        "import os, signal, time\nfrom gspo_megatron.rewards.workers import WorkerPool\n"
        "pool = WorkerPool({'f': ('mine:f', {}), 'spin': ('mine:spin', {})})\n"
        "print(int(pool.submit('f', [{'response': ''}], [0]).result()[0].values['score']), flush=True)\n"
        "pool.submit('spin', [{'response': ''}], [0]); time.sleep(0.3)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "False"
    worker, end = Path("/proc") / done.stdout.strip(), time.monotonic() + 10 * time_factor()
    while worker.exists() and "(zombie)" not in (worker / "status").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not worker.exists() or "(zombie)" in (worker / "status").read_text()


def test_closing_waits_for_nobody(pool: WorkerPool) -> None:
    with WorkerPool({"f": ("hostile:f", {})}, timeout_s=1000) as other:
        assert other.functions
        running, waiting = (other.submit("f", [{"response": "hang"}], [0]) for _ in range(2))
        time.sleep(0.1)
        start = time.monotonic()
    assert time.monotonic() - start < 5 * time_factor()
    assert running.result()[0].lost
    with pytest.raises(CancelledError):
        waiting.result()


def test_a_module_that_ends_the_process_is_refused(pool: WorkerPool, tmp_path: Path) -> None:
    Path("ends.py").write_text("import os\nprint('bye')\nos._exit(0)\n")
    with pytest.raises(ConfigError, match=r"the process that calls the reward functions ended with status 0; .* bye"):
        Rewards({"ends:f": 1.0})


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout(i, Prompt(5, "what?", (2,), "a"), [4], [-0.1], False, 0, text=t) for i, t in enumerate(texts)]


@pytest.mark.parametrize("on_error", ["stop", "count"])
def test_lost_rewards_count_as_zero_until_they_are_most(pool: WorkerPool, on_error: str) -> None:
    rewards = Rewards({"hostile:f": 1.0, "exact_match": 0.5}, None, on_error, timeout_s=TIMEOUT_S)
    some = rollouts("where", "exit_at_once", "draw")
    score_rollouts(rewards, some)
    assert [r.reward_lost for r in some] == [False, True, False] and some[1].reward == 0
    assert "'hostile:f' failed: its process ended" in some[1].reward_error
    refuse_unscored(some)
    most = rollouts("exit_at_once", "exit_at_once", "draw")
    score_rollouts(rewards, most)
    with pytest.raises(DataError, match=r"(?s)2 of 3 rollouts were lost.*rollout 0, prompt 5 'what\?': .*status 0"):
        refuse_unscored(most)
    rewards.close()
