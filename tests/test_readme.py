"""The README's examples and commands work as printed; its links and pictures exist."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import check_layout
import plan_layout
import pytest
import train_tokenizer

from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.train import main as train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
JOURNEYS = (ROOT / "docs" / "journeys.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return found


def commands(start: str, page: str = README) -> list[list[str]]:
    """Words of the printed commands that begin so."""
    joined = page.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith(start)]


def test_the_example_of_data_and_reward_is_in_the_folder() -> None:
    assert block("python") == (ROOT / "examples" / "own_data" / "my_rewards.py").read_text()
    assert block("yaml") == (ROOT / "examples" / "own_data.yaml").read_text()
    head = (ROOT / "examples" / "own_data.yaml").read_text().replace("\n#   ", "\n").replace("\\\n#", "\\\n")
    for start in ("python tools/train_tokenizer.py", "PYTHONPATH=examples/own_data"):
        printed = commands(start)[0]
        assert printed in [
            shlex.split(line) for line in head.replace("\\\n", " ").splitlines() if line.startswith(start)
        ]


def test_the_commands_for_your_own_data_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer and smaller steps. The run says what it starts with and where its results are."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (_, _, *arguments), (_, _, _, _, _, _, *training) = (
        *commands("python tools/train_tokenizer.py"),
        commands("PYTHONPATH=examples/own_data")[0],
    )
    train_tokenizer.main(arguments)
    assert training == ["--config", "examples/own_data.yaml"]
    monkeypatch.syspath_prepend(str(tmp_path / "examples" / "own_data"))
    # Another test may have imported a module of this name.
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    few = ["train.warm_start_steps=1", "train.steps=1", "rollout.prompts_per_step=4", "data.eval_size=4"]
    results = run_distributed(started, 2, [*training, *few, "logging.tensorboard=false"], like_torchrun=True)
    sys.modules.pop("my_rewards", None)
    assert [status for status, _ in results] == [0, 0], results
    said = results[0][1]
    assert "run directory runs/own_data, seed 1" in said
    assert "prompts: 800 from examples/own_data/train.jsonl; held out 4 from examples/own_data/test.jsonl" in said
    assert "python tools/plot_run.py runs/own_data --output runs/own_data/plot.png" in said
    rows = [json.loads(line) for line in (tmp_path / "runs/own_data/metrics.jsonl").read_text().splitlines()]
    assert {"reward/last_number", "reward/my_rewards:concise"} <= rows[1].keys() and rows[0]["warm_start/loss"] > 0


def started(arguments: list[str]) -> tuple[int, str]:
    """(exit status, what it printed) of the training command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        return train(arguments), out.getvalue()


def test_the_commands_that_plan_run_as_printed_and_those_for_clusters_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second as far as a CPU can tell: their settings are planned for their number of processes, on H100s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ((_, _, _, *dry_run),) = commands("python -m gspo_megatron.train --dry-run")
    assert train(dry_run) == 0
    ((_, _, *plan),) = commands("python tools/plan_layout.py")
    assert plan_layout.main(plan) == 0
    # What the first example trains its tokenizer to, in the commands before.
    (tmp_path / "runs/own_data").mkdir(parents=True)
    text = [str(ROOT / "examples/own_data/train.jsonl"), "--fields", "question", "solution", "--vocab-size", "300"]
    train_tokenizer.main([*text, "--output", "runs/own_data/tokenizer.model"])
    monkeypatch.syspath_prepend(str(tmp_path / "examples" / "own_data"))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    small, batch, launch = (
        *[words for words in commands("PYTHONPATH=examples/own_data") if "8" in words],
        *commands("sbatch"),
        *commands("bash examples/launch.sh"),
    )
    nodes = launch[launch.index("--nnodes") + 1]
    assert batch[batch.index("--nodes") + 1] == nodes == "4" and batch[3] == "examples/slurm/train.sbatch"
    for words, count in ((small, 8), (["gspo_megatron.train", *batch[4:]], 32), (launch, 32)):
        arguments = words[words.index("gspo_megatron.train") + 1 :]
        assert train([*arguments, "--dry-run", "--world-size", str(count), "--gpu-memory", "79.6"]) == 0
    # Those of the journeys: what plans as printed, what trains as a plan.
    for words in commands("python -m gspo_megatron.train", JOURNEYS):
        assert train(words[3:]) == 0
    starts = [*commands("torchrun", JOURNEYS), *commands("sbatch", JOURNEYS)]
    assert len(starts) == 3
    for words in starts:
        assert train([*words[words.index("--config") :], "--dry-run", "--world-size", "2"]) == 0
    ((_, _, *check),) = commands("python tools/check_layout.py")
    assert check_layout.main(check) == 0
    sys.modules.pop("my_rewards", None)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


WRITTEN = re.compile(r"^<!-- (?!end of)(?!.*Written by).*?^<!-- end of .*?$|^```.*?^```$", re.MULTILINE | re.DOTALL)
"""What a command writes between two marks, and code, in which a command is one line."""


def test_lines_are_no_wider_than_an_editor() -> None:
    """But for tables, which cannot be broken."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    wide = [
        f"{page.name}: {line}"
        for page in pages
        for line in WRITTEN.sub("", page.read_text()).splitlines()
        if len(line) > 128 and not line.startswith("|")
    ]
    assert len(pages) > 15 and not wide
