from __future__ import annotations

import itertools
import math
import time
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import PackingRules
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.config.loading import load_config, to_yaml
from gspo_megatron.config.sections import CHOICES, MINIMA, POSITIVE, Config
from gspo_megatron.layout.layout import Layout, nearest_layouts, packing_rules, token_multiple
from gspo_megatron.models.presets import PRESETS

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


# --- layouts ---


def test_the_layout_follows_from_the_axes_and_the_world() -> None:
    axes = ["parallel.tp=4", "parallel.pp=2", "parallel.ep=8"]
    layout = check_config(load_config(None, [*WHOLE_CLUSTER, *axes]), 64)
    assert (layout.dp, layout.edp) == (8, 4)
    assert str(layout) == "tp 4 x pp 2 x cp 1 x dp 8; experts: ep 8 x etp 1 x edp 4"
    more = ["parallel.vpp=3", "parallel.cp=2", "parallel.etp=2", "parallel.token_dispatcher=allgather"]
    layout = check_config(load_config(None, [*WHOLE_CLUSTER, *axes, *more]), 64)
    assert str(layout) == "tp 4 x pp 2 (vpp 3) x cp 2 x dp 4; experts: ep 8 x etp 2 x edp 2"


FP8 = ("precision.fp8=blockwise", "precision.dtype=bf16")


@pytest.mark.parametrize(
    ("overrides", "world_size", "complaint", "nearest"),
    [
        (
            ("parallel.tp=3",),
            6,
            "model.num_attention_heads=4 is not divisible by tp(3)",
            "parallel.tp=2, or parallel.tp=1",
        ),
        (
            ("parallel.tp=4",),
            4,
            "model.num_query_groups=2 is not divisible by tp(4)",
            "parallel.tp=2, or parallel.tp=1",
        ),
        (
            ("parallel.pp=3",),
            12,
            "model.num_layers=4 is not divisible by pp(3) * vpp(1) = 3",
            "parallel.pp=4, or parallel.pp=2, or parallel.pp=1",
        ),
        (
            ("parallel.pp=2", "parallel.vpp=4"),
            4,
            "model.num_layers=4 is not divisible by pp(2) * vpp(4) = 8",
            "parallel.vpp=2, or parallel.vpp=1",
        ),
        (
            ("parallel.vpp=2",),
            2,
            "parallel.vpp=2 cuts the stages of a pipeline, and parallel.pp=1 has none",
            "parallel.vpp=1, or parallel.pp=2",
        ),
        (
            ("parallel.ep=6",),
            12,
            "model.num_experts=8 is not divisible by ep(6)",
            "parallel.ep=4, or parallel.ep=2, or parallel.ep=1",
        ),
        (
            ("parallel.etp=3", "parallel.ep=2"),
            6,
            "model.expert_ffn_size=128 is not divisible by etp(3)",
            "parallel.etp=1, or parallel.ep=1 parallel.etp=2",
        ),
        (
            ("parallel.cp=4", "model.max_sequence_length=204"),
            4,
            "parallel.cp=4 cuts every sequence into 2 * cp equal chunks, and model.max_sequence_length=204 is not "
            "divisible by 8; set it to 200 or 208",
            "parallel.cp=2, or parallel.cp=1",
        ),
        (
            ("parallel.pp=2", "model.tie_embeddings=true"),
            2,
            "model.tie_embeddings with parallel.pp=2: the copies on the first and the last stage are not kept equal; "
            "set model.tie_embeddings=false",
            "parallel.pp=1",
        ),
        (
            ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2"),
            12,
            "tp(2) * pp(2) * cp(2) = 8 does not divide the 12 processes; start a multiple of 8, such as 8 or 16",
            "parallel.cp=1, or parallel.pp=1, or parallel.tp=1",
        ),
        (
            ("parallel.ep=8",),
            4,
            "etp(1) * ep(8) * pp(1) = 8 does not divide the 4 processes; start a multiple of 8, such as 8",
            "parallel.ep=4, or parallel.ep=2, or parallel.ep=1",
        ),
        (
            ("parallel.cp=3", "parallel.ep=4", "model.max_sequence_length=252"),
            8,
            "tp(1) * pp(1) * cp(3) = 3 does not divide the 8 processes; start a multiple of 12, such as 12",
            "parallel.cp=2, or parallel.cp=1",
        ),
        (
            (*FP8, "parallel.etp=4", "model.expert_ffn_size=96"),
            8,
            "model.expert_ffn_size=96 is not divisible by 16 * etp(4) = 64 (matmuls in precision.fp8 take 16 columns "
            "at a time)",
            "parallel.etp=2, or parallel.etp=1",
        ),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_the_nearest_that_do(
    overrides: tuple[str, ...], world_size: int, complaint: str, nearest: str
) -> None:
    message = refusal(*overrides, world_size=world_size)
    assert message == f"{complaint}; nearest layouts that work on WORLD_SIZE={world_size}: {nearest}"
    for settings in nearest.split(", or "):  # what is printed can be pasted
        check_config(load_config(None, [*overrides, *settings.split()]), world_size)


def test_a_model_that_no_layout_suits() -> None:
    message = refusal(*FP8, "model.hidden_size=40", world_size=4)
    assert message.startswith("model.hidden_size=40 is not divisible by 16 (matmuls in precision.fp8")
    assert message.endswith("; no layout works for this model with precision.fp8=blockwise")


@pytest.mark.parametrize("world_size", [1, 6, 8])
@pytest.mark.parametrize("asked", [(3, 1, 1, 1, 3, 1), (4, 2, 3, 1, 1, 5), (1, 1, 4, 8, 1, 1), (2, 3, 1, 2, 16, 2)])
def test_the_nearest_layouts_are_those_of_an_exhaustive_search(asked: tuple[int, ...], world_size: int) -> None:
    def works(sizes: tuple[int, ...]) -> bool:
        tp, pp, vpp, cp, ep, etp = sizes
        return (
            world_size % (tp * pp * cp) == world_size % (etp * ep * pp) == 0
            and 6 % tp == 12 % (pp * vpp) == 12 % ep == 128 % etp == 0
            and (vpp == 1 or pp > 1)
            and (cp == 1 or 252 % (2 * cp) == 0)
        )

    def distance(sizes: tuple[int, ...]) -> float:
        return sum(abs(math.log2(size / wanted)) for size, wanted in zip(sizes, asked, strict=True))

    def has_a_needless_change(sizes: tuple[int, ...]) -> bool:
        put_back = {(*sizes[:i], wanted, *sizes[i + 1 :]) for i, wanted in enumerate(asked)} - {sizes}
        return any(map(works, put_back))

    of_world, of_layers = range(1, world_size + 1), range(1, 13)
    every = itertools.product(of_world, of_world, of_layers, of_world, of_world, of_world)
    working = sorted((distance(sizes), sizes) for sizes in every if works(sizes))
    distances = [d for d, sizes in working if d <= working[0][0] + 2 + 1e-9 and not has_a_needless_change(sizes)]
    config = load_config(
        None,
        [
            "model.num_layers=12",
            "model.num_attention_heads=6",
            "model.num_query_groups=6",
            "model.num_experts=12",
            "model.max_sequence_length=252",
        ],
    )
    found = [astuple(layout)[1:] for layout in nearest_layouts(config, Layout(world_size, *asked))]
    assert [distance(sizes) for sizes in found] == pytest.approx(distances[:3])
    assert len(set(found)) == len(found) and not any(has_a_needless_change(sizes) for sizes in found)
    assert {sizes for _, sizes in working}.issuperset(found)


def test_the_search_takes_no_time_on_a_large_cluster() -> None:
    config = load_config(None, [*WHOLE_CLUSTER, "parallel.tp=8", "parallel.pp=3", "parallel.cp=8", "parallel.ep=48"])
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4096: parallel.tp=4 parallel.pp=4 parallel.ep=64, or"):
        check_config(config, 4096)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("overrides", "rules", "sampler_multiple"),
    [
        ((), PackingRules(), 1),
        (("parallel.tp=2",), PackingRules(token_multiple=2), 2),
        (("parallel.cp=2",), PackingRules(sequence_multiple=4, token_multiple=4), 1),
        (("parallel.cp=3", "parallel.tp=4"), PackingRules(sequence_multiple=6, token_multiple=12), 4),
        (("parallel.cp=3", "parallel.tp=5"), PackingRules(sequence_multiple=6, token_multiple=30), 5),
        ((*FP8, "parallel.tp=2", "parallel.cp=2"), PackingRules(sequence_multiple=4, token_multiple=64), 32),
        (("parallel.pp=4", "parallel.vpp=2"), PackingRules(count_multiple=4), 1),
        (("parallel.pp=4",), PackingRules(), 1),
        (("parallel.token_dispatcher=allgather",), PackingRules(), 1),
        (("parallel.token_dispatcher=allgather", "parallel.ep=2"), PackingRules(same_tokens=True), 1),
        (("parallel.token_dispatcher=allgather", "parallel.etp=2"), PackingRules(same_tokens=True), 1),
        (("parallel.ep=2", "parallel.etp=2"), PackingRules(), 1),
    ],
)
def test_what_a_layout_asks_of_micro_batches(
    overrides: tuple[str, ...], rules: PackingRules, sampler_multiple: int
) -> None:
    config = load_config(None, overrides)
    assert packing_rules(config) == rules
    assert token_multiple(config) == sampler_multiple


# --- checks between settings ---


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("data.overlong=drop",), ("data.overlong='drop' has no effect on generated tasks",)),
        (("data.train=a.jsonl", "data.eval=b.jsonl", "data.task.max_length=5"), ("data.task=", "has no effect")),
        (("optimizer.min_lr=1e-7",), ("optimizer.min_lr=1e-07 has no effect with optimizer.lr_decay=constant",)),
        (("optimizer.min_lr=1", "optimizer.lr_decay=linear"), ("optimizer.min_lr=1.0 exceeds optimizer.lr=1e-06",)),
        (("model.experts_per_token=9",), ("model.experts_per_token=9 exceeds model.num_experts=8",)),
        (("model.experts_per_token=1",), ("model.experts_per_token=1", "use 2 or more")),
        (("model.num_query_groups=3",), ("num_attention_heads=4 must be a multiple of model.num_query_groups=3",)),
        (("model.head_dim=15",), ("model.head_dim=15 must be even",)),
        (("precision.dtype=fp64", "precision.device=cuda"), ("fp64", "use fp32 or bf16, or precision.device=cpu")),
        (
            ("precision.fp8=blockwise", "precision.dtype=bf16", "precision.transformer_engine=off"),
            ("precision.fp8=blockwise needs Transformer Engine", "set precision.fp8=none"),
        ),
        (("precision.fp8=delayed", "precision.device=cpu"), ("precision.fp8=delayed needs Transformer Engine",)),
        (("precision.fp8=delayed",), ("precision.fp8=delayed needs precision.dtype=bf16, got fp32",)),
        (("rollout.prompts_per_step=30",), ("rollout.prompts_per_step=30", "updates_per_rollout=4")),
        (("rollout.max_new_tokens=256",), ("rollout.max_new_tokens=256", "model.max_sequence_length=256")),
        (
            ("train.tokens_per_micro_batch=200",),
            ("model.max_sequence_length=256", "raise train.tokens_per_micro_batch to 256"),
        ),
        (
            ("algorithm.old_log_probs=rollout", "rollout.top_p=0.9"),
            ("algorithm.old_log_probs=rollout", "rollout.top_p=0.9", "use algorithm.old_log_probs=auto"),
        ),
        (("algorithm.old_log_probs=rollout", "rollout.top_k=5"), ("rollout.top_k=5",)),
        (
            ("guards.ratio_noise=0.01", "algorithm.updates_per_rollout=1"),
            ("guards.ratio_noise=0.01", "algorithm.old_log_probs=recompute"),
        ),
        (
            ("train.log_prob_store_gib=1", "algorithm.entropy_coef=0.01"),
            ("train.log_prob_store_gib=1", "algorithm.entropy_coef=0.01", "one of them to 0"),
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    message = refusal(*overrides)
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
