"""Data that a run could not use is refused before it starts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from gspo_megatron.base.errors import DataError
from gspo_megatron.build.inputs import Inputs, settle
from gspo_megatron.config.loading import load_config


def settled(folder: Path, *settings: str, **record: Any) -> Inputs:
    path = folder / "prompts.jsonl"
    good = {"prompt": "What is 6*7?", "answer": "42", "steps": "42"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good | record)))
    return settle(load_config(None, [f"data.train={path}", f"data.eval={path}", "precision.device=cpu", *settings]), 1)


def test_a_solution_that_the_tokenizer_cannot_write(tmp_path: Path) -> None:
    warm = ("train.warm_start_steps=1", "data.solution_field=steps")
    with pytest.raises(DataError, match=r"the solution of prompt 1 \('What is 6\*7\?'\): character 'é'"):
        settled(tmp_path, *warm, steps="é")
    settled(tmp_path, "data.solution_field=steps", steps="é")  # without a warm start nothing writes it


def test_an_answer_that_a_reward_cannot_read(tmp_path: Path) -> None:
    final = "reward.functions.final_number=1"
    with pytest.raises(DataError, match=r"prompt 1 .* reward 'final_number' cannot judge it: .*the answer 'many'"):
        settled(tmp_path, final, answer="many")
    settled(tmp_path, final, "reward.on_error=count", answer="many")


def test_a_tokenizer_that_changes_prompts_is_warned_of(tmp_path: Path) -> None:
    def trained(name: str, **how: Any) -> str:
        model = io.BytesIO()
        text = iter(["What is 6*7? x2 12 34", "What is x² + y²?"] * 50)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=model, vocab_size=30, model_type="char", pad_id=3, minloglevel=2, **how
        )
        (tmp_path / name).write_bytes(model.getvalue())
        return f"data.tokenizer={tmp_path / name}"

    usual = settled(tmp_path, trained("usual.model"), prompt="What is x²?")
    (warning,) = [text for text in usual.warnings if "changes" in text]
    assert "changes 1 of the first 2 prompts" in warning and "'What is x²?' becomes 'What is x2?'" in warning
    plain = trained("plain.model", normalization_rule_name="identity")
    assert not [text for text in settled(tmp_path, plain, prompt="What is x²?").warnings if "changes" in text]


def test_a_reward_that_always_fails_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm start of hours would come before the first step that calls it."""
    (tmp_path / "early.py").write_text(
        "import os\n\n"
        "def raises(response, answer, metadata):\n    return len(response) / metadata['level']\n\n"
        "def text(response):\n    return response\n\n"
        "def ends(response):\n    os._exit(3)\n\n"
        "def good(response, tokens):\n    return len(tokens) / len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def found(function: str, *settings: str) -> list[str]:
        inputs = settled(tmp_path, f"reward.functions.early:{function}=1", *settings)
        inputs.rewards.close()
        return [text for text in inputs.warnings if "tried with" in text]

    with pytest.raises(
        DataError, match=r"prompt 0 \('What is 6\*7\?'\), tried with the response '42': reward 'early:r"
    ):
        found("raises")
    for settings in (["data.train=task:reverse"], ["data.eval=[{source: 'task:addition', reward: 'early:text'}]"]):
        with pytest.raises(DataError, match=r"'early:text' failed: TypeError: it returned .* \(str\).*on_error=count"):
            found("good" if "eval" in settings[0] else "text", *settings)
    assert all("KeyError: 'level'; such a reward counts" in text for text in found("raises", "reward.on_error=count"))
    train, held_out = found("ends")
    assert "its process ended with status 3" in train and "prompt 0" in held_out
    assert not found("good") and not found("raises", "reward.isolate=false")
