"""Layouts: what follows from the axes, the nearest ones to one that cannot work, what they require of micro-batches."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import astuple

import pytest

from gspo_megatron.base.batches import PackingRules, Sequence
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import build_micro_batch
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.layout import Layout, nearest_layouts, packing_rules, sampler_token_multiple

WHOLE_CLUSTER = ("model.preset=qwen3_30b_a3b", "train.tokens_per_micro_batch=32768")
FP8 = ("precision.fp8=blockwise", "precision.dtype=bf16")


def test_the_layout_follows_from_the_axes_and_the_world() -> None:
    axes = ["parallel.tp=4", "parallel.pp=2", "parallel.ep=8"]
    layout = check_config(load_config(None, [*WHOLE_CLUSTER, *axes]), 64)
    assert (layout.dp, layout.edp) == (8, 4)
    assert str(layout) == "tp 4 x pp 2 x cp 1 x dp 8; experts: ep 8 x etp 1 x edp 4"
    more = ["parallel.vpp=3", "parallel.cp=2", "parallel.etp=2", "parallel.token_dispatcher=allgather"]
    layout = check_config(load_config(None, [*WHOLE_CLUSTER, *axes, *more]), 64)
    assert str(layout) == "tp 4 x pp 2 (vpp 3) x cp 2 x dp 4; experts: ep 8 x etp 2 x edp 2"


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
        ((*FP8, "parallel.cp=2"), PackingRules(sequence_multiple=4, token_multiple=32), 16),
        ((*FP8, "parallel.tp=2", "parallel.cp=2"), PackingRules(sequence_multiple=4, token_multiple=512), 32),
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
    assert sampler_token_multiple(config) == sampler_multiple


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("fp8", RECIPES)
def test_the_rows_of_every_forward_are_as_a_number_format_takes_them(fp8: str, cp: int, tp: int) -> None:
    """As they are packed for training and for log-probs. Sequence parallel cuts the tokens of a context-parallel rank
    once more, and gathers them before a product."""
    settings = [f"precision.fp8={fp8}", "precision.dtype=bf16", f"parallel.tp={tp}", f"parallel.cp={cp}"]
    config, recipe = load_config(None, settings), RECIPES[fp8]
    rules = packing_rules(config)
    sequences = [Sequence.after_prompt(list(range(length)), 1) for length in (61, 7, 130, 2)]
    for index in ([0, 1, 2, 3], [3], []):
        for cp_rank in range(cp):
            packed = build_micro_batch(sequences, index, pad_id=0, rules=rules, cp_rank=cp_rank, cp_size=cp)
            rows, of_a_rank = len(packed.tokens_T), len(packed.tokens_T) / tp
            assert rows and rows % recipe.row_multiple == 0
            assert of_a_rank % recipe.row_multiple == 0
            if tp > 1:
                assert of_a_rank % recipe.gathered_row_multiple == 0
