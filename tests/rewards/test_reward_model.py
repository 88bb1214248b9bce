"""A reward model's scores are those that transformers gives for one conversation at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.rewards import Rewards, score_rollouts
from tests.rewards.test_remote import rollouts
from tests.support.hugging_face import TEMPLATE, tokenizer_folder

TEXTS = ("No.", "It is 12, as 3 times 4 is 12.", "", "one two three four five six seven " * 3)


def open_model(folder: Path, **parameters: Any) -> Rewards:
    return Rewards({}, None, "count", terms=[{"function": "reward_model", "model": str(folder), **parameters}])


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (None, "is not the folder of a model"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "a reward model is a ...ForSequenceClassification"),
        ({"architectures": None}, "a reward model is a"),
        ([1], "is not the folder of a model"),
    ],
)
def test_another_folder_is_refused(config: Any, error: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=error):
        open_model(tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"initializer_range": 0.5, "max_position_embeddings": 128}


def save_model(folder: Path, kind: str, **config: Any) -> Callable[[str, str], float]:
    """Writes a classifier of random weights; returns transformers' own score of a prompt and a response."""
    import torch
    import transformers

    tokenizer_folder(folder, template=None if kind == "bert" else TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    sizes = {**SIZES, "vocab_size": len(tokenizer), **config}
    if kind == "bert":
        made = transformers.BertConfig(**sizes, num_labels=3)
    else:
        made = transformers.Qwen3Config(**sizes, num_labels=1, num_key_value_heads=2, head_dim=8)
    model = transformers.AutoModelForSequenceClassification.from_config(made).eval()
    model.save_pretrained(folder)

    def score(prompt: str, response: str) -> float:
        with torch.inference_mode():
            if kind == "bert":
                return float(model(**tokenizer(prompt, response, return_tensors="pt")).logits.softmax(-1)[0, 2])
            said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return float(model(**tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)).logits)

    return score


def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    score = save_model(tmp_path, "qwen3", pad_token_id=None)
    rewards = open_model(tmp_path, batch_size=3)
    rewards.check_services()
    found = rollouts(*TEXTS, "far too long " * 100)
    score_rollouts(rewards, found)
    rewards.close()
    expected = [score("what?", text) for text in TEXTS]
    assert [r.reward for r in found[:-1]] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert "tokens, more than the 128 that" in found[-1].reward_error and not found[-1].reward_lost


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_padding_changes_no_score(kind: str, tmp_path: Path) -> None:
    """Where a response holds the padding id, transformers reads the score before it, and so does this."""
    pytest.importorskip("transformers")
    from gspo_megatron.rewards.classifier import scores

    score = save_model(tmp_path, kind, pad_token_id=2)
    asked = {"prompts": ["what?"] * 4, "responses": TEXTS, "messages": [[]] * 4, "model": str(tmp_path)}
    label = {"label": 2} if kind == "bert" else {}
    assert scores(**asked, **label) == pytest.approx([score("what?", text) for text in TEXTS], abs=1e-5)


def test_what_is_no_classifier_is_refused_before_the_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from gspo_megatron.rewards.classifier import scores

    save_model(tmp_path, "bert", pad_token_id=2)
    rewards = open_model(tmp_path)
    with pytest.raises(ConfigError, match=r"reward 'reward_model': .*the model has 3 classes; set label"):
        rewards.check_services()
    rewards.close()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.bert.save_pretrained(other := tmp_path / "other")
    with pytest.raises(ValueError, match="lacks the weights classifier"):
        scores(prompts=["a"], responses=["b"], messages=[[]], model=str(other), label=1)
