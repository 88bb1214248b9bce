"""data.train and data.eval: one source, or several with settings of their own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.build.data import sources_of
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.mixture import Mixture

YAML = """
data:
  train:
    - {source: DIR/math.jsonl, weight: 3, prompt_field: question, prompt_template: "Q: {prompt} {{x}}"}
    - {source: "task:reverse", name: backwards, task: {max_length: 4}}
    - {source: DIR/unused.jsonl, weight: 0}
  eval: {source: DIR/math.jsonl, prompt_field: question}
  max_prompt_tokens: 12
precision: {device: cpu}
reward: {functions: {exact_match: 1}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{i}", "answer": i, "level": 1} for i in range(20)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(YAML.replace("DIR", str(tmp_path)))
    return tmp_path


def test_sources_have_settings_of_their_own(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    math, task = sources_of(config, "train")
    assert (math.name, math.weight, math.spec.prompt_field) == ("math", 3, "question")
    assert (task.name, task.weight, task.spec.task) == ("backwards", 1, {"max_length": 4})
    (held_out,) = sources_of(config, "eval")
    assert (held_out.name, held_out.spec.prompt_template, held_out.spec.size) == ("", "{prompt}", 256)
    (folder / "again.yaml").write_text(to_yaml(config))
    assert load_config(folder / "again.yaml") == config

    inputs = settle(config, 1)
    assert isinstance(inputs.train_prompts, Mixture) and inputs.sets[0].num_prompts == 20
    prompt = inputs.train_prompts[0]
    assert (prompt.text, prompt.source, prompt.metadata) == ("Q: 0 {x}", "math", {"level": 1})
    assert inputs.train_prompts[1].source == "backwards" and inputs.sets[0].prompts[3].text == "3"


def test_a_list_on_the_command_line(folder: Path) -> None:
    given = f"data.train=[{{source: {folder}/math.jsonl, prompt_field: question, name: x}}]"
    (source,) = sources_of(load_config(None, [given]), "train")
    assert (source.name, source.spec.source) == ("x", f"{folder}/math.jsonl")
    assert sources_of(load_config(None, ["data.train=~/x.jsonl"]), "train")[0].spec.source.startswith("/")
    listed = load_config(None, ["data.train=[~/x.jsonl, {source: ~/y.jsonl}]"])
    assert all(source.spec.source.startswith("/") for source in sources_of(listed, "train"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train is an empty list"),
        ([5], r"data\.train\[0\] is 5; expected a source"),
        (["a.jsonl", {"weight": 2}], r"data\.train\[1\] is \{'weight': 2\}; expected a source"),
        ([{"source": "a.jsonl", "wieght": 2}], r"unknown key 'wieght'; did you mean 'weight'\?"),
        ([{"source": "a.jsonl", "weight": -1}], "weight -1 must be a number of 0 or more"),
        ([{"source": "a.jsonl", "weight": True}], "weight True must be"),
        ([{"source": "a.jsonl", "weight": 0}, {"source": "b", "weight": 0}], "the weights of all sources are 0"),
        (["x/a.jsonl", "y/a.parquet"], "two sources called 'a'"),
        ([{"source": "a.jsonl", "overlong": "cut"}], "data.overlong='cut' is not one of error, drop"),
        ([{"source": "a.jsonl", "chat": "maybe"}], "data.chat"),
        ([{"source": "task:reverse", "prompt_field": "q"}], "prompt_field of the source task:reverse has no effect"),
        (None, "data.train is None; expected a source"),
    ],
)
def test_sources_that_cannot_be_used(train: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data": {"train": train, "eval": "task:reverse"}}))
    with pytest.raises(ConfigError, match=message):
        settle(load_config(tmp_path / "config.json", ["precision.device=cpu"]), 1)


def test_only_what_a_source_leaves_to_the_section_has_an_effect_there(folder: Path) -> None:
    def checked(*more: str) -> Config:
        return settle(load_config(folder / "config.yaml", more), 1).config

    checked("data.overlong=drop")
    with pytest.raises(ConfigError, match=r"data\.prompt_field='q' has no effect"):
        checked("data.prompt_field=q")
    with pytest.raises(
        ConfigError, match=r"data\.eval has 2 sources; set data\.eval to one, and name others in eval\.sets"
    ):
        checked("data.eval=[task:reverse, task:addition]")
    with pytest.raises(ConfigError, match=r"data\.eval=null .* only a generated task"):
        checked("data.eval=null")


def test_what_is_left_out_is_named_by_source(folder: Path) -> None:
    path = folder / "math.jsonl"
    path.write_text(path.read_text() + '{"question": "' + "9" * 20 + '", "answer": 1}\n' + '{"answer": 1}\n')
    with pytest.raises(DataError, match=r"math\.jsonl:21: the prompt has .* tokens"):
        settle(load_config(folder / "config.yaml"), 1)
    inputs = settle(load_config(folder / "config.yaml", ["data.overlong=drop", "data.bad_rows=drop"]), 1)
    (train, held_out) = [text for text in inputs.warnings if "left out" in text]
    assert train.startswith("data.train, math: rows left out: 1 too long, 1 missing field; the first of them: ")
    assert "math.jsonl:21: the prompt has" in train and held_out.startswith("data.eval: rows left out: 1 too long, 1")


def test_duplicates_are_named_or_left_out(folder: Path) -> None:
    path = folder / "math.jsonl"
    path.write_text(path.read_text() * 2)
    texts = settle(load_config(folder / "config.yaml"), 1).warnings
    assert "data.train, math: 20 prompts with the text of an earlier one; data.duplicates=drop leaves them out" in texts
    texts = settle(load_config(folder / "config.yaml", ["data.duplicates=drop"]), 1).warnings
    assert any(text.startswith("data.train, math: rows left out: 20 duplicate; the first of them: ") for text in texts)


def test_what_was_found_of_large_data_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that a reward cannot read are looked for once, not at every start."""
    monkeypatch.setattr("gspo_megatron.build.data.Cache", partial(Cache, least_bytes=0))
    judged: list[int] = []
    monkeypatch.setattr(
        "gspo_megatron.rewards.rewards.Rewards.check_answer", lambda _, prompt: judged.append(prompt.id)
    )
    given = ["data.train=" + str(folder / "math.jsonl"), "data.eval=task:reverse", "data.prompt_field=question"]
    given += ["precision.device=cpu", f"run.cache={folder}/cache", "data.eval_size=1"]
    # 20 prompts to train on, and the held-out one at every start.
    for rewards, expected in (("exact_match", 21), ("exact_match", 22), ("format", 43)):
        settle(load_config(None, [*given, f"reward.functions.{rewards}=1"]), 1)
        assert len(judged) == expected


def test_a_source_may_have_a_reward_of_its_own(folder: Path) -> None:
    math = f"{{source: {folder}/math.jsonl, prompt_field: question, reward: last_number}}"
    both = "{source: 'task:reverse', reward: {exact_match: 2, format: 0}}"
    given = ["data.eval=task:addition", "precision.device=cpu", "reward.functions.exact_match=1"]
    inputs = settle(load_config(None, [f"data.train=[{math}, {both}, task:sort_digits]", *given]), 1)
    try:
        prompts = [inputs.train_prompts[i] for i in range(3)]
        assert [p.source for p in prompts] == ["math", "reverse", "sort_digits"]
        asked = [Rollout(i, p, [], [], False, 0, text=p.answer) for i, p in enumerate(prompts)]
        asked += [Rollout(9, prompts[0], [], [], False, 0, text=f"It is {prompts[0].answer}.")]
        scores = inputs.rewards.score(asked)
        assert [score.reward for score in scores] == [1, 2, 1, 1]
        assert [list(score.terms) for score in scores[:3]] == [
            ["last_number"],
            ["exact_match", "format"],
            ["exact_match"],
        ]
        for rollout, score in zip(asked, scores, strict=True):
            rollout.reward_terms = score.terms
        assert [inputs.rewards.accuracy(rollout) for rollout in asked] == [1, 1, 1, 1]
    finally:
        inputs.rewards.close()
    for reward, message in (("[1]", "is neither the name of one"), ("{exact_match: yes}", "the weight True of reward")):
        with pytest.raises(ConfigError, match=message):
            settle(load_config(None, [f"data.train=[{{source: 'task:reverse', reward: {reward}}}]", *given]), 1)
