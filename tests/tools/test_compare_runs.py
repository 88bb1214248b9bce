from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from compare_runs import main

ROWS: list[dict[str, Any]] = [
    {"step": step, "loss": 0.5 / (step + 1), "kl/ref": None, "tokens": 100 + step, "time/step_s": 0.25, "ok": True}
    for step in range(12)
]
ROLLOUTS = [{"id": i, "tokens": [3, 4, i], "text": "a\u2028b", "terms": {"right": 1.0}} for i in range(3)]
NUDGED = math.nextafter(0.5 / 11, 1)


def write(run: Path, rows: list[dict[str, Any]] = ROWS, rollouts: dict[int, list[Any]] | None = None) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, group in (rollouts or {}).items():
        (run / "rollouts").mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in group)
        (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")
    return run


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} if row["step"] == step else row for row in ROWS]


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    status = main([str(a) for a in arguments])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("rows", "printed"),
    [
        (ROWS, ["equal"]),
        (changed(4, **{"time/step_s": 9.0, "tokens_per_second": 1.0}), ["equal"]),
        (changed(10, tokens=110.0), ["equal"]),
        (changed(10, loss=NUDGED), [f"step 10: loss: {0.5 / 11} in A, {NUDGED} in B"]),
        (changed(2, tokens=None), ["step 2: tokens: 102 in A, None in B"]),
        (changed(2, ok=1), ["step 2: ok: True in A, 1 in B"]),
        (changed(2, **{"kl/ref": 0.0}), ["step 2: kl/ref: None in A, 0.0 in B"]),
        (changed(3, entropy=1.5), ["step 3: entropy: only in B, 1.5"]),
        (changed(3, tokens=0, loss=0), ["step 3: loss: 0.125 in A, 0 in B", "and 1 more; --all prints them"]),
        (ROWS[:11], ["step 11: 1 row in A, no rows in B"]),
        ([*ROWS, ROWS[7]], ["step 7: 1 row in A, 2 rows in B"]),
        (ROWS[::-1], ["equal"]),
    ],
)
def test_the_first_step_and_key_that_differ(
    rows: list[dict[str, Any]], printed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", rows)
    assert compare(capsys, a, b) == (int(printed != ["equal"]), printed)


def test_rows_that_both_runs_have_twice_are_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / name, [*ROWS, ROWS[3]]) for name in "ab")
    assert compare(capsys, a, b) == (1, ["step 3: 2 rows in A, 2 rows in B"])


def test_all_of_them_in_the_order_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics and rollouts side by side; a step before another whatever its name sorts as."""
    other = [{**ROLLOUTS[0], "tokens": [3, 5]}, ROLLOUTS[1], {**ROLLOUTS[2], "terms": {"right": 0.0}}]
    a = write(tmp_path / "a", rollouts={2: ROLLOUTS, 9: ROLLOUTS})
    b = write(tmp_path / "b", changed(10, tokens=1), rollouts={2: other})
    everything = [
        "step 2: rollouts[0].tokens: 3 items in A, 2 in B",
        "step 2: rollouts[0].tokens[1]: 4 in A, 5 in B",
        "step 2: rollouts[2].terms.right: 1.0 in A, 0.0 in B",
        "step 9: rollouts/step_000009.jsonl: only in A",
        "step 10: tokens: 110 in A, 1 in B",
    ]
    assert compare(capsys, a, b, "--all") == (1, everything)
    assert compare(capsys, a, b) == (1, [everything[0], "and 4 more; --all prints them"])


def test_rollouts_of_one_run_alone_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", rollouts={1: ROLLOUTS}), write(tmp_path / "b")
    assert compare(capsys, a, b) == (0, [f"rollouts are not compared: {b} has none", "equal"])


def test_values_that_are_not_numbers_are_equal_to_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [{"id": 1, "reward": math.nan, "score": -math.inf}]
    a, b = (write(tmp_path / name, rollouts={1: odd}) for name in "ab")
    assert compare(capsys, a, b) == (0, ["equal"])
    c = write(tmp_path / "c", rollouts={1: [{"id": 1, "reward": 0.0, "score": -1e308}]})
    assert compare(capsys, a, c, "--all", "--tolerance", "1")[1] == [
        "step 1: rollouts[0].reward: nan in A, 0.0 in B",
        "step 1: rollouts[0].score: -inf in A, -1e+308 in B",
    ]


@pytest.mark.parametrize(("factor", "status"), [(0.99, 0), (1.01, 1)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_a_tolerance_is_relative_above_1_and_absolute_below(
    factor: float, status: int, size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", changed(5, loss=size))
    b = write(tmp_path / "b", changed(5, loss=size - factor * 1e-4 * max(1, size)))
    assert compare(capsys, a, b, "--tolerance", "1e-4")[0] == status


@pytest.mark.parametrize(
    "text", [None, "", '{"step": 0}\n{"step": 1, "lo', "[1]\n", '{"loss": 1}\n', '{"step": "1"}\n']
)
def test_a_run_that_cannot_be_read(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a"), tmp_path / "b"
    b.mkdir()
    if text is not None:
        (b / "metrics.jsonl").write_text(text)
    assert main([str(a), str(b)]) == 2
    printed = capsys.readouterr()
    assert str(b / "metrics.jsonl") in printed.err and not printed.out
