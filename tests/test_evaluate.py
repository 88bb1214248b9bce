"""`python -m gspo_megatron.evaluate`: what it writes, on layouts and from a Hugging Face folder; what it refuses."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.build.convert import to_folder
from gspo_megatron.evaluate import main
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.estimates import pass_at_k
from gspo_megatron.testing.commands import forked
from gspo_megatron.train import main as train
from tests.support.small import SMALL

COMMON = (
    *("precision.dtype=fp32", "model.init_std=0.2", "model.max_sequence_length=16", "train.tokens_per_micro_batch=40"),
    *("data.tokenizer=characters:0123456789>", "data.eval_size=6", "data.task={min_length: 1, max_length: 2}"),
    *("train.steps=3", "train.eval_every=1", "rollout.prompts_per_step=2", "rollout.group_size=2"),
    *("rollout.max_new_tokens=4", "train.warm_start_steps=40", "train.warm_start_lr=1e-2", "optimizer.lr=1e-3"),
    *("algorithm.updates_per_rollout=1", "logging.tensorboard=false", "checkpoint.keep=1", "eval.rollouts=-1"),
    "checkpoint.keep_best=eval/more/pass@4",
    "eval.sets.more={source: 'task:sort_digits', n: 6, k: [1, 4], size: 5, temperature: 1.3, max_new_tokens: 3}",
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory."""
    folder = tmp_path_factory.mktemp("run") / "run"
    [(status, errors)] = forked(1, [*SMALL, *COMMON, f"run.dir={folder}"], command=train)
    assert status == 0, errors
    return folder


def evaluated(run: Path, output: Path, *more: str, num_processes: int = 1) -> dict[str, Any]:
    """The table of the run's best checkpoint."""
    arguments = ["--config", str(run / "config.yaml"), "--output", str(output), *more]
    for status, errors in forked(num_processes, arguments, command=main):
        assert status == 0, errors
    return json.loads((output / "table.json").read_text())


@pytest.fixture(scope="module")
def table(run: Path) -> dict[str, Any]:
    return evaluated(run, run / "out", "--checkpoint", "best")


def test_it_measures_what_the_run_measured(run: Path, table: dict[str, Any]) -> None:
    """The best checkpoint has the metrics, and the responses, of its evaluation in the run."""
    rows = read(run / "metrics.jsonl")
    best = max(rows, key=lambda row: (row["eval/more/pass@4"], -row["step"]))
    name = (run / "checkpoints" / "best").read_text().strip()
    assert name == (f"step_{best['step']:06d}" if best["step"] else "warm_start_000040")
    assert table["weights"] == str(run / "checkpoints" / name)
    assert {key.removeprefix("eval/more/"): v for key, v in best.items() if key.startswith("eval/more/")} == {
        **{key: pytest.approx(metric["value"]) for key, metric in table["sets"]["more"]["metrics"].items()},
        **{f"accuracy_{e}": pytest.approx(table["sets"]["more"]["metrics"]["accuracy"][e]) for e in ("low", "high")},
    }
    assert table["sets"]["held_out"]["metrics"]["accuracy"]["value"] == pytest.approx(best["eval/accuracy"])
    for ours, file in (("more.jsonl", "eval_more_step"), ("held_out.jsonl", "eval_step")):
        assert read(run / "out" / ours) == read(run / "rollouts" / f"{file}_{best['step']:06d}.jsonl")


def test_the_responses_give_the_table(run: Path, table: dict[str, Any]) -> None:
    assert sorted(path.name for path in (run / "out").iterdir()) == [
        *("held_out.jsonl", "more.jsonl", "table.json", "table.md")
    ]
    rows, found = read(run / "out" / "more.jsonl"), table["sets"]["more"]
    groups = [[row["correct"] for row in rows if row["prompt_id"] == i] for i in range(5)]
    assert [len(group) for group in groups] == [6] * 5 and found["prompts"] == 5
    assert any(len({row["response"] for row in rows if row["prompt_id"] == i}) > 1 for i in range(5)), "sampled"
    expected = statistics.fmean(pass_at_k(6, sum(group), 4) for group in groups)
    assert found["metrics"]["pass@4"]["value"] == pytest.approx(expected)
    assert (found["n"], found["temperature"], found["max_new_tokens"]) == (6, 1.3, 3)
    assert "| more | 5 | 6 | 1.3 |" in (run / "out" / "table.md").read_text()


@pytest.mark.parametrize("layout", [("parallel.tp=2", "parallel.ep=2"), ("parallel.ep=2",)], ids=["tp2", "dp2"])
def test_every_layout_samples_the_same(
    run: Path, table: dict[str, Any], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    same = evaluated(run, tmp_path / "out", "--checkpoint", "best", *layout, num_processes=2)
    assert read(tmp_path / "out" / "more.jsonl") == read(run / "out" / "more.jsonl")
    assert same["sets"]["more"]["metrics"] == table["sets"]["more"]["metrics"]


def test_a_hugging_face_folder_of_the_run_gives_the_same(run: Path, tmp_path: Path) -> None:
    """Its sizes take the place of those in the settings; one set, and an override after it."""
    to_folder(run, tmp_path / "hf", Console(on=False), dtype="fp32")
    hf = evaluated(run, tmp_path / "out", "--hf", str(tmp_path / "hf"), "--sets", "more", "data.eval_size=2")
    latest = evaluated(run, tmp_path / "latest", "--checkpoint", "latest", "--sets", "more")
    assert hf["weights"] == str(tmp_path / "hf") and [*hf["sets"]] == ["more"]
    assert hf["sets"]["more"]["metrics"] == latest["sets"]["more"]["metrics"]
    # Another model's checkpoint is refused by what it holds.
    arguments = ["--config", str(run / "config.yaml"), "--checkpoint", "latest", "model.num_layers=3"]
    [(status, errors)] = forked(1, arguments, command=main)
    assert status == 2 and re.search(r"CheckpointError: .*num_layers", errors)


def test_services_are_tried_before_weights_are_loaded(tmp_path: Path) -> None:
    """As before a run: a service that is not there costs no minutes of loading, here of nothing."""
    term = "{function: remote, url: 'http://127.0.0.1:1/', retries: 0}"
    (tmp_path / "config.yaml").write_text("{}")
    settings = [*SMALL, *COMMON, f"run.dir={tmp_path}/run", f"reward.terms=[{term}]"]
    arguments = ["--config", str(tmp_path / "config.yaml"), "--checkpoint", "latest", *settings]
    [(status, errors)] = forked(1, arguments, command=main)
    assert status == 2 and "reward 'remote'" in errors and "start the service" in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ConfigError: checkpoint.load=none: the responses would be those of random weights"),
        (["--checkpoint", "latest", "--hf", "x"], "ConfigError: argument --hf: not allowed with argument --checkpoint"),
        (["--hf", "nowhere"], "ConfigError: model.hf=nowhere: there is no nowhere/config.json"),
        (["--checkpoint", "best"], "CheckpointError: checkpoint.load=best: .*best does not exist"),
        (["--checkpoint", "latest", "--sets", "mroe"], "no held-out set is called 'mroe'; did you mean 'more'"),
        (["--checkpoint", "latest", "--output", "/proc/self/mem"], "--output /proc/self/mem cannot be written"),
        (["--checkpoint", "latest", "eval.sets.a/b=task:reverse"], "eval.sets: 'a/b' cannot be the name of a set"),
    ],
)
def test_a_command_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    settings = [*SMALL, *COMMON] if "--hf" not in arguments else []
    asked = ["--config", str(tmp_path / "config.yaml"), *arguments, *settings, f"run.dir={tmp_path}/run"]
    assert main(asked) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
