"""The README's own example of a reward and of data settings works as written; its links and pictures exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import train_tokenizer

from gspo_megatron.base.batches import Rollout
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return found


def test_the_example_of_data_and_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python"))
    (tmp_path / "run.yaml").write_text(block("yaml"))
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"question": f"What is {n} and {n + 1}?", "answer": str(2 * n + 1)}) for n in range(200)]
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    # Another test may have imported a module of this name.
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    trained = ["data/train.jsonl", "--fields", "question", "answer", "--vocab-size", "280"]
    train_tokenizer.main([*trained, "--output", "data/tokenizer.model"])
    try:
        inputs = settle(load_config("run.yaml"), 1)
    finally:
        sys.modules.pop("my_rewards", None)
    prompt = inputs.train_prompts[3]
    assert prompt.text == "Q: What is 3 and 4?\nA: " and prompt.answer == "7"
    rollout = Rollout(0, prompt, [], [], truncated=False, policy_version=0, text="It is\n#### 7")
    (score,) = inputs.rewards.score([rollout])
    assert score.reward == pytest.approx(1.2) and not score.error


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
