"""Rules across settings: what is rejected and with which fix, and what only warns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config, config_warnings
from gspo_megatron.build.data import prompt_limit
from gspo_megatron.config.loading import load_config
from gspo_megatron.run.algorithm import Algorithm

FP8 = ("precision.fp8=blockwise", "precision.dtype=bf16")


def refusal(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(None, overrides), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
            "model.num_layers=4 is not divisible by pp(3) * vpp(1) = 3; stages of unequal depth work: "
            "parallel.first_stage_layers=1 parallel.last_stage_layers=1",
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
            "parallel.vpp=2 splits pipeline stages, but parallel.pp=1 has none",
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
            "parallel.cp=4 splits every sequence into 2 * cp equal chunks, but model.max_sequence_length=204 is not "
            "divisible by 8; set it to 200 or 208",
            "parallel.cp=2, or parallel.cp=1",
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
            "model.expert_ffn_size=96 is not divisible by 16 * etp(4) = 64 (matmuls in precision.fp8=blockwise take 16 "
            "columns at a time: 64 or 128 would do, or precision.fp8=none)",
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


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("data.overlong=drop",), ("data.overlong='drop' has no effect: data.train=task:sort_digits",)),
        (("data.train=a.jsonl", "data.eval=b.jsonl", "data.task.max_length=5"), ("data.task=", "has no effect")),
        (("optimizer.min_lr=1e-7",), ("optimizer.min_lr=1e-07 has no effect with optimizer.lr_decay=constant",)),
        (("optimizer.min_lr=1", "optimizer.lr_decay=linear"), ("optimizer.min_lr=1.0 exceeds optimizer.lr=1e-06",)),
        (("model.experts_per_token=9",), ("model.experts_per_token=9 exceeds model.num_experts=8",)),
        (("model.num_experts=1", "model.experts_per_token=1"), ("model.num_experts=1", "use 2 or more")),
        (("data.train=a.jsonl",), ("data.eval=null with data.train=a.jsonl", "set data.eval to a file")),
        (("model.experts_per_token=1",), ("model.experts_per_token=1", "use 2 or more")),
        (("model.num_query_groups=3",), ("num_attention_heads=4 must be a multiple of model.num_query_groups=3",)),
        (("model.head_dim=15",), ("model.head_dim=15 must be even",)),
        (("precision.dtype=fp64", "precision.device=cuda"), ("fp64", "use fp32 or bf16, or precision.device=cpu")),
        (
            ("precision.fp8=blockwise", "precision.dtype=bf16", "precision.transformer_engine=off"),
            ("precision.fp8=blockwise needs Transformer Engine", "set precision.fp8=none"),
        ),
        (("precision.fp8=tensorwise", "precision.device=cpu"), ("precision.fp8=tensorwise needs Transformer Engine",)),
        (("precision.fp8=tensorwise",), ("precision.fp8=tensorwise needs precision.dtype=bf16, got fp32",)),
        (("precision.first_last_layers_bf16=1",), ("has no effect with precision.fp8=none", "set it to 0")),
        (
            (*FP8, "precision.first_last_layers_bf16=3", "parallel.pp=2"),
            ("precision.first_last_layers_bf16=3 exceeds the 2 layers of a pipeline stage", "set it to 2 or fewer"),
        ),
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
        (
            ("algorithm.old_log_probs=rollout", "rollout.top_k=5"),
            ("rollout.top_k=5", "or algorithm.sampling_mask=true"),
        ),
        (
            ("algorithm.sampling_mask=true",),
            ("algorithm.sampling_mask=true has no effect with rollout.top_k=0, rollout.top_p=1.0", "top_p below 1"),
        ),
        (
            ("guards.ratio_noise=0.01", "algorithm.updates_per_rollout=1"),
            ("guards.ratio_noise=0.01", "algorithm.old_log_probs=recompute"),
        ),
        (
            ("train.log_prob_store_gib=1", "algorithm.entropy_coef=0.01"),
            ("train.log_prob_store_gib=1", "algorithm.entropy_coef=0.01", "one of them to 0"),
        ),
        (
            ("train.log_prob_backend=triton", "precision.dtype=fp64"),
            ("train.log_prob_backend=triton", "precision.dtype=fp64", "use auto"),
        ),
        (("train.log_prob_backend=triton", "precision.device=cpu"), ("precision.device=cpu",)),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


def test_a_config_changed_in_python_is_checked_too() -> None:
    config = load_config(None)
    config = replace(config, rollout=replace(config.rollout, temperature=-1.0))
    with pytest.raises(ConfigError, match=r"rollout.temperature=-1.0 must be above 0"):
        check_config(config, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.preset=tiny_dense"], "routing_replay=R2 has no effect: model.family=qwen3 has no experts"),
        (["algorithm.updates_per_rollout=1"], "there is none with algorithm.old_log_probs=auto and .*rollout=1"),
        (["algorithm.old_log_probs=rollout"], "there is none with algorithm.old_log_probs=rollout"),
        (["model.aux_loss_coef=0.01"], "R2 with model.aux_loss_coef=0.01: the balancing loss counts"),
        (["algorithm.router_shift_floor=0.8", "model.preset=tiny_dense"], "router_shift_floor=0.8 has no effect"),
        (
            ["algorithm.router_shift_floor=0.8", "algorithm.old_log_probs=rollout"],
            "shift_floor=0.8 records the experts",
        ),
        (["algorithm.router_shift_floor=0.8", "parallel.pp=2"], "pp=2: a token's weight is an average over all layers"),
        (
            ["algorithm.router_shift_floor=0.8", "model.preset=tiny_glm"],
            "that of model.family=glm4_moe gives every expert a sigmoid",
        ),
        (
            ["algorithm.router_shift_floor=0.8", "algorithm.variant=rloo"],
            r"shift_floor=0.8 multiplies the ratios of the loss.*variant=rloo has none \(clip reinforce\); use a",
        ),
        (["algorithm.routing_replay=R3", "model.preset=tiny_dense"], "routing_replay=R3 has no effect: .* no experts"),
        (["algorithm.routing_replay=R3", "model.aux_loss_coef=0.01"], "R3 with model.aux_loss_coef=0.01: the balanc"),
    ],
)
def test_routing_replay_where_there_is_nothing_to_replay(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(None, ["algorithm.routing_replay=R2", *overrides]), 2)


@pytest.mark.parametrize(("updates", "warned"), [(1, True), (2, False)])
def test_routers_do_not_shift_before_the_first_update(updates: int, warned: bool) -> None:
    overrides = ["algorithm.router_shift_floor=0.8", "algorithm.old_log_probs=recompute"]
    config = load_config(None, [*overrides, f"algorithm.updates_per_rollout={updates}"])
    check_config(config, 1)
    found = [note for note in config_warnings(config, Algorithm.of(config)) if "router_shift_floor=0.8 with" in note]
    assert len(found) == warned and all("updates_per_rollout=1" in note and "shift is 0" in note for note in found)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollout.group_size=1", "rollout.group_size=1: a group of one is its own mean"),
        ("model.aux_loss_coef=0.01", "the gradient depends on the layout"),
        ("rollout.top_p=0.95", "rollout.top_p=0.95: responses come from the truncated distribution, but ratios"),
        ("rollout.top_k=20", "rollout.top_k=20: responses come from the truncated distribution"),
        (
            "data.prompt_template={prompt} \\boxed{answer}",
            "writes the answer into the prompt; for the literal text write {{answer}}",
        ),
    ],
)
def test_what_works_but_is_hardly_meant_is_a_warning(override: str, part: str) -> None:
    common = ["train.warm_start_steps=1", "data.train=a.jsonl", "data.eval=b.jsonl"]
    usual = load_config(None, common)
    assert config_warnings(usual, Algorithm.of(usual)) == []
    if override.startswith("rollout.top"):
        masked = load_config(
            None, [*common, override, "algorithm.sampling_mask=true", "algorithm.old_log_probs=rollout"]
        )
        check_config(masked, 1)
        assert config_warnings(masked, Algorithm.of(masked)) == []
    config = load_config(None, [*common, override])
    check_config(config, 1)
    (warning,) = config_warnings(config, Algorithm.of(config))
    assert part in warning


def test_the_prompt_limit_leaves_room_for_the_response() -> None:
    sizes = ("model.max_sequence_length=100", "rollout.max_new_tokens=30")
    assert prompt_limit(load_config(None, sizes)) == 70
    assert prompt_limit(load_config(None, [*sizes, "data.max_prompt_tokens=20"])) == 20
    assert prompt_limit(load_config(None, [*sizes, "data.max_prompt_tokens=90"])) == 70


def test_a_start_from_random_weights_is_warned_of() -> None:
    def warned(*overrides: str) -> bool:
        config = load_config(None, list(overrides))
        return any("random weights" in note for note in config_warnings(config, Algorithm.of(config)))

    assert warned()
    assert not warned("train.warm_start_steps=5")
    assert not warned("checkpoint.load=latest") and not warned("train.steps=0")


def test_a_format_of_newer_gpus_than_an_h100_is_warned_of() -> None:
    config = load_config(None, ["precision.fp8=mxfp8", "precision.dtype=bf16"])
    assert any("compute capability 10.0" in note for note in config_warnings(config, Algorithm.of(config)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hf_allow_nan=true"], "hf_allow_nan=true has no effect without model.hf"),
        (["train.hf_dtype=fp32"], "hf_dtype=fp32 has no effect: no folder is written"),
        (["train.hf_dtype=fp32", "train.hf_at_end=on", "precision.dtype=bf16"], "would write bf16 numbers in twice"),
        (["checkpoint.allow_other_variant=true"], "has no effect with checkpoint.load=none"),
    ],
)
def test_settings_of_folders_that_would_be_ignored(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(None, overrides), 1)


LARGE = ["model.preset=qwen3_30b_a3b", "train.tokens_per_micro_batch=32768"]


def test_layouts_that_no_gpu_can_hold_are_not_advised() -> None:
    config = load_config(None, [*LARGE, "parallel.ep=8"])
    with pytest.raises(ConfigError, match=r"on WORLD_SIZE=1, weights, .* at least 455 GiB on a GPU, more than any"):
        check_config(config, 1)
    with pytest.raises(ConfigError, match=r"nearest layouts that work on WORLD_SIZE=4: parallel\.ep=4"):
        check_config(config, 4)


@pytest.mark.parametrize(
    ("settings", "subject"),
    [
        (LARGE, "data.train=task:sort_digits, on which model.preset=qwen3_30b_a3b would"),
        ([*LARGE, "data.train=x.jsonl"], None),
        ([*LARGE, "data.train=x.jsonl", "model.max_sequence_length=65536"], "exceeds the 32,768 tokens"),
        (["model.preset=deepseek_v3", "data.train=x.jsonl", "model.max_sequence_length=131072"], None),
        (["model.preset=deepseek_v3", "data.train=x.jsonl", "model.max_sequence_length=200000"], "exceeds the 163,840"),
        (["model.max_sequence_length=4096"], None),
    ],
)
def test_a_large_model_that_would_train_the_demo_or_past_its_length(settings: list[str], subject: str | None) -> None:
    config = load_config(None, settings)
    found = [x for x in config_warnings(config, Algorithm.of(config)) if x.startswith(("data.train", "model.max_seq"))]
    assert len(found) == (subject is not None) and all(subject is not None and subject in x for x in found)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (("model.preset=tiny_gpt_oss",), 1, "model.family=gpt_oss has attention sinks and experts with biases"),
        (("model.preset=tiny_mixtral", "parallel.cp=2"), 2, "model.sliding_window=8 with parallel.cp=2"),
    ],
)
def test_what_transformer_engines_layers_lack_is_refused(
    settings: tuple[str, ...], world_size: int, message: str
) -> None:
    on_gpus = [*settings, "model.vocab_size=97", "precision.device=cuda", "precision.dtype=bf16"]
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(None, on_gpus), world_size)
    check_config(load_config(None, [*on_gpus, "precision.transformer_engine=off"]), world_size)


VLLM, COLOCATED = "rollout.engine=vllm", "rollout.engine=vllm_colocated"
APART = "engine.addresses=[http://node7:8000, http://node8:8000]"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ("rollout.max_lag=1",),
            "rollout.max_lag=1 with rollout.engine=collective: what trains cannot sample",
        ),
        (
            (COLOCATED, "rollout.max_lag=1"),
            "rollout.max_lag=1 with rollout.engine=vllm_colocated: what trains cannot",
        ),
        (
            (COLOCATED, "engine.count=2"),
            "engine.count=2 has no effect with rollout.engine=vllm_colocated, where the run's",
        ),
        ((COLOCATED, "algorithm.routing_replay=R3"), "algorithm.routing_replay=R3 with rollout.engine=vllm_colocated"),
        ((VLLM, "rollout.max_lag=1", "rollout.dynamic_sampling=2"), "rollout.max_lag=1 and rollout.dynamic_sampling=2"),
        (("engine.count=2",), "engine.count=2 has no effect with rollout.engine=collective"),
        ((VLLM, "rollout.stop=[7, x]"), "rollout.stop=['x'] with rollout.engine=vllm: engines get token ids"),
        ((VLLM, "rollout.environment=calculator"), "rollout.environment=calculator with rollout.engine=vllm"),
        ((VLLM, "algorithm.sampling_mask=true", "rollout.top_p=0.9"), "engines do not send the ids that"),
        ((VLLM, "algorithm.routing_replay=R3"), "engines do not send the experts"),
        ((VLLM, "algorithm.old_log_probs=rollout"), "an engine's log-probs are another program's"),
        ((VLLM, "precision.dtype=fp64", "optimizer.distributed=false"), "vLLM computes in fp32 or bf16"),
        ((VLLM, "engine.gpus=[1]", "engine.count=2"), "they take 2 GPUs; name each of them once"),
        ((VLLM, "engine.gpus=[3, 3]", "engine.tensor_parallel=2"), "they take 2 GPUs; name each of them once"),
        ((VLLM, "engine.timeout_s=600"), "engine.timeout_s=600 with parallel.timeout_s=600: while an engine takes"),
        ((VLLM, "engine.arguments=[--max-num-seqs, 4]"), "engine.arguments has --max-num-seqs, which the run sets"),
        ((VLLM, "engine.arguments=['--dtype=half']"), "engine.arguments has --dtype=half, which the run sets"),
        ((VLLM, "engine.arguments=[--max_model_len, 9]"), "engine.arguments has --max_model_len, which the run sets"),
        ((VLLM, APART, "engine.count=2"), "remove it, and start that many (python -m gspo_megatron.serve, once"),
        ((VLLM, "engine.gpus=[x]"), "'x' is not the number of a GPU"),
        ((VLLM, APART, "engine.count=2"), "engine.count=2 has no effect with engine.addresses"),
        ((VLLM, APART, "engine.python=/x"), "engine.python=/x has no effect with engine.addresses"),
        ((VLLM, APART, "engine.port=8000"), "engine.port=8000 has no effect with engine.addresses"),
        ((VLLM, APART, "engine.gpus=[0]"), "engine.gpus=[0] has no effect with engine.addresses"),
        ((VLLM, APART, "engine.tensor_parallel=2"), "engine.tensor_parallel=2 has no effect with engine.addresses"),
        ((VLLM, APART, "engine.threads=2"), "engine.threads=2 has no effect with engine.addresses"),
        ((VLLM, APART, "engine.cache_gib=1"), "engine.cache_gib=1.0 has no effect with engine.addresses"),
        ((VLLM, APART, "engine.arguments=[--x]"), "engine.arguments=['--x'] has no effect with engine.addresses"),
        ((VLLM, "engine.addresses=[node7:8000]"), "'node7:8000' is not an address of an engine; write it as http://"),
        ((VLLM, "engine.addresses=[http://n:1, http://n:1/]"), "has an engine twice; name each once"),
        ((VLLM, "engine.channel=nfs"), "engine.channel='nfs' is not one of auto, shared_memory, broadcast, disk"),
        (("rollout.engine=sglang",), "rollout.engine='sglang' is not one of collective, vllm"),
    ],
)
def test_what_an_engine_does_not_offer_is_refused(overrides: tuple[str, ...], complaint: str) -> None:
    assert complaint in refusal(*overrides)
    check_config(
        load_config(None, [VLLM, "rollout.top_p=0.9", "rollout.stop=[7]", "algorithm.correction=token_tis"]), 1
    )


def test_engines_apart_from_the_run_are_taken() -> None:
    check_config(load_config(None, [VLLM, APART, "engine.channel=disk", "engine.most_starts=1"]), 1)
