"""The lines of a run, as a terminal shows them."""

from __future__ import annotations

import math
import re

import pytest

from gspo_megatron.monitor.console import Console


def row(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "reward/mean": 0.25,
        "accuracy": 0.5,
        "clip_fraction": 0.125,
        "tokens_per_second": 1234.0,
        "time/step_s": 2.0,
        "entropy": 1.5,
        "response_length/mean": 20.0,
        "grad_norm": 0.75,
        "kl/old": 1e-4,
        **more,
    }


def lines(capsys: pytest.CaptureFixture[str], rows: list[dict[str, float]], every: int = 1) -> list[str]:
    console = Console()
    for one in rows:
        console.step(one, steps=10, every=every)
    return capsys.readouterr().out.splitlines()


def test_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    (line,) = lines(capsys, [row(1)])
    assert re.fullmatch(
        r"step 1/10  reward 0\.250  accuracy 50\.0%  clip 12\.5%  1,234 tokens/s  0m1[78]s left", line
    ), line


def test_the_summary_of_a_run_that_was_continued_is_of_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for one in (row(6), row(7), row(8, **{"eval/accuracy": 0.75})):
        console.step(one, steps=8)
    console.summary()
    said = capsys.readouterr().out
    assert "Steps 6 to 8" in said and "reward (mean of 1 step)" in said and "(greedy)" not in said
    more = {"eval/gsm8k/accuracy": 0.25, "eval/gsm8k/accuracy_low": 0.2, "eval/gsm8k/reward": 0.3}
    console.step(row(9, **{"eval/accuracy": 1.0, **more}), steps=9)
    console.summary()
    said = capsys.readouterr().out
    assert "held-out accuracy 100.0%, gsm8k 25.0%\n" in said and re.search(r"\(greedy\) . +75\.0% . 100\.0%", said)


def test_a_wide_terminal_shows_more(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (line,) = lines(capsys, [row(1)])
    assert re.match(r"\d\d:\d\d:\d\d  step 1/10", line)
    assert line.endswith("left  entropy 1.5  length 20  gradient 0.75  kl 0.0001")


def test_a_metric_of_nothing_is_a_dash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (line,) = lines(capsys, [row(1, clip_fraction=math.nan, entropy=math.nan)])
    assert "clip -  " in line and "entropy -  " in line


def test_some_steps_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every third, evaluations, and the last."""
    rows = [row(step, **({"eval/accuracy": 0.5} if step == 4 else {})) for step in range(1, 11)]
    assert [re.search(r"step (\d+)/", line)[1] for line in lines(capsys, rows, every=3)] == ["3", "4", "6", "9", "10"]


def test_a_sign_of_life_after_a_minute_without_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("gspo_megatron.monitor.console.time.monotonic", lambda: now[0])
    console = Console()
    for now[0], said in ((59.0, ""), (60.0, "a\\x00\n"), (119.0, ""), (121.0, "a\\x00\n")):
        console.sign_of_life(lambda: "a\0")
        assert capsys.readouterr().out == said
