"""The plan of a run. test_model.py checks that its counts equal those of the real model on every layout."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.sections import Config
from gspo_megatron.layout.layout import Layout
from gspo_megatron.layout.memory import (
    RESERVED_GIB,
    fullest_stage,
    memory_of_stage,
    parameters_per_rank,
    stage_parameters,
)
from gspo_megatron.layout.verdict import describe_plan, memory_verdict
from gspo_megatron.models.counts import count_parameters, sequence_cost

FIT = "train.tokens_per_micro_batch=32768"
SMALL = (
    "model.num_layers=4",
    "model.hidden_size=24",
    "model.head_dim=6",
    "model.num_experts=4",
    "model.expert_ffn_size=20",
    "model.vocab_size=13",
)


def totals(*overrides: str) -> tuple[int, int]:
    """Parameters in all, and those that one token passes through."""
    m = load_config(None, [*overrides, FIT]).model
    n = count_parameters(m.shape)
    return n.total, n.active(m.experts_per_token)


def test_the_presets_have_the_sizes_in_their_names() -> None:
    """Totals are those of the published checkpoints; the authors give the active ones as 3.3B and 22B."""
    assert totals("model.preset=qwen3_30b_a3b") == (30_532_122_624, pytest.approx(3.3e9, rel=0.02))
    assert totals("model.preset=qwen3_235b_a22b") == (235_093_634_560, pytest.approx(22e9, rel=0.01))
    assert totals("model.preset=tiny_moe", "model.vocab_size=100")[0] == pytest.approx(1e6, rel=0.2)


def test_tied_embeddings_are_counted_once() -> None:
    untied, tied = totals(*SMALL), totals(*SMALL, "model.tie_embeddings=true")
    assert untied[0] - tied[0] == 13 * 24


@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_mla"])
def test_pipeline_stages_hold_the_model_between_them(preset: str) -> None:
    """With dense and mixture-of-experts layers, stages differ; the estimate is for the fullest."""
    settings = [f"model.preset={preset}", "model.vocab_size=14", "model.num_layers=8"]
    config = load_config(None, [*settings, "parallel.pp=2", "parallel.vpp=2"])
    layout, shape = check_config(config, 2), config.model.shape
    stages = [stage_parameters(shape, layout, stage) for stage in range(2)]
    assert sum(map(sum, stages)) == totals(*settings)[0]
    assert parameters_per_rank(shape, layout) == max(stages, key=sum)
    assert [layout.layers_of_stage(shape.num_layers, stage) for stage in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert (stages[0][1] == stages[1][1]) == (preset == "tiny_moe")


def gib(plan: str, phase: str = "update") -> dict[str, float]:
    """The memory estimate of a phase, by purpose."""
    line = next(line for line in plan.splitlines() if line.startswith(f"  {phase} "))[11:]
    return {name: float(size) for name, size in re.findall(r"([A-Za-z][-A-Za-z0-9 ]*?) ([0-9.]+)(?=[,;]|$)", line)}


def plan_of(world_size: int, *overrides: str, with_reference: bool = False) -> tuple[str, Config, Layout]:
    config = load_config(None, ["model.preset=qwen3_30b_a3b", FIT, "precision.dtype=bf16", *overrides])
    layout = check_config(config, world_size)
    return describe_plan(config, layout, with_reference=with_reference), config, layout


def test_a_plan_says_layout_parameters_and_memory() -> None:
    text, config, layout = plan_of(64, "parallel.tp=4", "parallel.pp=2", "parallel.ep=8")
    dense, experts = parameters_per_rank(config.model.shape, layout)
    assert "layout: 64 processes = tp 4 x pp 2 x cp 1 x dp 8; experts: ep 8 x etp 1 x edp 4" in text
    assert "parameters: 30,532,122,624 in total, 3,353,032,704 active per token" in text
    assert f"{dense + experts:,} on the rank with the most ({dense:,} dense, {experts:,} expert)" in text
    sizes = gib(text)
    assert sizes["weights"] == pytest.approx((dense + experts) * 2 / 2**30, abs=0.006)
    assert sizes["gradients"] == pytest.approx((dense + experts) * 4 / 2**30, abs=0.006)
    assert sizes["optimizer"] == pytest.approx(12 * (dense / 8 + experts / 4) / 2**30, abs=0.006)
    assert "reference" not in sizes
    parts = [size for name, size in sizes.items() if name != "total"]
    assert sizes["total"] == pytest.approx(sum(parts), abs=0.05)


def test_a_reference_costs_a_second_set_of_weights() -> None:
    sizes = gib(plan_of(8, "parallel.ep=8", with_reference=True)[0])
    assert sizes["reference"] == sizes["weights"] > 1


def test_recorded_experts_of_a_plan() -> None:
    """48 layers, 8 of 128 experts: 384 bytes a token. 16 rollouts of 1,024 tokens on each of 8 ranks."""
    size = ("parallel.ep=8", "rollout.prompts_per_step=16", "rollout.group_size=8", "algorithm.updates_per_rollout=4")
    size += ("model.max_sequence_length=1024", "rollout.max_new_tokens=512", "rollout.max_batch=1")

    def sizes(*overrides: str) -> list[float]:
        _, config, layout = plan_of(8, *size, *overrides)
        phases = memory_of_stage(config, layout, 0, with_reference=False).phases
        return [phases[phase]["recorded experts"] / (16 * 1024 * 384) for phase in ("update", "scoring", "rollout")]

    assert sizes() == [0, 0, 0]
    assert sizes("algorithm.routing_replay=R2") == [1, 1, 0]
    assert sizes("algorithm.router_shift_floor=0.8") == [5, 5, 0]
    assert sizes("algorithm.routing_replay=R3")[:2] == [1 / 4, 1]
    assert sizes("algorithm.routing_replay=compare")[:2] == [5, 6]
    # Put together: three times, less what no longer works then.
    assert 1 <= sizes("algorithm.routing_replay=R3")[2] <= 3
    assert sizes("algorithm.routing_replay=R2", "parallel.cp=2") == [1, 1, 0]


@pytest.mark.parametrize(
    ("overrides", "name", "factor"),
    [
        (("parallel.recompute=full",), "activations", 0.1),
        (("train.tokens_per_micro_batch=65536",), "activations", 2),
        (("rollout.max_batch=16",), "KV cache", 0.5),
        (("parallel.cp=2",), "KV cache", 1),
        (("optimizer.distributed=false",), "optimizer", 8),
        (("precision.dtype=fp32",), "weights", 2),
    ],
)
def test_what_a_setting_does_to_the_estimate(overrides: tuple[str, ...], name: str, factor: float) -> None:
    """8 processes with ep 1: all of dense and expert state is sharded eightfold."""
    phase = "rollout" if name == "KV cache" else "update"
    before = gib(plan_of(8, "rollout.prompts_per_step=32")[0], phase)
    after = gib(plan_of(8, "rollout.prompts_per_step=32", *overrides)[0], phase)
    if factor < 0.2:
        assert after[name] < factor * before[name]
    else:
        assert after[name] == pytest.approx(factor * before[name], rel=0.01)


def test_a_later_turn_of_a_conversation_begins_with_the_turns_before() -> None:
    """32 rollouts of 1,024 tokens, of which 768 follow the prompt: 256 tokens of each are computed together, or 1,024,
    and one more."""
    sizes = ("rollout.prompts_per_step=32", "model.max_sequence_length=1024", "rollout.max_new_tokens=768")
    settings = (*sizes, "train.tokens_per_micro_batch=100000")
    once = gib(plan_of(8, *settings)[0], "rollout")["working memory"]
    turns = gib(plan_of(8, *settings, "rollout.environment=calculator")[0], "rollout")["working memory"]
    assert turns == pytest.approx(1025 / 257 * once, rel=0.01)


def test_fp8_costs_copies_of_what_it_multiplies() -> None:
    """Two bytes for each weight of attention and experts, but for none of embedding, head, norms and router."""
    axes = ("parallel.ep=8",)
    plain, fp8 = (gib(plan_of(8, *axes, *more)[0]) for more in ((), ("precision.fp8=blockwise",)))
    assert "FP8 copies" not in plain and fp8["weights"] == plain["weights"]
    assert 0.85 * fp8["weights"] < fp8["FP8 copies"] < fp8["weights"]
    assert fp8["activations"] < plain["activations"]


def test_the_first_stage_holds_more_micro_batches_than_the_last() -> None:
    _, config, layout = plan_of(8, "parallel.pp=4", "parallel.ep=2")
    activations = [
        memory_of_stage(config, layout, stage, with_reference=False).phases["update"]["activations"]
        for stage in range(4)
    ]
    # The last one holds the final norm and hidden states as well.
    assert activations[:3] == pytest.approx([activations[2] * n / 2 for n in (4, 3, 2)], rel=1e-3)
    assert activations[3] == pytest.approx(activations[2] / 2, rel=0.05)


BIG = ("parallel.tp=4", "parallel.pp=2", "parallel.ep=8")


def test_a_run_that_fits_is_told_so() -> None:
    _, config, layout = plan_of(64, *BIG, "parallel.recompute=full")
    needed = fullest_stage(config, layout, with_reference=False).peak / 2**30
    verdict = memory_verdict(config, layout, needed + 7, with_reference=False)
    assert re.fullmatch(rf"fits: \w+ needs {needed:.1f} GiB on each GPU of stage \d of 2; {needed + 7:.1f} .*", verdict)
    assert memory_verdict(config, layout, needed + 1, with_reference=False).startswith("barely fits: ")


def test_a_run_that_does_not_fit_is_refused_with_settings_that_help() -> None:
    """The numbers beside them are those of the plan with these settings."""
    _, config, layout = plan_of(64, *BIG, "train.tokens_per_micro_batch=131072")
    with pytest.raises(ConfigError) as refused:
        memory_verdict(config, layout, 79.6, with_reference=False)
    message = str(refused.value)
    assert re.match(r"not enough memory: update needs \d+\.\d GiB on each GPU of stage \d of 2 \(activations", message)
    assert "79.6 GiB are there" in message
    options = re.findall(r"(\w+\.\w+=\w+) \((\d+\.\d) GiB\)", message)
    assert "parallel.recompute=full" in dict(options) and len(options) >= 3
    enough = re.findall(r"(\d+\.\d) GiB\)", message.partition("not enough alone")[0])
    assert enough and all(float(left) <= 79.6 - RESERVED_GIB for left in enough), "a GPU holds more than the plan"
    for setting, left in options:
        _, changed, other = plan_of(64, *BIG, "train.tokens_per_micro_batch=131072", setting)
        assert fullest_stage(changed, other, with_reference=False).peak / 2**30 == pytest.approx(float(left), abs=0.06)


def test_a_refusal_says_where_no_single_setting_is_enough() -> None:
    _, config, layout = plan_of(64, *BIG)
    with pytest.raises(ConfigError, match=r"no single setting is enough .*; these help: parallel\.\w+=\w+ \("):
        memory_verdict(config, layout, 10.0, with_reference=False)


def forward_flops(m: ModelConfig, length: int) -> int:
    """Of every matrix product of a forward pass written out, as PyTorch counts them; attention token by token."""
    assert m.vocab_size is not None
    width = m.head_dim
    query, kv = m.num_attention_heads * width, m.num_query_groups * width

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns)

    x = torch.zeros(length, m.hidden_size)
    with FlopCounterMode(display=False) as counter:
        for _ in range(m.num_layers):
            q, k, v = x @ weight(m.hidden_size, query), x @ weight(m.hidden_size, kv), x @ weight(m.hidden_size, kv)
            for head in range(m.num_attention_heads):
                group = head * m.num_query_groups // m.num_attention_heads
                mine, shared = (slice(i * width, (i + 1) * width) for i in (head, group))
                for t in range(length):
                    scores = q[t : t + 1, mine] @ k[: t + 1, shared].T
                    scores @ v[: t + 1, shared]
            q @ weight(query, m.hidden_size)
            x @ weight(m.hidden_size, m.num_experts)
            for _ in range(m.experts_per_token):
                gate, up = x @ weight(m.hidden_size, m.expert_ffn_size), x @ weight(m.hidden_size, m.expert_ffn_size)
                (gate * up) @ weight(m.expert_ffn_size, m.hidden_size)
        x @ weight(m.hidden_size, m.vocab_size)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("overrides", [(), ("model.tie_embeddings=true", "model.experts_per_token=3")])
def test_the_cost_of_a_sequence_is_its_forward_flops(length: int, overrides: tuple[str, ...]) -> None:
    m = load_config(None, [*SMALL, *overrides]).model
    assert sequence_cost(m.shape)(length) == forward_flops(m, length)


def test_long_sequences_cost_more_than_their_tokens() -> None:
    """Twice the tokens: twice the weights' work, and nearly four times the attention's."""
    cost = sequence_cost(load_config(None, ["model.preset=qwen3_30b_a3b", FIT]).model.shape)
    growth = [cost(2 * length) / cost(length) for length in (1, 1000, 10_000, 100_000, 10_000_000)]
    assert growth == sorted(growth) and growth[0] > 2 and growth[-1] == pytest.approx(4, rel=1e-2)
    assert growth[1] == pytest.approx(2, rel=0.1)
