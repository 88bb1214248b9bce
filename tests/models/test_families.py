"""Every family: shape and config.json agree, and its rules name every tensor of the model once."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.layout.layout import AXES
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.models.names import InMemory, read_ours, to_theirs
from gspo_megatron.models.presets import PRESETS
from gspo_megatron.models.shape import OPTIONAL, ModelShape
from gspo_megatron.models.tensors import hub_tensors
from tests.support.families import HUB_SIZES, OUR_SIZES

SIZE = st.integers(1, 1 << 20)
COMMON: dict[str, Any] = {
    "num_layers": st.integers(1, 100),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "vocab_size", "max_sequence_length"), SIZE),
    "rope_base": st.floats(1, 1e8),
    "norm_epsilon": st.floats(1e-12, 1),
    "tie_embeddings": st.booleans(),
}
SCALING = {
    "rope_scaling": st.just("yarn"),
    "rope_scaling_factor": st.floats(1, 100),
    "rope_original_length": SIZE,
    **dict.fromkeys(("rope_beta_fast", "rope_beta_slow"), st.floats(0.1, 100)),
    **dict.fromkeys(("rope_mscale", "rope_mscale_all_dim"), st.floats(0, 2)),
    "rope_truncate": st.booleans(),
}


def shapes(name: str) -> st.SearchStrategy[ModelShape]:
    """Any sizes, whether they fit together or not."""
    uses = FAMILIES[name].uses
    sizes = {field: SIZE for field in uses if type(OPTIONAL[field]) is int}
    sizes |= {field: st.booleans() for field in uses if type(OPTIONAL[field]) is bool}
    sizes |= {field: st.floats(0.1, 1) for field in uses if type(OPTIONAL[field]) is float}
    if "q_lora_rank" in uses:
        sizes["q_lora_rank"] = st.integers(0, 10)
    scaling = st.fixed_dictionaries(SCALING if "rope_scaling" in uses else {}) | st.just({})
    numbers = st.fixed_dictionaries({**COMMON, **{f: size for f, size in sizes.items() if not f.startswith("rope_")}})

    def built(numbers: dict[str, Any], scaling: dict[str, Any], shared: int) -> ModelShape:
        if "shared_expert_ffn_size" in uses:
            numbers["shared_expert_ffn_size"] = shared * numbers["expert_ffn_size"]
        return ModelShape(family=name, **numbers, **scaling)

    return st.builds(built, numbers, scaling, st.integers(1, 4))


SHAPES = st.one_of(*(shapes(name) for name in sorted(FAMILIES)))

# config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@given(SHAPES)
def test_a_shape_comes_back_from_its_config_json(shape: ModelShape) -> None:
    family = family_of(shape)
    assert family.hf_config(shape)["model_type"] == family.name == shape.family
    assert family.shape(family.hf_config(shape)) == shape


def test_the_preset_is_the_model_on_the_hub_with_a_shorter_context() -> None:
    settings = ["model.preset=qwen3_30b_a3b", "train.tokens_per_micro_batch=40960", "model.max_sequence_length=40960"]
    shape = load_config(None, settings).model.shape
    assert FAMILIES["qwen3_moe"].shape(QWEN3_30B_A3B) == shape
    ours = family_of(shape).hf_config(shape)
    assert ours.items() <= QWEN3_30B_A3B.items()


def test_transformers_5_writes_some_keys_elsewhere() -> None:
    newer = {key: value for key, value in QWEN3_30B_A3B.items() if key not in ("rope_theta", "num_experts")}
    newer |= {"num_local_experts": 128, "mlp_only_layers": None}
    newer["rope_parameters"] = {"rope_theta": 1000000.0, "rope_type": "default"}
    family = FAMILIES["qwen3_moe"]
    assert family.shape(newer) == family.shape(QWEN3_30B_A3B)
    del newer["head_dim"]
    assert family.shape(newer).head_dim == 2048 // 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False, but only True"),
        ({"attention_bias": True}, "attention_bias=True, but only False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\], but only \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2, but only 1"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE of type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "RoPE of type 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, but only 1.0"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES["qwen3_moe"].shape(QWEN3_30B_A3B | change)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "vocab_size", "norm_topk_prob"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        FAMILIES["qwen3_moe"].shape({name: value for name, value in QWEN3_30B_A3B.items() if name != key})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset: str) -> None:
    shape = load_config(None, [f"model.preset={preset}", "train.tokens_per_micro_batch=32768"]).model.shape
    assert list(family_of(shape).complaints(shape)) == []


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "preset",
    [
        *(preset for preset in PRESETS if preset.startswith("tiny_")),
        "tiny_mla model.q_lora_rank=0",
        *(f"tiny_glm model.qk_norm={on} model.attention_bias={not on}" for on in (True, False)),
        "tiny_glm model.num_dense_layers=0 model.dense_ffn_size=0",
    ],
)
def test_rules_name_every_tensor_once_both_ways(preset: str, tie: bool) -> None:
    settings = [f"model.preset={preset.split()[0]}", *preset.split()[1:], f"model.tie_embeddings={tie}"]
    sizes = ["model.num_layers=11", "model.vocab_size=97", *["model.num_experts=12"] * (preset != "tiny_dense")]
    shape = load_config(None, [*settings, *sizes]).model.shape
    family = family_of(shape)
    start = itertools.count()
    ours = {name: torch.full(size, next(start)) for name, size in OUR_SIZES[shape.family](shape).items()}
    theirs, back = {}, {}
    for name, part in to_theirs(family.rules, ours.items(), shape):
        assert name not in theirs, f"{name} comes from two tensors"
        theirs[name] = part
    for name in ours:
        rule, parts = read_ours(family.rules, name, lambda their: InMemory(theirs[their]))
        back[name] = rule.op.to_our_slice(parts, shape)
    assert {name: tuple(part.shape) for name, part in theirs.items()} == HUB_SIZES[shape.family](shape)
    assert hub_tensors(family.rules, shape) == HUB_SIZES[shape.family](shape)
    assert all(torch.equal(back[name], whole) for name, whole in ours.items())
    parameters = sum(p.numel() for name, p in theirs.items() if "e_score_correction_bias" not in name)
    assert family.counts(shape).total == parameters


# config.json of https://huggingface.co/deepseek-ai/DeepSeek-V3, without the keys of remote code
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_preset_of_deepseek_v3_is_the_model_on_the_hub_with_a_shorter_context() -> None:
    settings = ["model.preset=deepseek_v3", "train.tokens_per_micro_batch=163840", "model.max_sequence_length=163840"]
    shape = load_config(None, settings).model.shape
    assert FAMILIES["deepseek_v3"].shape(DEEPSEEK_V3) == shape
    ours = family_of(shape).hf_config(shape)
    assert ours.pop("num_nextn_predict_layers") == 0  # written without them
    assert ours.pop("rope_interleave")  # the default of transformers; not in the file
    assert {key: DEEPSEEK_V3.get(key) for key in ours} == ours
    # 671B and 37B, as the paper has them: arXiv 2412.19437, abstract.
    assert family_of(shape).counts(shape).total == 671_026_404_352
    assert family_of(shape).counts(shape).active(8) == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False, but only True"),
        ({"rope_interleave": False}, "rope_interleave=False, but only True"),
        ({"attention_bias": True}, "attention_bias=True, but only False"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE of type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "lacks original_max_position_embeddings"),
        ({"rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"attention_factor": 1.2}}, "attention_factor=1.2"),
    ],
)
def test_what_is_not_implemented_of_deepseek_v3_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES["deepseek_v3"].shape(DEEPSEEK_V3 | change)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "tiny_moe"])
def test_transformers_counts_the_same_parameters(preset: str) -> None:
    """Of the model that it builds, on no memory, from our config.json."""
    transformers = pytest.importorskip("transformers")
    settings = [f"model.preset={preset}", "train.tokens_per_micro_batch=163840", "model.vocab_size=1000"]
    shape = load_config(None, settings).model.shape
    hf = family_of(shape).hf_config(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf))
    assert family_of(shape).counts(shape).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model.preset=tiny_moe model.kv_lora_rank=8",
            "model.kv_lora_rank=8 has no effect with model.family=qwen3_moe",
        ),
        ("model.preset=tiny_mla model.head_dim=8", "model.head_dim=8 has no effect with model.family=deepseek_v3"),
        ("model.preset=tiny_dense model.num_experts=4", "model.num_experts=4 has no effect with model.family=qwen3"),
        ("model.preset=tiny_dense model.dense_ffn_size=0", "model.dense_ffn_size must be set for model.family=qwen3"),
        ("model.preset=tiny_dense model.aux_loss_coef=0.1", "has no experts to balance"),
        ("model.preset=tiny_dense parallel.ep=2", "networks in a dense layer=1 is not divisible by ep(2)"),
        ("model.preset=tiny_glm model.partial_rotary_factor=0.2", "model.partial_rotary_factor=0.2 must be even"),
        (
            "model.preset=tiny_gpt_oss model.sliding_window=0",
            "model.sliding_window must be set for model.family=gpt_oss",
        ),
        ("model.preset=tiny_gpt_oss parallel.etp=2", "parts of an expert with biases=1 is not divisible by etp(2)"),
        ("model.family=qwen3_next", "model.full_attention_interval must be set for model.family=qwen3_next"),
        ("model.preset=tiny_qwen3_next model.linear_conv_kernel_dim=0", "model.linear_conv_kernel_dim must be set"),
        ("model.preset=tiny_qwen3_next model.linear_num_value_heads=3", "must be a multiple of"),
        (
            "model.preset=tiny_qwen3_next model.num_query_groups=4 model.vocab_size=96 parallel.tp=4",
            "model.linear_num_key_heads=2 is not divisible by tp(4)",
        ),
        ("model.family=deepseek_v3", "model.kv_lora_rank must be set for model.family=deepseek_v3"),
        ("model.preset=tiny_mla model.qk_rope_head_dim=7", "model.qk_rope_head_dim=7 must be even"),
        ("model.preset=tiny_mla model.rope_scaling=none", "model.rope_scaling_factor=4.0 has no effect"),
        ("model.preset=tiny_mla model.rope_original_length=0", "needs model.rope_scaling_factor of at least 1"),
        ("model.preset=tiny_mla model.num_dense_layers=0", "set both, or leave both at 0"),
        ("model.preset=tiny_mla model.num_dense_layers=5", "exceeds model.num_layers=4"),
        ("model.preset=tiny_mla model.shared_expert_ffn_size=60", "positive multiple of model.expert_ffn_size=64"),
        ("model.preset=tiny_mla model.shared_expert_ffn_size=0", "positive multiple of model.expert_ffn_size=64"),
        ("model.preset=tiny_mla model.num_experts=10", "must be a multiple of model.router_groups=4"),
        ("model.preset=tiny_mla model.num_experts=4", "with at least 2 experts in each group"),
        ("model.preset=tiny_mla model.experts_per_token=7", "hold at least model.experts_per_token=7 experts"),
        ("model.preset=tiny_mla model.router_groups_per_token=5", "must be groups that there are"),
        # Megatron would rank a group by its 3 best experts.
        ("model.preset=tiny_mla model.experts_per_token=6", "// model.router_groups_per_token=2 must be 2"),
        ("model.preset=tiny_mla model.experts_per_token=3", "// model.router_groups_per_token=2 must be 2"),
    ],
)
def test_sizes_that_do_not_fit_the_family_are_refused_by_name(settings: str, message: str) -> None:
    config = load_config(None, [*settings.split(), "model.vocab_size=97"])
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config, config.parallel.ep * config.parallel.etp)


@pytest.mark.parametrize(
    "axes", [{}, {"tp": 2}, {"pp": 2}, {"ep": 3}, {"tp": 4, "ep": 8, "etp": 2}, {"pp": 2, "vpp": 2}]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_small_model_fits_its_layout(preset: str, axes: dict[str, int]) -> None:
    settings = [f"model.preset={preset}", "train.tokens_per_micro_batch=32768", "model.vocab_size=97"]
    shape = load_config(None, settings).model.shape
    if not shape.num_experts:
        axes = {axis: size for axis, size in axes.items() if axis not in ("ep", "etp")}
    if shape.family == "gpt_oss":
        axes = axes | {"etp": 1}
    sizes = family_of(shape).small(shape, {axis: axes.get(axis, 1) for axis in (*AXES, "dp")})
    layout = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    config = load_config(None, [*settings, *layout, *(f"model.{key}={value}" for key, value in sizes.items())])
    check_config(config, 64 if "ep" not in axes or axes["ep"] == 8 else 48)
