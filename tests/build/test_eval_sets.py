"""eval.sets: what a set is by default, and what is refused, each with its rule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.build.checks import check_config
from gspo_megatron.build.eval_sets import rewards_in
from gspo_megatron.build.inputs import settle, settle_evaluation
from gspo_megatron.build.set_specs import metric_names, seed_of, set_specs
from gspo_megatron.config.loading import load_config, to_yaml
from gspo_megatron.config.sections import Config

COMMON = (
    "precision.device=cpu",
    "data.tokenizer=characters:0123456789>",
    "model.max_sequence_length=24",
    "run.seed=3",
    "data.task.max_length=4",
    "data.eval_size=20",
)


def config_of(*overrides: str) -> Config:
    return load_config(None, [*COMMON, *overrides])


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_set_samples_as_training_does_where_it_does_not_say() -> None:
    config = config_of(
        *("rollout.temperature=0.8", "rollout.top_k=5", "rollout.max_new_tokens=7"),
        "eval.sets={one: 'task:reverse', several: {source: 'task:reverse', n: 4}}",
        "eval.sets.own={source: 'task:reverse', n: 2, k: [1, 2], temperature: 1, top_p: 0.5, max_new_tokens: 3,"
        " size: 9}",
    )
    one, several, own = set_specs(config)
    assert one.sampling[:4] == (0.0, 1.0, 5, 7) and (one.n, one.k, one.size) == (1, (), None)
    assert several.sampling[:4] == (0.8, 1.0, 5, 7) and (several.n, several.k) == (4, (4,))
    assert own.sampling[:4] == (1.0, 0.5, 5, 3) and (own.k, own.size) == ((1, 2), 9)
    # A task has as many prompts as are asked for, and a prompt as much room as the response leaves.
    assert [s.source.spec.size for s in (one, own)] == [config.data.eval_size, 9]
    assert [s.source.spec.max_prompt_tokens for s in (one, own)] == [17, 21]
    assert len({s.sampling.seed for s in (one, several, own)} | {config.run.seed}) == 4
    assert seed_of(config, "one") != seed_of(config_of("run.seed=4"), "one")
    assert metric_names(config)[2:5] == ["eval/one/accuracy", "eval/one/reward", "eval/several/accuracy"]
    assert {"eval/several/pass@4", "eval/own/maj@1"} < set(metric_names(config))


def test_sets_survive_the_settings_file(tmp_path: Path) -> None:
    """A template with braces, and a home folder, as in data.train."""
    config = config_of("eval.sets.mine={source: ~/test.jsonl, prompt_template: '{{x}} {prompt}', n: 3}")
    assert config.eval.sets["mine"]["source"] == str(Path("~/test.jsonl").expanduser())
    assert config.eval.sets["mine"]["prompt_template"] == "{{x}} {prompt}"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.sets.a/b=task:reverse", "eval.sets: 'a/b' cannot be the name of a set; a name has letters"),
        ("eval.sets.gsm8k.n=8", "eval.sets: 'gsm8k.n' cannot be the name of a set"),
        ("eval.sets.held_out=task:reverse", "'held_out' cannot be the name"),
        ("eval.sets.x={n: 2}", "eval.sets.x is {}; expected a source|eval.sets.x"),
        ("eval.sets.x=[a, b]", "eval.sets.x is .*; expected a source, or {source: test.jsonl, n: 8}"),
        ("eval.sets.x={source: 'task:reverse', sise: 3}", "eval.sets.x has an unknown key 'sise'; did you mean 'size'"),
        (
            "eval.sets.x={source: 'task:reverse', n: 4, k: 8}",
            "eval.sets.x: k=8 needs at least as many responses, and n=4",
        ),
        ("eval.sets.x={source: 'task:reverse', n: 0}", "eval.sets.x: n=0 must be a whole number from 1"),
        ("eval.sets.x={source: 'task:reverse', n: 1001}", "eval.sets.x: n=1001 must be a whole number from 1 to 1,000"),
        ("eval.sets.x={source: 'task:reverse', n: 4, k: [0]}", "eval.sets.x: k=0 must be a whole number"),
        ("eval.sets.x={source: 'task:reverse', n: true}", "eval.sets.x: n=True must be a whole number"),
        (
            "eval.sets.x={source: 'task:reverse', n: 2, temperature: 0}",
            "n=2 with temperature=0 would be 2 times the same",
        ),
        (
            "eval.sets.x={source: 'task:reverse', n: 2, temperature: -1}",
            "eval.sets.x: temperature=-1.0 must be above 0",
        ),
        (
            "eval.sets.x={source: 'task:reverse', n: 2, top_p: 2}",
            "eval.sets.x: top_p=2.0 must be above 0 and at most 1",
        ),
        ("eval.sets.x={source: 'task:reverse', n: 2, top_p: high}", "eval.sets.x: top_p='high' must be a number"),
        ("eval.sets.x={source: 'task:reverse', top_p: 0.5}", "top_p and top_k have no effect at temperature 0"),
        ("eval.sets.x={source: 'task:reverse', max_new_tokens: 24}", "max_new_tokens=24 leaves no room for a prompt"),
        ("eval.sets.x={source: 'task:reverse', by: 3}", "by=3 must be the name of a field"),
        ("checkpoint.keep_best=eval/acuracy", "keep_best=eval/acuracy is no metric .* did you mean 'eval/accuracy'"),
        ("checkpoint.keep_best=eval/x/pass@8", "keep_best=eval/x/pass@8 is no metric of an evaluation"),
        ("eval.patience=2", "eval.patience=2 has no effect with train.eval_every=0"),
        ("eval.stop_metric=eval/reward", "eval.stop_metric=eval/reward has no effect with eval.patience=0"),
    ],
)
def test_what_cannot_work_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config_of(override), 1)


def test_prompts_of_sets_are_checked_before_the_run(tmp_path: Path) -> None:
    rows = [{"prompt": "12>", "answer": "12", "level": 1}, {"prompt": "34>", "answer": "x"}]
    path, empty = written(tmp_path / "rows.jsonl", *rows), written(tmp_path / "empty.jsonl")
    for entry, error, message in (
        (f"{{source: {empty}}}", DataError, "empty.jsonl contains no prompts"),
        (f"{{source: {tmp_path}/nowhere.jsonl}}", DataError, "nowhere.jsonl does not exist"),
        (
            f"{{source: {path}, by: levle}}",
            DataError,
            "by='levle' is a field of none of its 2 prompts; did you mean 'level'",
        ),
        (f"{{source: {path}, reward: last_number}}", DataError, "the answer 'x' has no number"),
        (f"{{source: {path}, reward: last_numbr}}", ConfigError, "last_number"),
    ):
        for settled in (settle, settle_evaluation):
            with pytest.raises(error, match=re.escape(message)):
                settled(config_of(f"eval.sets.mine={entry}"), 1)
    inputs = settle(config_of(f"eval.sets.mine={{source: {path}, by: level, size: 1, reward: last_number}}"), 1)
    _, found = inputs.sets
    assert (found.num_prompts, found.by, found.reward.judged_by) == (1, "level", "last_number")
    assert found.reward is not inputs.rewards
    for each in (inputs.rewards, found.reward):
        each.close()  # type: ignore[attr-defined]


def test_data_eval_as_an_entry_with_a_reward_of_its_own(tmp_path: Path) -> None:
    """It has an end, its own reward judges it, and the reward is tried, checked and closed as those of other sets."""
    path = written(tmp_path / "rows.jsonl", *({"prompt": f"{i}>", "answer": f"{i}"} for i in range(3)))
    for entry, own in ((f"{path}", False), (f"[{path}]", False), (f"{{source: {path}, reward: last_number}}", True)):
        config = config_of(f"data.eval={entry}", "data.eval_size=2", "reward.functions.exact_match=1")
        for inputs in (settle(config, 1), settle_evaluation(config, 1)):
            (found,) = inputs.sets
            assert found.num_prompts == 2 and found.prompts[1].text == "1>"
            assert found.reward.judged_by == ("last_number" if own else "exact_match")
            assert (found.reward is inputs.rewards) is not own and inputs.rewards.judged_by == "exact_match"
            rewards = rewards_in(inputs.rewards, inputs.sets)
            assert rewards == ([inputs.rewards, found.reward] if own else [inputs.rewards])
            for each in rewards:
                each.close()
    path.write_text('{"prompt": "1>", "answer": "x"}\n')
    for settled in (settle, settle_evaluation):
        with pytest.raises(DataError, match="the answer 'x' has no number"):
            settled(config_of(f"data.eval={{source: {path}, reward: last_number}}"), 1)


def test_a_reward_that_may_outlast_the_patience_of_other_ranks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service with its tries, or a function in a process, of a run or of a set. The defaults stay below."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "nothing_at_all.py").write_text("def f(response): return 0.0\n")

    def slow(parameters: str, *overrides: str) -> list[str]:
        service = f"reward.terms=[{{function: remote, url: 'http://127.0.0.1:1'{parameters}}}]"
        inputs = settle(config_of("data.tokenizer=characters", service, *overrides), 1)
        for each in rewards_in(inputs.rewards, inputs.sets):
            each.close()
        return [text.split(";")[0] for text in inputs.warnings if "give up" in text]

    assert slow("") == []
    of_a_set = "eval.sets.x={source: 'task:reverse', reward: 'nothing_at_all:f'}"
    after = "and ranks give up on the one that waits for it after parallel.timeout_s=60"
    assert slow(", timeout_s: 20, retries: 2", of_a_set, "parallel.timeout_s=60") == [
        *(f"reward 'remote' may take 180 s, {after}", f"reward 'nothing_at_all:f' may take 60 s, {after}")
    ]


def test_the_command_takes_some_of_the_sets() -> None:
    config = config_of("eval.sets={one: 'task:reverse', two: 'task:reverse'}", "data.tokenizer=characters")
    assert [s.name for s in settle_evaluation(config, 1).sets] == ["held_out", "one", "two"]
    assert [s.name for s in settle_evaluation(config, 1, ["two"]).sets] == ["two"]
    with pytest.raises(
        ConfigError, match=r"no held-out set is called 'tow'; did you mean 'two'.; there are held_out, one"
    ):
        settle_evaluation(config, 1, ["tow"])
