"""Limits that follow the load, and what happens to ranks that exceed them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gspo_megatron.testing import time_limits
from gspo_megatron.testing.local_ranks import RankError, run_distributed
from gspo_megatron.testing.time_limits import LARGEST, VARIABLE, time_factor


@pytest.mark.parametrize(
    ("of_a_minute", "now", "cores", "factor"),
    [(0.1, 1, 2, 1), (20.0, 1, 2, 10), (1.5, 24, 2, 12), (20.0, 20, 64, 1), (1000.0, 1000, 2, LARGEST)],
    ids=["quiet", "busy", "busy since a moment", "many cores", "bounded"],
)
def test_the_factor_is_the_load_of_a_core(
    of_a_minute: float, now: int, cores: int, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loadavg").write_text(f"{of_a_minute} 0.18 0.12 {now}/80 11206\n")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(time_limits, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "getloadavg", lambda: (of_a_minute, 0.18, 0.12))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert time_factor() == factor


def test_the_environment_says_it_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "50")
    assert time_factor() == 50
    for refused in ("0", "-1", "inf", "nan"):
        monkeypatch.setenv(VARIABLE, refused)
        with pytest.raises(ValueError, match=f"{VARIABLE}={refused} must be a positive number"):
            time_factor()


def test_ranks_that_do_not_come_back_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.1")
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not finish within 1 s"):
        run_distributed(time.sleep, 1, 600, timeout_s=0, like_torchrun=True)


def test_a_limit_grows_with_a_load_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look sees a quiet machine, and its 1 s are over before the rank is through."""
    loads = iter([0.1, 0.1])
    monkeypatch.setattr("gspo_megatron.testing.local_ranks.time_factor", lambda: next(loads, 10.0))
    assert run_distributed(time.sleep, 1, 2, timeout_s=0, like_torchrun=True) == [None]
