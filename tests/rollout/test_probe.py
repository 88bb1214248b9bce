"""The probe's sequence, and what it says about log-probs that differ."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.probe import LENGTH, Probe

TRAINER = [-0.5, -1.0, -2.0]


def engine(found: list[float]) -> Any:
    return SimpleNamespace(name="engine 1", version=lambda: 7, probe=lambda tokens, prompt_length: found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([-0.5, -1.00005, -2.0], ""),
        (
            [-0.5, -1.0002, -2.0011],
            "engine 1, weights version 7: .*token 3 of the probe (id 12) is -2.001100 in the engine and -2.000000 in "
            "the trainer, a gap of 0.0011, and the limit is 0.0001; 2 of 3 .*So small a gap",
        ),
        ([-7.5, -1.0, -2.0], "token 1 of the probe (id 10) is -7.500000 .*So large a gap is one of weights"),
        ([-0.5, math.nan, -2.0], "token 2 .* is nan .*look for NaN"),
        ([-0.5, -math.inf, -2.0], "token 2 .* is -inf .*look for NaN"),
        ([-0.5, -1.0], "2 tokens of the probe were scored instead of 3"),
    ],
)
def test_the_probe_names_both_numbers_the_place_and_the_remedy(found: list[float], message: str) -> None:
    probe = Probe((9, 10, 11, 12), 1)
    if not message:
        assert probe.check(engine(found), TRAINER) == pytest.approx(5e-5)
        return
    with pytest.raises(EngineError, match=re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")):
        probe.check(engine(found), TRAINER)


def test_a_wider_limit_lets_more_pass() -> None:
    assert not Probe((9, 10, 11, 12), 1, limit=0.05).complaint([-0.5, -1.04, -2.0], TRAINER)


def test_log_probs_that_stand_still_while_the_trainers_move() -> None:
    probe = Probe((9, 10, 11, 12), 1)
    assert not probe.standstill(TRAINER, TRAINER)
    # Ten units in the last place of float32, in which one of 2 is 2.4e-7.
    assert not probe.standstill(TRAINER, [-0.5, -1.0, -2.0000023])
    complaint = probe.standstill(TRAINER, [-0.5, -1.0, -2.0000025])
    assert "token 3 (id 12) was -2.00000000 in the trainer and is -2.00000250 now" in complaint
    assert probe.standstill(TRAINER, [-0.5, -1.0, -1.9])
    # Near 0 a log-prob is what is left of larger numbers.
    assert not probe.standstill([-1e-6], [-2e-6])
    coarse = Probe((9, 10, 11, 12), 1, resolution=2**-8)
    assert not coarse.standstill(TRAINER, [-0.5, -1.0, -2.007]) and coarse.standstill(TRAINER, [-0.5, -1.0, -2.009])


@pytest.mark.parametrize(("num_ids", "longest"), [(387, 1000), (151_936, 4096), (16, 8)])
def test_the_sequence_is_spread_over_the_vocabulary(num_ids: int, longest: int) -> None:
    tokens = Probe.of_vocabulary(num_ids, longest).tokens
    assert len(tokens) == min(LENGTH, longest) and all(0 <= token < num_ids for token in tokens)
    quarters = [4 * token // num_ids for token in tokens]
    assert min(map(quarters.count, range(4))) >= len(tokens) // 4 - 2
