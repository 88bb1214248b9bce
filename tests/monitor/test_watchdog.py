"""The remaining ranks name the missing one: processes that stop, fail and are killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from gspo_megatron.base.errors import DataError, EnginesDown
from gspo_megatron.device import open_device
from gspo_megatron.monitor import watchdog
from gspo_megatron.monitor.watchdog import RankWatchdog
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[2]
HERE = f"host {re.escape(socket.gethostname())}"


def meet(what: str, last: int, slower: float, timeout_s: float = 2.0) -> tuple[str, str]:
    """Two all-reduces, in phases of their own; before the second, rank `last` does `what`. Every time is `slower` times
    as long. Returns the error that ended this rank, and what the watchdog said."""
    # Tests need not wait as long as runs do.
    watchdog.BEAT_S = 0.3 * slower
    device = open_device("cpu", "fp32")
    timeout_s *= slower
    device.start_processes(timeout_s)
    error = ""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            with RankWatchdog(device.notes(), device.rank, device.world_size, timeout_s=timeout_s) as out:
                out.note("step 1, sampling")
                torch.distributed.all_reduce(torch.zeros(1))
                out.note("step 1, update 2" if device.rank != last else "step 1, scoring")
                if device.rank == last:
                    do(what, slower)
                if what == "lose engines":
                    do(what, slower)
                torch.distributed.all_reduce(torch.zeros(1))
        except Exception as raised:
            error = type(raised).__name__
    torch.distributed.destroy_process_group()
    return error, printed.getvalue()


def do(what: str, slower: float) -> None:
    if what == "stop":
        time.sleep(0.5 * slower)
        subprocess.Popen(["sh", "-c", f"sleep {9 * slower}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "fail":
        raise ValueError("no such reward\nand more")
    elif what == "refuse":
        raise DataError("prompt 3 is empty")
    elif what == "lose engines":
        raise EnginesDown("no engine is left to sample with")
    elif what == "be slow":
        time.sleep(4 * slower)


def test_a_rank_that_stands_still_is_named() -> None:
    slower = time_factor()
    (first, told), (second, also_told), _ = run_distributed(meet, 3, "stop", 2, slower, 6.0, like_torchrun=True)
    assert first == second == "RuntimeError"
    pattern = (
        rf"missing rank: rank 2 \({HERE}\) last reported (\d+) s ago in step 1, scoring; "
        "this is rank {}, in step 1, update 2\n"
    )
    # Rank 0 speaks when half the time-out is over, both do when their collective fails.
    assert len(re.findall(pattern.format(0), told)) == 2 and len(told.splitlines()) == 2, told
    [seconds] = re.findall(pattern.format(1), also_told)
    assert len(also_told.splitlines()) == 1 and 6 * slower - 1 <= int(seconds) <= 9 * slower


@pytest.mark.parametrize(
    ("what", "error"), [("fail", "ValueError: no such reward"), ("refuse", "DataError: prompt 3 is empty")]
)
def test_the_rank_that_failed_first_is_named(what: str, error: str) -> None:
    (ended, told), (own, silent) = run_distributed(meet, 2, what, 1, time_factor(), like_torchrun=True)
    assert ended == "RuntimeError" and own == error.split(":")[0] and silent == ""
    assert f"failed first, in step 1, scoring: {error}; this is rank 0, in step 1, update 2" in told


class SlowStore(HashStore):
    """Keeps each note of the thread that writes them on its way, until the run has left its block."""

    def __init__(self) -> None:
        super().__init__()
        self.on_the_way, self.arrive = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        if threading.current_thread().name == "notes":
            self.on_the_way.set()
            self.arrive.wait(5)
        super().set(key, value)


@pytest.mark.parametrize("error", [DataError, ValueError])
def test_the_last_note_names_the_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the note before it was still on its way: the process ends next, and nothing would write another."""
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    store = SlowStore()
    with pytest.raises(error), RankWatchdog(store, 1, 2, timeout_s=60) as out:
        store.set("0", json.dumps(watchdog.Note("here", "step 1", 0.0, 0.0, "")))
        out.note("step 1, scoring")
        assert store.on_the_way.wait(5)
        threading.Timer(0.2, store.arrive.set).start()
        raise error("prompt 3 is empty")
    for thread in threading.enumerate():
        if thread.name == "notes":
            thread.join(5)  # nor may the older note come after it
    assert json.loads(store.get("1"))[-1] == f"{error.__name__}: prompt 3 is empty"


def test_an_error_that_every_rank_is_told_misses_none() -> None:
    """Of engines: its message says what is wrong, and another rank has it a moment earlier."""
    for _, said in run_distributed(meet, 2, "lose engines", 1, time_factor(), like_torchrun=True):
        assert said == ""


def test_a_rank_that_is_slow_is_not_missing() -> None:
    """It still writes its notes: half-way to when the others give up on it, the first says where it is."""
    results = run_distributed(meet, 2, "be slow", 1, time_factor(), like_torchrun=True)
    (first, told), (second, also_told) = results
    assert (first, second) == ("RuntimeError", "RuntimeError")
    assert re.search(
        r"rank 1 \(host .*\) has been in step 1, scoring for \d+ s; of 2 ranks, 1 in step 1, update 2", told
    )
    assert "rank 0" in also_told and "failed first, in step 1, update 2: RuntimeError" in also_told


def test_no_news_is_good_news() -> None:
    assert run_distributed(meet, 2, "nothing", 1, time_factor(), like_torchrun=True) == [("", "")] * 2


CONFIG = """
model: {num_layers: 1, hidden_size: 16, num_experts: 2, expert_ffn_size: 16, max_sequence_length: 16}
parallel: {ep: 2}
precision: {device: cpu}
data: {tokenizer: "characters:0123456789>", task: {min_length: 1, max_length: 4}, eval_size: 4}
rollout: {prompts_per_step: 4, group_size: 2, max_new_tokens: 4}
algorithm: {updates_per_rollout: 2}
train: {steps: 10000}
logging: {tensorboard: false}
"""


def test_the_command_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    settings = ["--config", "config.yaml", "run.dir=run", f"parallel.timeout_s={20 * time_factor()}"]
    command = [sys.executable, "-m", "gspo_megatron.train", *settings]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        rows = tmp_path / "run" / "metrics.jsonl"
        started = time.monotonic()
        while not (rows.exists() and len(rows.read_text().splitlines()) > 2):
            assert ranks[0].poll() is None and time.monotonic() - started < 120 * time_factor(), "no rows of metrics"
            time.sleep(0.1)
        ranks[1].kill()
        _, told = ranks[0].communicate(timeout=60 * time_factor())
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode == 1
    place_of = r"(step \d+, (sampling|scoring|update [12])|the evaluation of policy version \d+)"
    pattern = rf"missing rank: rank 1 \({HERE}\) last reported \d+ s ago in {place_of}; this is rank 0, in {place_of}\n"
    assert re.search(pattern, told), told
