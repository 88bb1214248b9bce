"""Settings as a user gives them: layers, overrides, what is rejected and with which message."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config import loading
from gspo_megatron.config.declarations import settings_of
from gspo_megatron.config.loading import REMOVED, RENAMED, load_config, replaced, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.models.presets import PRESETS


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_then_preset_then_file_then_overrides(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: {preset: qwen3_30b_a3b, num_layers: 12, hidden_size: 256}\nrun: {seed: 7}")
    config = load_config(path, ["model.hidden_size=512", "optimizer.lr=1e-4", "model.preset=qwen3_235b_a22b"])
    assert config.model.preset == "qwen3_235b_a22b"  # the override chooses the preset, ...
    assert config.model.num_attention_heads == 64  # ... the preset is above the default, ...
    assert config.model.num_layers == 12  # ... the file above the preset, ...
    assert config.model.hidden_size == 512  # ... and the override above the file.
    assert (config.run.seed, config.optimizer.lr, config.rollout.group_size) == (7, 1e-4, 8)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_yaml_loads_as_the_same_config(tmp_path: Path, preset: str) -> None:
    config = load_config(
        None,
        [
            f"model.preset={preset}",
            "train.tokens_per_micro_batch=40000",
            "precision.transformer_engine=off",
            "data.tokenizer=characters:0123=>#: ",
            'data.prompt_template="Q: {prompt}\\nA:"',
            "reward.functions.my.rewards:brevity=-0.5",
            "data.task.max_length=4",
        ],
    )
    assert config.data.prompt_template == "Q: {prompt}\nA:"
    assert load_config(yaml_file(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("precision.transformer_engine=off", "off"),
        ("run.dir=5", "5"),
        ("data.tokenizer=characters:0 #=[", "characters:0 #=["),
        ("data.prompt_template={prompt}: ", "{prompt}: "),
        ("data.solution_field=null", None),
        ("data.solution_field=steps", "steps"),
        ("algorithm.clip_low=null", None),
        ("algorithm.clip_low=3e-2", 3e-2),
        ("optimizer.distributed=false", False),
        ("data.task={min_length: 2}", {"min_length": 2}),
    ],
)
def test_an_override_means_what_its_setting_is(override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(None, [override]), section), key) == value


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_bare_on_or_off_in_a_file_is_no_boolean(tmp_path: Path, word: str) -> None:
    config = load_config(yaml_file(tmp_path, f"precision: {{transformer_engine: {word}}}"))
    assert config.precision.transformer_engine == word


def test_rewards_asked_for_replace_those_of_a_lower_layer(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "reward: {functions: {final_number: 1.0, format: 0.1}}")
    assert load_config(None).reward.functions == {}
    assert load_config(path).reward.functions == {"final_number": 1.0, "format": 0.1}
    assert load_config(path, ["reward.functions={format: 2}"]).reward.functions == {"format": 2.0}
    assert load_config(path, ["reward.functions.format=2"]).reward.functions == {"final_number": 1.0, "format": 2.0}


def test_parameters_of_dials_are_set_by_names_with_dots(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "algorithm: {dials: {clip.low: 0.1, aggregate.length: 8}}")
    config = load_config(path, ["algorithm.dials.clip.low=0.2"])
    assert config.algorithm.dials == {"clip.low": 0.2, "aggregate.length": 8.0}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


def test_a_reward_whose_name_has_dots_can_be_set_from_the_command_line() -> None:
    config = load_config(None, ["reward.functions.my_pkg.mod:fn=1", "reward.functions.exact_match=0.5"])
    assert config.reward.functions == {"my_pkg.mod:fn": 1.0, "exact_match": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizr.lr=1", r"unknown config section 'optimizr'; did you mean 'optimizer'\? Sections: run, model"),
        ("zzz.lr=1", r"unknown config section 'zzz'\. Sections: run, model"),
        ("optimizer.lrr=1", r"unknown config key 'optimizer.lrr'; did you mean 'lr'\? Keys of optimizer: lr, min_lr"),
        ("run.tp=2", r"unknown config key 'run.tp'; did you mean 'parallel.tp'\? Keys of run: dir, seed"),
        ("run.zzz=2", r"unknown config key 'run.zzz'\. Keys of run: dir, seed"),
        ("run.seed", r"override 'run.seed' is not of the form section.key=value"),
        ("seed=1", r"override 'seed=1' is not of the form section.key=value"),
        ("run.seed.x=1", r"run.seed is a single value and has no entry 'x'"),
        ("reward.functions=[a]", r"reward.functions must be a mapping of names to values, got \['a'\]"),
        ("rollout.stop=</answer>", r"rollout.stop must be a list, got '</answer>'; write rollout.stop=\['</answer>'\]"),
        ("optimizer.lr=[1", r"override 'optimizer.lr=\[1' is not YAML"),
        ("run.seed=one", r"run.seed: Value 'one' of type 'str' could not be converted to Integer"),
        ("run.seed=1.5", r"run.seed: Value '1.5' of type 'float' could not be converted to Integer"),
        ("run.seed=true", r"run.seed: Value 'True' of type 'bool' could not be converted to Integer"),
        ("run.dir=", r"run.dir=null: it has no value that stands for none; leave it out for the default, runs/"),
        ("guards.kl_old=null", r"guards.kl_old=null: it has no value that stands for none; 0 switches it off"),
        ("optimizer.lr_decay=null", r"optimizer.lr_decay=null: .*; leave it out for the default, constant"),
        ("optimizer.lr=fast", r"optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("optimizer.lr={a: 1}", r"optimizer.lr: Value '{'a': 1}' of type 'DictConfig' could not be converted"),
        ("reward.functions.format=high", r"reward.functions.format: Value 'high' .* could not be converted to Float"),
        ("reward.functions={a: {b: 1}}", r"reward.functions.a={'b': 1} must be a finite number"),
        ("reward.functions.format=.nan", r"reward.functions.format=nan must be a finite number"),
        ("algorithm.dials=[a]", r"algorithm.dials must be a mapping of names to values, got \['a'\]"),
        (
            "algorithm.dials={clip.low:0.1}",
            r"a space after the colon, {clip.low: 0.1}, or algorithm.dials.clip.low=0.1",
        ),
        ("reward.functions={m:fn:2}", r"'m:fn:2' has no value; .* {m:fn: 2}, or reward.functions.m:fn=2"),
        ("algorithm.dials.clip.low=wide", r"algorithm.dials.clip.low: Value 'wide' .* could not be converted to Float"),
        ("algorithm.dials.clip.low=.nan", r"algorithm.dials.clip.low=nan must be a finite number"),
        ("optimizer.lr=.inf", r"optimizer.lr=inf must be a finite number"),
        ("rollout.temperature=.nan", r"rollout.temperature=nan must be a finite number"),
        ("model.preset=qwen3_30b_a3", r"model.preset='qwen3_30b_a3' is not one of .*; did you mean 'qwen3_30b_a3b'\?"),
        ("precision.dtype=fp16", r"precision.dtype=fp16 is not offered: float16 needs loss scaling, .*; use bf16"),
        ("precision.dtype=fp8", r"precision.dtype='fp8' is not one of fp32, bf16, fp64"),
        ("precision.fp8=delayed", r"precision.fp8=delayed is not offered: its scales change .*; use blockwise"),
        ("rollout.group_size=0", r"rollout.group_size=0 must be at least 1"),
        ("data.max_prompt_tokens=0", r"data.max_prompt_tokens=0 must be at least 1; the default is null"),
        ("optimizer.lr=0", r"optimizer.lr=0.0 must be above 0"),
        ("optimizer.adam_beta2=1", r"optimizer.adam_beta2=1.0 must be at least 0 and below 1"),
        ("rollout.top_p=1.1", r"rollout.top_p=1.1 must be above 0 and at most 1; the default is 1.0"),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1", r"is not YAML: while parsing .* line 1, column 6"),
        ("run: {seed: 1, seed: 2}", r"is not YAML: .*duplicate key seed"),
        ("- run", r"must contain sections \(run, model"),
        ("run:", r"config section 'run' must contain keys, got None"),
        ("run: 3", r"config section 'run' must contain keys, got 3"),
        ("runn: {seed: 1}", r"unknown config section 'runn'; did you mean 'run'\?"),
        ("run: {sed: 1}", r"unknown config key 'run.sed'; did you mean 'seed'\?"),
        ("model: {preset: [a]}", r"model.preset: Cannot convert 'ListConfig' to string"),
        (
            "reward: {functions: exact_match}",
            r"reward.functions must be a mapping of names to values, got 'exact_match'",
        ),
        ("run: {dir: '${run.dri}'}", r"run.dir: Interpolation key 'run.dri' not found"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(yaml_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "")
    assert load_config(path) == Config()
    with pytest.raises(ConfigError, match=r"confg.yaml' does not exist; did you mean '.*config.yaml'\?"):
        load_config(tmp_path / "confg.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nowhere" / "config.yaml")


def test_presets_name_real_settings() -> None:
    for preset, keys in PRESETS.items():
        assert {f"model.{key}" for key in keys} <= settings_of(Config).keys(), preset


# --- keys that were renamed or removed ---


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((old, "1", f"config key '{old}' is now called '{new}'; use that name") for old, new in RENAMED.items()),
        *((key, "x", f"config key '{key}' was removed: {why}; leave it out") for key, why in REMOVED.items()),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_what_became_of_it(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    section, name = key.split(".")
    for refused in (
        lambda: load_config(None, [f"{key}={value}"]),
        lambda: load_config(yaml_file(tmp_path, f"{section}: {{{name}: {value}}}")),
        lambda: replaced(Config(), {key: value}),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value) == message


def test_renamed_and_removed_keys_are_gone_and_new_names_exist() -> None:
    settings = settings_of(Config).keys()
    assert not settings & (RENAMED.keys() | REMOVED.keys())
    assert set(RENAMED.values()) <= settings


# --- changing what is loaded ---


def test_replaced_changes_what_is_named_and_nothing_else() -> None:
    config = load_config(None, ["reward.functions={format: 1}", "run.dir=a b: c"])
    before = to_yaml(config)
    changed = replaced(
        config, {"model.vocab_size": 12, "optimizer.lr": 1, "reward.functions": {"exact_match": 2}, "run.seed": 3}
    )
    assert to_yaml(config) == before
    assert (changed.model.vocab_size, changed.optimizer.lr, changed.run.seed) == (12, 1.0, 3)
    assert changed.reward.functions == {"exact_match": 2.0}
    assert replaced(changed, {"model.vocab_size": None, "optimizer.lr": 1e-6, "run.seed": 1}) == replaced(
        config, {"reward.functions": {"exact_match": 2.0}}
    )
    assert replaced(config, {}) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.vocab_sise": 12}, r"unknown config key 'model.vocab_sise'; did you mean 'vocab_size'\?"),
        ({"modell.vocab_size": 12}, r"unknown config section 'modell'; did you mean 'model'\?"),
        ({"model": {"vocab_size": 12}}, r"unknown config key 'model.'"),
        ({"reward.functions.format": 1.0}, r"unknown config key 'reward.functions.format'"),
        ({"model.vocab_size": 0}, r"model.vocab_size=0 must be at least 1"),
        ({"model.vocab_size": "many"}, r"model.vocab_size: Value 'many' .* could not be converted to Integer"),
        ({"precision.dtype": "fp16"}, r"precision.dtype=fp16 is not offered: .*; use bf16"),
        ({"reward.functions": "format"}, r"reward.functions must be a mapping of names to values, got 'format'"),
        (
            {"model.preset": "qwen3_30b_a3b"},
            r"model.preset='qwen3_30b_a3b' cannot be .* pass it to load_config",
        ),
    ],
)
def test_replaced_refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replaced(load_config(None), settings)


def frozen(section: type) -> type:
    """The same section, whose settings cannot be assigned to."""
    types = get_type_hints(section)
    declared = [
        (f.name, types[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))  # type: ignore[call-overload]
        for f in fields(section)
    ]
    return make_dataclass(section.__name__, declared, frozen=True)


def test_sections_may_be_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OmegaConf marks frozen sections read-only; files, presets, overrides and `replaced` write into them all the
    same."""
    sections = {name: frozen(section) for name, section in get_type_hints(Config).items()}
    settings = [(name, section, field(default_factory=section)) for name, section in sections.items()]
    frozen_config = make_dataclass("Config", settings, frozen=True)
    path = yaml_file(tmp_path, "model: {preset: qwen3_30b_a3b, num_layers: 12}\nreward: {functions: {format: 1}}")
    overrides = ["optimizer.lr=1e-4", "data.task.max_length=4"]
    expected = load_config(path, overrides)
    monkeypatch.setattr(loading, "Config", frozen_config)
    config = load_config(path, overrides)
    assert type(config) is frozen_config and type(config.model) is sections["model"]
    assert to_yaml(config) == to_yaml(expected)
    assert load_config(yaml_file(tmp_path, to_yaml(config))) == config
    changed = replaced(config, {"model.vocab_size": 12, "data.task": {"min_length": 1}})
    assert (changed.model.vocab_size, changed.data.task, changed.model.num_layers) == (12, {"min_length": 1}, 12)
    with pytest.raises(AttributeError, match="cannot assign to field 'vocab_size'"):
        changed.model.vocab_size = 13


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.dir=???", "run.dir=??? is OmegaConf's mark of a missing value"),
        ("run.dir=a\0b", "has a NUL character"),
        (f"run.dir=runs/{'x' * 256}", "has more than 255 bytes"),
        (f"data.train={'x' * 5000}", "(5,000 characters)"),
        (f"run.seed={2**63}", "run.seed=9223372036854775808 must be at least 0 and below"),
        (f"optimizer.lr={'9' * 400}", "too large"),
        ("optimizer.lr=1e38", "optimizer.lr=1e+38 must be above 0 and below"),
        ("train.warm_start_lr=1e38", "train.warm_start_lr"),
        ("parallel.timeout_s=1e300", "parallel.timeout_s=1e+300 must be at least 1"),
        ("parallel.timeout_s=1e-3", "parallel.timeout_s=0.001 must be at least 1"),
        ("train.log_prob_store_gib=1e300", "train.log_prob_store_gib"),
        ("rollout.group_size=1000000000", "rollout.group_size=1000000000 must be"),
        (f"reward.on_error={'y' * 9999}", "(10,001 characters)"),
    ],
    ids=lambda value: value[:30],
)
def test_absurd_values_are_refused_in_a_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [override])
    assert message in str(refused.value) and len(str(refused.value)) < 500


def test_a_path_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "run.yaml").write_text("run: {dir: ~/runs/x}\ndata: {tokenizer: 'characters:~/x'}\n")
    config = load_config(tmp_path / "run.yaml", ["data.train=~/a.jsonl", "checkpoint.load=~"])
    paths = (config.run.dir, config.data.train, config.checkpoint.load, config.data.tokenizer)
    assert paths == ("/home/me/runs/x", "/home/me/a.jsonl", "/home/me", "characters:~/x")


@pytest.mark.parametrize("template", ["Compute ${prompt}$.", "{prompt} \\${x}", "a {{prompt}} # b: {prompt}"])
def test_a_template_is_written_as_it_was_read(template: str, tmp_path: Path) -> None:
    config = load_config(None, [f"data.prompt_template={template}"])
    (tmp_path / "out.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "out.yaml").data.prompt_template == config.data.prompt_template == template
