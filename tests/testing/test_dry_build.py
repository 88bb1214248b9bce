"""Ranks of a large model, built on this machine without their memory: together they hold the model, and each holds what
the planner says. `make dry-cuda` does the same at full size with Transformer Engine's layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch

from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.checkpoint.shards import Shard
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.layout.memory import held_sizes, stage_parameters
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.testing.dry_build import Coverage, DryBuild, RankContents
from gspo_megatron.testing.local_ranks import run_distributed

MODEL = (
    "model.preset=qwen3_30b_a3b",
    "model.num_layers=2",
    "train.tokens_per_micro_batch=32768",
    "precision.dtype=bf16",
    "precision.device=cpu",
)
WORLD_SIZE = 8
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=4")

Built = tuple[list[RankContents], dict[str, tuple[int, ...]]]


def build_all(overrides: tuple[str, ...]) -> Built:
    """What every rank holds, and the whole weights."""
    open_device("cpu", "bf16")
    config = load_config(None, [*MODEL, *overrides])
    dry = DryBuild(config, check_config(config, WORLD_SIZE), torch.device("cpu"), use_te=False)
    contents = [dry.rank(rank) for rank in range(WORLD_SIZE)]
    return contents, dry.whole_weights([rank.sources for rank in contents])


@cache
def built(*overrides: str) -> Built:
    """In a process of its own: Megatron's groups outlive a failure."""
    (found,) = run_distributed(build_all, 1, overrides, timeout_s=120, like_torchrun=True)
    return found


def coverage(contents: list[RankContents]) -> Coverage:
    found = Coverage()
    for rank in contents:
        found.add(rank.written)
    return found


def test_all_ranks_together_hold_two_layers_of_qwen3_30b_a3b() -> None:
    """30,532,122,624 parameters are the published 48 layers; 46 of 623,120,640 are left out."""
    contents, whole = built(*LAYOUT)
    found = coverage(contents)
    assert found.faults() == []
    assert sum(rows * columns for rows, columns in found.shapes.values()) == 3 * (30_532_122_624 - 46 * 623_120_640)
    assert sum(map(prod, whole.values())) == 30_532_122_624 - 46 * 623_120_640


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "parallel.tp=2",
            "parallel.pp=2",
            "parallel.first_stage_layers=1",
            "model.num_layers=3",
            "algorithm.kl_coef=0.1",
        ),
        ("parallel.tp=2", "parallel.cp=2", "parallel.etp=2", "parallel.ep=2", "optimizer.distributed=false"),
        ("parallel.tp=4", "parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "model.vocab_size=151"),
        ("model.preset=tiny_mla", "model.vocab_size=151", "parallel.tp=2", "parallel.pp=2", "parallel.ep=4"),
    ],
)
def test_ranks_of_any_layout_write_each_element_once_and_hold_what_is_planned(overrides: tuple[str, ...]) -> None:
    overrides = ("model.num_experts=8", *overrides)
    contents, whole = built(*overrides)
    config = load_config(None, [*MODEL, *overrides])
    layout, shape = check_config(config, WORLD_SIZE), config.model.shape
    found, total = coverage(contents), count_parameters(shape).total
    assert found.faults() == []
    elements: Counter[str] = Counter()
    for key, (rows, columns) in found.shapes.items():
        elements[key.partition(".")[0]] += rows * columns
    # A router's bias is saved and exported, but it is not trained.
    biases = shape.num_experts * (shape.num_layers - shape.num_dense_layers) * (shape.family == "deepseek_v3")
    reference = {"reference": total + biases} if config.algorithm.kl_coef else {}
    assert elements == {"policy": total + biases, "exp_avg": total, "exp_avg_sq": total, **reference}
    assert sum(map(prod, whole.values())) == total + biases
    for rank in contents:
        assert rank.num_parameters() == stage_parameters(shape, layout, rank.stage)


def test_the_weights_have_the_names_and_sizes_of_the_hub() -> None:
    """Sizes: https://huggingface.co/Qwen/Qwen3-30B-A3B, model.safetensors.index.json and config.json."""
    _, whole = built(*LAYOUT)
    layer = {
        "self_attn.q_proj": (4096, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 4096),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "input_layernorm": (2048,),
        "post_attention_layernorm": (2048,),
        "mlp.gate": (128, 2048),
        **{f"mlp.experts.{i}.{part}_proj": (768, 2048) for i in range(128) for part in ("gate", "up")},
        **{f"mlp.experts.{i}.down_proj": (2048, 768) for i in range(128)},
    }
    layers = {f"layers.{i}.{name}": size for i in range(2) for name, size in layer.items()}
    rest = {"model.embed_tokens.weight": (151936, 2048), "lm_head.weight": (151936, 2048), "model.norm.weight": (2048,)}
    assert whole == rest | {f"model.{name}.weight": size for name, size in layers.items()}


def test_a_rank_needs_the_memory_that_is_planned() -> None:
    """Megatron's distributed optimizer pads its buffers, by less than a thousandth here."""
    contents, _ = built(*LAYOUT)
    config = load_config(None, [*MODEL, *LAYOUT])
    layout = check_config(config, WORLD_SIZE)
    for rank in contents:
        planned = held_sizes(config, layout, rank.stage, with_reference=False)
        for purpose in ("weights", "gradients", "optimizer"):
            assert rank.num_bytes[purpose] == pytest.approx(planned[purpose], rel=1e-3), (rank.rank, purpose)
        # Cosines and sines of RoPE in float32, and nothing else that no one planned.
        assert rank.num_bytes["other"] == pytest.approx(2 * 32768 * 128 * 4, rel=0.01)


def test_what_a_rank_leaves_out_or_writes_again_is_found() -> None:
    contents, _ = built(*LAYOUT)
    missing = coverage(contents[:-1]).faults()
    assert missing and all(" lacks " in fault for fault in missing)
    twice = coverage([*contents, contents[3]]).faults()
    assert twice and all("more than once" in fault for fault in twice)
    # As many elements as there are, and yet one missing and one twice.
    place = Place("x", 0, 1, 0, 1)
    halves = [Shard(place, 2, 3, 2, 0, 3), Shard(place, 2, 3, 2, 2, 5)]
    found = Coverage()
    found.add(("x", shard) for shard in halves)
    assert found.faults() == ["x is written more than once, 1 pairs of shards overlap"]
    found = Coverage()
    found.add([("x", replace(halves[0], place=Place("x", 1, 1, 2, 2)))])
    assert found.faults() == ["x is (2, 6), and elements outside of it are written"]
