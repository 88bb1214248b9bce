"""A sweep: its file, its runs through a kill, the numbers made of them, and the page."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_algorithms import main
from sweep import Run, load_sweep
from sweep_page import markdown, page, picture, ticks
from sweep_results import results

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.run.stop import REFUSED, STOPPED
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[2]
SWEEP = """
title: "Two & two"
about: A test.
program: [gspo_megatron.testing.noisy_sampler, --router, "0.3", --bf16, --]
base: base.yaml
settings: [train.steps=2]
rows:
  gspo: [algorithm.variant=gspo, algorithm.routing_replay=compare]
  slow: [algorithm.variant=grpo, train.warm_start_steps=100]
seeds: [1, 2]
"""
BASE = """
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, num_query_groups: 1, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 16, init_std: 0.2}
precision: {device: cpu}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 4}, eval_size: 4,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 6}
optimizer: {lr: 1.0e-3}
logging: {tensorboard: false}
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP)
    return file


# --- runs ---


def test_a_sweep_goes_on_after_a_kill_and_repeats_nothing(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep_file.parent / "runs"
    log = folder / "slow" / "seed_1" / "console.log"
    arguments = [str(sweep_file), "--runs", str(folder)]

    def interrupt() -> None:
        since = time.monotonic()
        while time.monotonic() - since < 60 * time_factor():
            if log.exists() and "warm start 50/100" in log.read_text():
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = main([*arguments, "--rows", "slow", "--seeds", "1"])
    thread.join()
    assert status == STOPPED and "once more kills them" in capsys.readouterr().err
    (cut_off,) = load_sweep(sweep_file, folder).selected(["slow"], 1).runs
    assert cut_off.state == "unfinished" and not [row for row in cut_off.rows() if row["step"] > 0]
    found = json.loads((folder / "report.json").read_text())
    assert [curve["name"] for curve in found["curves"]] == ["slow"]
    assert found["curves"][0]["measures"]["reward"]["interval"] is None  # what is to be continued counts in nothing

    assert main(arguments) == 0
    assert "4 runs, 4 of them to do" in capsys.readouterr().out
    runs = list(load_sweep(sweep_file, folder).runs)
    assert [run.state for run in runs] == ["finished"] * 4
    assert [[row["step"] for row in run.rows()] for run in runs] == [[0, 1, 2]] * 4
    assert "continuing" in log.read_text() and log.read_text().count("warm start 50/100") == 1
    assert cut_off.outcome()["status"] == 0

    text = (folder / "report.html").read_text()
    assert_is_a_page(text)
    assert "Two &amp; two" in text and "All 4 runs have finished" in text
    found = json.loads((folder / "report.json").read_text())
    assert_numbers_are_the_runs(found, folder)
    assert found["curves"][0]["measures"]["routers_changed"]["interval"]["n"] > 0
    # Of a step whose rewards are all equal nothing is scored.
    assert max(row.get("router/sampler_changed_fraction/layer_02", 0) for row in runs[0].rows()) > 0.01
    assert "python -m gspo_megatron.testing.noisy_sampler --router 0.3 --bf16 -- --config" in runs[0].command

    ended = {run.directory: (run.directory / "outcome.json").stat().st_mtime_ns for run in runs}
    assert main(arguments) == 0
    assert "4 runs, 0 of them to do" in capsys.readouterr().out
    assert ended == {run.directory: (run.directory / "outcome.json").stat().st_mtime_ns for run in runs}
    sweep_file.write_text(SWEEP.replace("steps=2]", "steps=3]"))
    assert main(arguments) == REFUSED
    assert "was made with train.steps=2, and the sweep has train.steps=3" in capsys.readouterr().err


def assert_numbers_are_the_runs(found: dict[str, Any], folder: Path) -> None:
    """Rewards of metrics.jsonl, their means and intervals by hand: t of one degree of freedom is tan(0.475 pi)."""
    for curve in found["curves"]:
        rewards = {}
        for seed in (1, 2):
            lines = (folder / curve["name"] / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()
            rewards[seed] = [json.loads(line)["reward/mean"] for line in lines[1:]]
        reward = curve["measures"]["reward"]
        assert reward["seeds"] == {str(s): {"steps": [1, 2], "values": values} for s, values in rewards.items()}
        mean, half = np.mean([*rewards.values()], axis=0), np.abs(np.diff([*rewards.values()], axis=0)[0]) / 2
        assert reward["mean"] == pytest.approx(mean)
        assert np.array(reward["high"]) - mean == pytest.approx(math.tan(0.475 * math.pi) * half)
        # A tenth of two steps is one.
        assert reward["interval"]["mean"] == pytest.approx(mean[-1]) and reward["interval"]["n"] == 2


class Tags(HTMLParser):
    """Every tag that is opened is closed in order; attributes in `seen`."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_is_a_page(text: str) -> None:
    """It is whole, needs no other file and no script; its pictures are SVG, each said in words."""
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not any(name in ("src", "href") for _, attributes in tags.seen for name in attributes)
    assert "url(" not in text and "@import" not in text
    pictures = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len(pictures) > 5
    for drawn in pictures:
        parsed = ElementTree.fromstring(drawn)
        assert parsed.get("aria-label") or parsed.get("aria-hidden")
        assert "nan" not in drawn and "inf" not in drawn


# --- what is made of runs, written by hand ---


def written(run: Run, status: int | None, rewards: list[float], accuracies: list[float] | None = None) -> None:
    """A run directory with a row a step, the first without a reward."""
    run.directory.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.5}]
    for step, reward in enumerate(rewards, start=1):
        row = {"step": step, "reward/mean": reward, "clip_fraction": 0.01 * step, "ratio/min": 0.5, "ratio/max": 2.0}
        rows.append({**row, "router/changed_fraction/layer_01": 0.1, "router/changed_fraction/layer_02": 0.3})
        if accuracies:
            rows[-1]["eval/accuracy"] = accuracies[step - 1]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.directory / "metrics.jsonl").write_text(text + '{"step": 99, "rew')
    if status is not None:
        run.end(status, 2.0, "the loss is <nan>" if status else "")


def test_failures_are_shown_and_survivors_are_no_mean(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file.write_text(SWEEP.replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    folder = tmp_path / "runs"
    gspo, slow = load_sweep(sweep_file, folder).curves
    written(gspo.runs[0], 0, [0.25] * 20, [0.75] * 20)
    written(gspo.runs[1], 70, [0.5] * 12, [0.7] * 12)
    written(gspo.runs[2], 0, [0.75] * 20, [0.8] * 19 + [0.1])
    written(slow.runs[0], 0, [0.125] * 20)
    written(slow.runs[1], -9, [1.0] * 3)
    written(slow.runs[2], 1, [1.0] * 3)
    document = tmp_path / "page.md"
    arguments = [str(sweep_file), "--runs", str(folder), "--report-only", "--document", str(document)]
    assert main(arguments) == REFUSED
    assert "is to have the lines '<!-- small -->' and '<!-- end of small -->'" in capsys.readouterr().err
    document.write_text("Before.\n<!-- small -->\nold\n<!-- end of small -->\nAfter.\n")
    assert main(arguments) == 0
    found = json.loads((folder / "report.json").read_text())
    mine, other = found["curves"]
    # The second seed has stopped at step 12, where the curve ends, and counts in the number with what it had.
    assert mine["measures"]["reward"]["steps"] == list(range(1, 13))
    numbers = {"1": 0.25, "2": 0.5, "3": 0.75}
    assert mine["measures"]["reward"]["numbers"] == numbers
    half = 4.302653 * 0.25 / math.sqrt(3)  # Student's t of two degrees of freedom, from a table
    expected = {"mean": 0.5, "low": pytest.approx(0.5 - half), "high": pytest.approx(0.5 + half), "n": 3}
    assert mine["measures"]["reward"]["interval"] == expected
    assert mine["measures"]["ratio_spread"]["numbers"]["1"] == pytest.approx(math.log(4))
    assert mine["measures"]["routers_changed"]["numbers"]["1"] == pytest.approx(0.2)
    assert mine["measures"]["clip_fraction"]["numbers"] == pytest.approx({"1": 0.105, "2": 0.065, "3": 0.105})
    assert mine["measures"]["accuracy"]["numbers"] == {"1": 0.75, "2": 0.7, "3": 0.1}
    assert mine["measures"]["gain"]["numbers"] == pytest.approx({"1": 0.25, "2": 0.2, "3": -0.4})
    assert [run["collapsed"] for run in mine["runs"]] == [False, False, True]
    # Of the other row only the first seed has a result: no interval, and a difference of one pair.
    assert other["measures"]["reward"]["interval"] == {"mean": 0.125, "low": None, "high": None, "n": 1}
    assert other["against"]["reward"]["mean"] == -0.125 and mine["against"]["reward"] is None
    assert [run["state"] for run in other["runs"]] == ["finished", "unfinished", "failed"]
    text = (folder / "report.html").read_text()
    assert_is_a_page(text)
    for line in (
        "gspo, seed 2: stopped by a guard after 12 steps; status 70<pre>the loss is &lt;nan&gt;</pre>",
        "gspo, seed 3: collapsed",
        "slow, seed 2: unfinished after 3 steps; status -9</li>",
        "slow, seed 3: failed after 3 steps; status 1<pre>",
        "python tools/compare_algorithms.py",
    ):
        assert line in text, line
    lines = document.read_text().splitlines()
    assert lines[:2] == ["Before.", "<!-- small -->"] and lines[-2:] == ["<!-- end of small -->", "After."]
    assert "| | `gspo`, 3 of 3 seeds | `slow`, 1 of 3 seeds |" in lines
    assert "| reward; mean of the last 10% of steps | 0.5 [-0.121, 1.12] | 0.125<br>-0.125 |" in lines
    drawn = ElementTree.parse(tmp_path / "images" / "small.svg").getroot()
    assert len(drawn.findall("{*}svg")) == 5  # accuracy, reward, clip fraction, spread and drift


def test_rows_choose_what_is_run_and_not_what_is_reported(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file.write_text(SWEEP.replace("seeds:", "  later: [algorithm.variant=grpo]\nseeds:"))
    folder = tmp_path / "runs"
    arguments = [str(sweep_file), "--runs", str(folder), "--report-only", "--rows", "slow"]
    assert main(arguments) == REFUSED
    assert f"{folder} has no run to report; start the sweep without" in capsys.readouterr().err
    gspo, slow, _ = load_sweep(sweep_file, folder).curves
    for run in gspo.runs:
        written(run, 0, [0.25 * run.seed])
    written(slow.runs[0], 0, [0.5])

    def reported() -> dict[str, Any]:
        assert main(arguments) == 0
        return json.loads((folder / "report.json").read_text())

    found = reported()
    assert [curve["name"] for curve in found["curves"]] == ["gspo", "slow"]
    assert [run["state"] for run in found["curves"][1]["runs"]] == ["finished", "not run"]
    assert found["curves"][1]["against"]["row"] == "gspo" and found["curves"][1]["against"]["reward"]["mean"] == 0.25
    text = (folder / "report.html").read_text()
    assert "Of 4 runs:" in text and "<li>1 run not started yet</li>" in text and "seed 2: not run" not in text
    for run in gspo.runs:
        shutil.rmtree(run.directory)
    found = reported()
    assert [curve["name"] for curve in found["curves"]] == ["slow"]
    assert found["curves"][0]["against"]["row"] == "gspo" and found["curves"][0]["against"]["reward"] is None
    assert "the difference to `gspo`" in markdown(found)


def test_a_run_that_came_to_its_end_is_finished_whatever_its_status(sweep_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    done, cut_off = load_sweep(sweep_file, folder).curves[0].runs
    for run, said in ((done, f"results are in {done.directory}: metrics.jsonl\nplot them: now"), (cut_off, "step 1")):
        written(run, -2, [0.5])
        (run.directory / "console.log").write_text(f"began\n{said}\n")
    assert [run.state for run in (done, cut_off)] == ["finished", "unfinished"]
    text = page(results(load_sweep(sweep_file, folder), "the command"))
    assert "gspo, seed 2: unfinished after 1 step; status -2" in text and "gspo, seed 1" not in text


def test_what_only_some_sweeps_measure_is_reported_where_it_is_known(sweep_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    sweep = load_sweep(sweep_file, folder)
    (first, second), (other, _) = (curve.runs for curve in sweep.curves)
    for run in (first, second, other):
        written(run, 0, [0.5, 0.5])
    found = results(sweep, "the command")
    keys = set(found["measures"])
    assert (
        "router drift, share of changed choices" in markdown(found) and not {"sampler_kl", "correction_weight"} & keys
    )
    assert all(set(curve["measures"]) == keys == set(curve["against"]) - {"row"} for curve in found["curves"])
    for run in (first, second):
        rows = [{"step": 0}, {"step": 1, "sampler/kl": 0.25, "router/sampler_changed_fraction/layer_01": 0.5}]
        rows.append({"step": 2, "sampler/kl": 0.75, "router/sampler_changed_fraction/layer_02": 0.25})
        (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = results(sweep, "the command")
    assert set(found["measures"]) == keys | {"sampler_kl", "sampler_routing"}
    assert found["curves"][0]["measures"]["sampler_kl"]["numbers"] == {1: 0.5, 2: 0.5}
    assert found["curves"][0]["measures"]["sampler_routing"]["numbers"] == {1: 0.375, 2: 0.375}
    assert found["curves"][1]["measures"]["sampler_kl"]["interval"] is None
    assert "| KL from sampler to policy, nats a token; mean of all steps | 0.5 [0.5, 0.5] | &ndash; |" in markdown(
        found
    )
    assert_is_a_page(page(found))


def test_points_are_drawn_against_each_other(sweep_file: Path, tmp_path: Path) -> None:
    """The order of overrides: all rows', the row's, the point's. A row may leave points out."""
    points = """
points: {"1": [algorithm.updates_per_rollout=1, algorithm.routing_replay=none], "4": [algorithm.updates_per_rollout=4]}
axis: updates
"""
    rows = SWEEP.replace("slow: [algorithm.variant=grpo,", "slow: {points: ['4'], settings: [algorithm.variant=grpo,")
    sweep_file.write_text(rows.replace("steps=100]", "steps=100]}") + points)
    folder = tmp_path / "runs"
    sweep = load_sweep(sweep_file, folder)
    assert [curve.name for curve in sweep.curves] == ["gspo/1", "gspo/4", "slow/4"]
    configs = [curve.runs[0].config() for curve in sweep.curves]
    assert [(c.algorithm.updates_per_rollout, c.algorithm.routing_replay) for c in configs] == [
        (1, "none"),
        (4, "compare"),
        (4, "none"),
    ]
    # Seeds come last: what is there when time is up can be compared.
    assert [run.directory.relative_to(folder).as_posix() for run in sweep.runs][:4] == [
        "gspo/1/seed_1",
        "gspo/4/seed_1",
        "slow/4/seed_1",
        "gspo/1/seed_2",
    ]
    for curve in sweep.curves:
        for run in curve.runs:
            written(run, 0, [0.5, 0.25 * run.seed])
    text = page(results(sweep, "the command"))
    assert_is_a_page(text)
    assert "Against updates" in text and "updates 4" in text and "the command --rows slow/4" in text
    assert [curve.name for curve in sweep.selected(["gspo/1", "slow"]).curves] == ["gspo/1", "slow/4"]


@pytest.mark.parametrize(
    ("written", "instead", "says"),
    [
        ("rows:", "row:", "has the key 'row'; did you mean 'rows'?"),
        ("base: base.yaml", "base: other.yaml", "other.yaml' does not exist"),
        ("variant=gspo", "variant=gspa", "row gspo: variant 'gspa' is unknown; did you mean 'gspo'?"),
        ("variant=gspo,", "variant=gspo, train.stepz=3,", "row gspo: unknown config key 'train.stepz'"),
        ("variant=gspo,", "variant=gspo, run.seed=3,", "rows.gspo sets run.seed=3, which the sweep sets"),
        ("gspo: [", "../gspo: [", "has the name '../gspo', which is to name a folder"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds must be a list of different numbers"),
        ("seeds: [1, 2]", "seeds: []", "has no seeds"),
        (
            'program: [gspo_megatron.testing.noisy_sampler, --router, "0.3", --bf16, --]',
            "program: gspo_megatron.train",
            "program must be a list, a module and its arguments",
        ),
        ("settings: [", "settings: {a: ", "is not YAML"),
        ("settings: [train.steps=2]", "settings: train.steps=2", "settings must be a list of overrides"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    written: str, instead: str, says: str, sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SWEEP.count(written) == 1
    sweep_file.write_text(SWEEP.replace(written, instead))
    assert main([str(sweep_file), "--runs", str(tmp_path / "runs")]) == REFUSED
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_row_that_is_not_there(sweep_file: Path) -> None:
    with pytest.raises(ConfigError, match="no row 'gspa'; did you mean 'gspo'"):
        load_sweep(sweep_file).selected(["gspa"])


def test_seeds_that_are_not_there(sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep_file), "--runs", str(tmp_path / "runs"), "--seeds", "9"]) == REFUSED
    assert "small.yaml has 2: 1, 2; give a number up to 2" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_sweeps_in_the_folder_can_start() -> None:
    sweeps = sorted((ROOT / "examples/sweeps").glob("*.yaml"))
    assert [file.stem for file in sweeps] == ["figure2", "noise", "updates"]
    for file in sweeps:
        assert len(list(load_sweep(file).runs)) >= 15


@pytest.mark.parametrize("name", ["figure2", "noise", "updates"])
def test_the_study_has_the_committed_numbers(name: str) -> None:
    found = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert markdown(found) in (ROOT / "docs/study.md").read_text()
    assert picture(found) == (ROOT / f"docs/images/{name}.svg").read_text()


# --- statistics ---


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.11), (-3e-5, 7e-5), (12, 4000), (0, 3e-14), (2, 2)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    assert len({f"{tick:g}" for tick in found}) == len(found) >= (2 if high > low else 1), "as they are written"
