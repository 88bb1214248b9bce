from __future__ import annotations

import json
from pathlib import Path

import pytest
from inspect_data import main

ROWS = [{"question": f"What is {i}+{i}?", "answer": 2 * i, "steps": f"{i}+{i}={2 * i}", "level": i} for i in range(30)]
SETTINGS = """
data:
  train: TRAIN
  eval: TRAIN
  prompt_field: question
  solution_field: steps
  prompt_template: "Q: {prompt}\\nA: "
rollout: {max_new_tokens: 8}
model: {max_sequence_length: 40}
reward: {functions: {last_number: 1}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "config.yaml").write_text(SETTINGS.replace("TRAIN", str(path)))
    return str(tmp_path / "config.yaml")


def test_good_data(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "train.jsonl: 30 prompts\n-- prompt 1: 19 tokens\n   | Q: What is 0+0?\n   | A: \n" in said
    assert "   pieces:   Q :   W h a t   i s   0 + 0 ? \\n A :  \n   answer:   '0'\n   solution: '0+0=0'\n" in said
    assert "metadata: {'level': 0}" in said
    assert "        17 to      32         30  " + "#" * 40 in said and "median 21, nine in ten at most 21" in said
    assert "20 of 30 are longer than rollout.max_new_tokens=8 allows" in said
    assert "rewards of 16 written solutions: mean 1; of wrong answers: mean 0" in said


def test_bad_rows_are_counted_and_shown(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.jsonl"
    bad = '{"question": ""}\n{\n{"question": "' + "9" * 40 + '", "answer": 1, "steps": "1"}\n'
    path.write_text(path.read_text() + bad + json.dumps(ROWS[0] | {"steps": "é"}) + "\n" + json.dumps(ROWS[1]) + "\n")
    assert main([config, "--rows", "0", "rollout.max_new_tokens=6"]) == 1
    said = capsys.readouterr().out
    for line in (
        *("-- 1 empty\n   ", "train.jsonl:31: field 'question' is empty", "-- 1 not JSON", "train.jsonl:32: not JSON"),
        *("-- 1 too long", "train.jsonl:33: the prompt has 47 tokens, the limit is 34", "-- 2 duplicate"),
        *(
            "are longer than rollout.max_new_tokens=6 allows",
            "such rows would stop the run (data.overlong, data.bad_rows): ",
        ),
    ):
        assert line in said, line
    assert main([config, "data.overlong=drop", "data.bad_rows=drop"]) == 0
    assert "would stop" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        # It wants `#### 4`.
        ("final_number", "0 for the written solution '0+0=0' to 'Q: What is 0+0?"),
        ("always:one", "1 for a wrong answer '1+1=2' to 'Q: What is 0+0?"),
    ],
)
def test_a_reward_that_does_not_tell_right_from_wrong(
    config: str,
    reward: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "always.py").write_text("def one(*, prompt, response, answer):\n    return 1.0\n")
    (tmp_path / "other.yaml").write_text(Path(config).read_text().replace("last_number", f'"{reward}"'))
    assert main([str(tmp_path / "other.yaml")]) == 1
    said = capsys.readouterr().out
    assert "the reward does not tell right from wrong" in said and (reward == "always:one" or message in said)


def test_a_mixture_and_a_task(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{{source: {tmp_path}/train.jsonl, name: sums}}"
    assert main([config, f"data.train=[{own}, task:addition]", "--rows", "1", "--judge", "4"]) == 0
    said = capsys.readouterr().out
    assert "== sums: 30 prompts" in said and "== addition: 4 prompts" in said
    assert main([config, "data.train=nowhere.jsonl"]) == 2
    assert "error: the file nowhere.jsonl does not exist" in capsys.readouterr().err
