"""Stopping on request: real signals, sent to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gspo_megatron.run.stop import QUIT, SAME_S, SIGNALS, StopRequest
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[2]


def process(body: str) -> subprocess.Popen[str]:
    """A process that runs `body` with StopRequest's classes at hand, and says "ready" when it may be signalled."""
    code = """
import os, signal, sys, threading, time
from gspo_megatron.run import stop
from gspo_megatron.run.stop import StopRequest
"""
    started = subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert started.stdout and started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_raises_the_flag_and_the_process_goes_on(number: signal.Signals) -> None:
    child = process(
        """
        with StopRequest() as stop_request:
            print("ready", flush=True)
            while not stop_request.is_set():
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # too late to take the exit status
        print(stop_request.reason)
        """
    )
    child.send_signal(number)
    out, err = child.communicate(timeout=20 * time_factor())
    assert (child.returncode, out, err) == (0, f"{number.name}\n", "")


def test_signals_that_come_together_are_one() -> None:
    """Slurm signals every process of a job, and torchrun hands on what it gets."""
    child = process(
        f"""
        stop.URGENT_S, stop.SAME_S = 0.5, {SAME_S * time_factor()}
        with StopRequest(grace_s=60) as asked:
            print("ready", flush=True)
            while not asked.is_set():
                time.sleep(0.01)
            time.sleep(1.5)
        print("saved")
        """
    )
    for _ in range(5):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, err = child.communicate(timeout=20 * time_factor())
    assert (child.returncode, out, err) == (0, "saved\n", "")


def long_after_sigterm() -> subprocess.Popen[str]:
    """A process that got SIGTERM, and for which the next signal is another one."""
    child = process(
        """
        stop.URGENT_S, stop.SAME_S = 0.5, 0.1
        with StopRequest(grace_s=600) as asked:
            print("ready", flush=True)
            while not asked.is_set():
                time.sleep(0.01)
            time.sleep(2 * stop.SAME_S)
            print("heard", flush=True)
            time.sleep(600)
        """
    )
    child.send_signal(signal.SIGTERM)
    assert child.stdout and child.stdout.readline() == "heard\n"
    return child


def test_a_second_signal_leaves_little_time() -> None:
    child = long_after_sigterm()
    child.send_signal(signal.SIGUSR1)
    _, err = child.communicate(timeout=5 * time_factor())
    assert child.returncode == 1
    assert "SIGUSR1, another signal: 0.5 s left to save" in err
    assert "most recent call first" in err and 'File "<string>"' in err


def test_a_process_that_hangs_is_ended_with_its_stacks() -> None:
    """The main thread waits where no Python runs, as in a collective: here for the other end of a pipe."""
    child = process(
        """
        nobody_reads, nobody_writes = os.pipe()
        with StopRequest(grace_s=0.5) as asked:
            signal.siginterrupt(signal.SIGTERM, False)
            print("ready", flush=True)
            os.read(nobody_reads, 1)
        """
    )
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=20 * time_factor())
    assert child.returncode == 1
    assert "Timeout (0:00:00.500000)!" in err and err.count("most recent call first") >= 2


def test_the_clock() -> None:
    with StopRequest(exit_after_s=1.5) as stop_request:
        assert not stop_request.is_set()
        time.sleep(1.55)
        assert stop_request.is_set() and stop_request.reason == "checkpoint.exit_after_s=1.5 has passed"
    with StopRequest() as stop_request:
        assert not stop_request.is_set()


def test_handlers_are_given_back_where_nobody_asked() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    for _ in range(3):
        with StopRequest():
            assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_second_ctrl_c_quits_at_once() -> None:
    """The main thread hangs. Under torchrun, one Ctrl-C arrives twice: from the terminal and from torchrun."""
    for forwarded, status in ((False, QUIT), (True, 0)):
        child = process(
            f"""
            with StopRequest(forwarded={forwarded}, say=lambda line: print(line, flush=True)) as asked:
                print("ready", flush=True)
                while not asked.is_set():
                    time.sleep(0.01)
                time.sleep(2 if {forwarded} else 600)
            """
        )
        child.send_signal(signal.SIGINT)
        assert child.stdout and child.stdout.readline().endswith("Ctrl-C again quits without saving\n")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20 * time_factor())
        assert child.returncode == status
        assert err == ("" if forwarded else "SIGINT again: quitting without saving\n")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1])
def test_ctrl_c_right_after_another_signal_is_the_same_request(first: signal.Signals) -> None:
    """A Ctrl-C reaches a parent and its runs; the SIGTERM that the parent makes of it may be handled first."""
    child = process(
        f"""
        stop.SAME_S = {SAME_S * time_factor()}
        with StopRequest(say=lambda line: print(line, flush=True)) as asked:
            print("ready", flush=True)
            while not asked.is_set():
                time.sleep(0.01)
            time.sleep(1)
        print("saved")
        """
    )
    child.send_signal(first)
    assert child.stdout and child.stdout.readline() == f"{first.name}: saving at the next safe point, then exiting\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20 * time_factor())
    assert (child.returncode, out, err) == (0, "saved\n", "")


def test_ctrl_c_long_after_another_signal_quits_at_once() -> None:
    child = long_after_sigterm()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20 * time_factor())
    assert (child.returncode, err) == (QUIT, "SIGINT again: quitting without saving\n")
