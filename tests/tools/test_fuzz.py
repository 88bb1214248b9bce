"""The fuzz target: a short run of it, and that it finds what is wrong and repeats it."""

from __future__ import annotations

from random import Random

import fuzz
import pytest

from gspo_megatron.base.errors import DataError


def test_hostile_input_is_used_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "200", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("200 cases of config, jsonl, header, message")


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_cases_of_a_target_are_both_used_and_refused(target: str) -> None:
    used = 0
    for case in range(60):
        try:
            fuzz.TARGETS[target](Random(f"{target} 0 {case}"))
            used += 1
        except fuzz.REFUSALS:
            pass
    assert 0 < used < 60


def test_a_fault_is_printed_with_the_command_that_repeats_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(random: Random) -> None:
        draw = random.random()
        if draw > 0.9:
            raise KeyError(draw)
        if draw > 0.8:
            raise DataError("\x1b[31m")
        if draw > 0.7:
            raise DataError("x" * 20_000)

    monkeypatch.setitem(fuzz.TARGETS, "jsonl", broken)
    assert fuzz.main(["--only", "jsonl", "--cases", "60", "--seed", "5"]) == 1
    printed = capsys.readouterr()
    assert "steers the terminal" in printed.err and "a message of 20000 characters" in printed.err
    assert "KeyError" in printed.err and printed.out.endswith("faults\n")
    again = next(line for line in printed.err.splitlines() if line.startswith("python tools/fuzz.py"))
    assert fuzz.main(again.split()[2:]) == 1
