from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.config import (
    CHOICES,
    MINIMA,
    POSITIVE,
    PRESETS,
    Config,
    load_config,
    to_yaml,
)
from gspo_megatron.types import ConfigError

WHOLE_CLUSTER = ("model.preset=qwen3_30b_a3b", "train.tokens_per_micro_batch=32768")


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def refusal(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, overrides), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- reading ---


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
        ("run.seed.x=1", r"run.seed is one value and has no entry 'x'"),
        ("reward.functions=[a]", r"reward.functions must hold names with values, got \['a'\]"),
        ("optimizer.lr=[1", r"override 'optimizer.lr=\[1' is not YAML"),
        ("run.seed=one", r"run.seed: Value 'one' of type 'str' could not be converted to Integer"),
        ("run.seed=1.5", r"run.seed: Value '1.5' of type 'float' could not be converted to Integer"),
        ("run.seed=true", r"run.seed: Value 'True' of type 'bool' could not be converted to Integer"),
        ("run.dir=", r"run.dir: Incompatible value 'None' for field of type 'str'"),
        ("optimizer.lr=fast", r"optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("optimizer.lr={a: 1}", r"optimizer.lr: Value '{'a': 1}' of type 'DictConfig' could not be converted"),
        ("reward.functions.format=high", r"reward.functions.format: Value 'high' .* could not be converted to Float"),
        ("reward.functions={a: {b: 1}}", r"reward.functions.a={'b': 1} must be a finite number"),
        ("reward.functions.format=.nan", r"reward.functions.format=nan must be a finite number"),
        ("optimizer.lr=.inf", r"optimizer.lr=inf must be a finite number"),
        ("rollout.temperature=.nan", r"rollout.temperature=nan must be a finite number"),
        ("model.preset=qwen3_30b", r"model.preset='qwen3_30b' is not one of .*; did you mean 'qwen3_30b_a3b'\?"),
        ("precision.dtype=fp16", r"precision.dtype='fp16' is not one of fp32, bf16, fp64; did you mean"),
        ("rollout.group_size=0", r"rollout.group_size=0 must be at least 1"),
        ("data.max_prompt_tokens=0", r"data.max_prompt_tokens=0 must be at least 1"),
        ("optimizer.lr=0", r"optimizer.lr=0.0 must be above 0"),
        ("optimizer.adam_beta2=1", r"optimizer.adam_beta2=1.0 must be at least 0 and below 1"),
        ("rollout.top_p=1.1", r"rollout.top_p=1.1 must be at most 1"),
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
        ("- run", r"must hold sections \(run, model"),
        ("run:", r"config section 'run' must hold keys, got None"),
        ("run: 3", r"config section 'run' must hold keys, got 3"),
        ("runn: {seed: 1}", r"unknown config section 'runn'; did you mean 'run'\?"),
        ("run: {sed: 1}", r"unknown config key 'run.sed'; did you mean 'seed'\?"),
        ("model: {preset: [a]}", r"model.preset: Cannot convert 'ListConfig' to string"),
        ("reward: {functions: exact_match}", r"reward.functions must hold names with values, got 'exact_match'"),
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


def test_the_tables_of_rules_name_real_settings() -> None:
    settings = {f"{section.name}.{f.name}" for section in fields(Config) for f in fields(section.default_factory)}  # type: ignore[arg-type]
    assert {*CHOICES, *MINIMA, *POSITIVE} <= settings
    for preset, keys in PRESETS.items():
        assert {f"model.{key}" for key in keys} <= settings, preset


# --- checks between settings ---


def test_the_layout_follows_from_the_axes_and_the_world() -> None:
    layout = check_config(load_config(None, [*WHOLE_CLUSTER, "parallel.tp=4", "parallel.pp=2", "parallel.ep=8"]), 64)
    assert (layout.dp, layout.edp) == (8, 4)
    assert str(layout) == "tp 4 x pp 2 x cp 1 x dp 8; experts: ep 8 x etp 1 x edp 4"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (("parallel.tp=4", "parallel.pp=2"), 12, "tp(4) * pp(2) * cp(1) = 8 does not divide the 12 processes"),
        (("parallel.ep=8",), 4, "etp(1) * ep(8) * pp(1) = 8 does not divide the 4 processes"),
        (("parallel.tp=4", "parallel.ep=3", "parallel.pp=2"), 8, "etp(1) * ep(3) * pp(2) = 6 does not divide the 8"),
    ],
)
def test_a_layout_that_the_world_cannot_hold(overrides: tuple[str, ...], world_size: int, message: str) -> None:
    assert message in refusal(*overrides, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ("parallel.tp=3",),
            3,
            ("model.num_attention_heads=4", "not divisible by parallel.tp=3", "set parallel.tp to 2 or 4"),
        ),
        (("parallel.tp=4",), 4, ("model.num_query_groups=2", "parallel.tp=4", "set parallel.tp to 1 or 2")),
        (("parallel.pp=3",), 3, ("model.num_layers=4", "parallel.pp=3", "set parallel.pp to 2 or 4")),
        (("parallel.ep=6",), 6, ("model.num_experts=8", "parallel.ep=6", "set parallel.ep to 4 or 8")),
        (("parallel.etp=3",), 3, ("model.expert_ffn_size=128", "parallel.etp=3", "set parallel.etp to 2 or 4")),
        (("parallel.cp=2",), 2, ("parallel.cp=2", "not supported yet", "set parallel.cp=1")),
        (("parallel.pp=2", "parallel.token_dispatcher=allgather"), 2, ("allgather", "pipeline", "use alltoall")),
        (("parallel.ep=2", "parallel.token_dispatcher=allgather"), 2, ("allgather", "share experts", "use alltoall")),
        (("data.overlong=drop",), 1, ("data.overlong='drop' has no effect on generated tasks",)),
        (("data.train=a.jsonl", "data.eval=b.jsonl", "data.task.max_length=5"), 1, ("data.task=", "has no effect")),
        (("optimizer.min_lr=1e-7",), 1, ("optimizer.min_lr=1e-07 has no effect with optimizer.lr_decay=constant",)),
        (("optimizer.min_lr=1", "optimizer.lr_decay=linear"), 1, ("optimizer.min_lr=1.0 exceeds optimizer.lr=1e-06",)),
        (("parallel.pp=2", "model.tie_embeddings=true"), 2, ("parallel.pp=2", "set model.tie_embeddings=false")),
        (("model.experts_per_token=9",), 1, ("model.experts_per_token=9 exceeds model.num_experts=8",)),
        (("model.experts_per_token=1",), 1, ("model.experts_per_token=1", "use 2 or more")),
        (("model.num_query_groups=3",), 1, ("num_attention_heads=4 must be a multiple of model.num_query_groups=3",)),
        (("model.head_dim=15",), 1, ("model.head_dim=15 must be even",)),
        (("precision.dtype=fp64", "precision.device=cuda"), 1, ("fp64", "use fp32 or bf16, or precision.device=cpu")),
        (
            ("precision.fp8=blockwise", "precision.dtype=bf16", "precision.transformer_engine=off"),
            1,
            ("precision.fp8=blockwise needs Transformer Engine", "set precision.fp8=none"),
        ),
        (("precision.fp8=delayed", "precision.device=cpu"), 1, ("precision.fp8=delayed needs Transformer Engine",)),
        (("precision.fp8=delayed",), 1, ("precision.fp8=delayed needs precision.dtype=bf16, got fp32",)),
        (("rollout.prompts_per_step=30",), 1, ("rollout.prompts_per_step=30", "updates_per_rollout=4")),
        (("rollout.max_new_tokens=256",), 1, ("rollout.max_new_tokens=256", "model.max_sequence_length=256")),
        (
            ("train.tokens_per_micro_batch=200",),
            1,
            ("model.max_sequence_length=256", "raise train.tokens_per_micro_batch to 256"),
        ),
        (
            ("algorithm.old_log_probs=rollout", "rollout.top_p=0.9"),
            1,
            ("algorithm.old_log_probs=rollout", "rollout.top_p=0.9", "use algorithm.old_log_probs=recompute"),
        ),
        (("algorithm.old_log_probs=rollout", "rollout.top_k=5"), 1, ("rollout.top_k=5",)),
    ],
)
def test_settings_that_contradict_each_other(
    overrides: tuple[str, ...], world_size: int, parts: tuple[str, ...]
) -> None:
    message = refusal(*overrides, world_size=world_size)
    assert all(part in message for part in parts), message


def test_a_config_changed_in_python_is_checked_too() -> None:
    config = load_config(None)
    config.rollout.temperature = -1.0
    with pytest.raises(ConfigError, match=r"rollout.temperature=-1.0 must be above 0"):
        check_config(config, 1)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollout.group_size=1", "rollout.group_size=1: a group of one is its own mean"),
        ("model.aux_loss_coef=0.01", "the gradient depends on the layout"),
    ],
)
def test_what_works_but_is_hardly_meant_is_a_warning(override: str, part: str) -> None:
    assert config_warnings(load_config(None), kl_coef=0.0) == []
    config = load_config(None, [override])
    check_config(config, 1)
    (warning,) = config_warnings(config, kl_coef=0.0)
    assert part in warning


def test_the_prompt_limit_leaves_room_for_the_response() -> None:
    sizes = ("model.max_sequence_length=100", "rollout.max_new_tokens=30")
    assert prompt_limit(load_config(None, sizes)) == 70
    assert prompt_limit(load_config(None, [*sizes, "data.max_prompt_tokens=20"])) == 20
    assert prompt_limit(load_config(None, [*sizes, "data.max_prompt_tokens=90"])) == 70
