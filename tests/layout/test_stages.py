"""Which layers a pipeline rank holds, and which splits are refused."""

from __future__ import annotations

import itertools

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.layout.stages import broken_stages, layers_of_chunks, stage_layers, uneven_stages


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ((5, 1, None, None), (5,)),
        ((6, 3, None, None), (2, 2, 2)),
        ((5, 2, 3, None), (3, 2)),
        ((5, 2, None, 3), (2, 3)),
        ((5, 2, 3, 2), (3, 2)),
        ((94, 8, 11, 11), (11, 12, 12, 12, 12, 12, 12, 11)),
        ((61, 16, 4, 1), (4,) * 15 + (1,)),
        ((61, 4, 16, None), (16, 15, 15, 15)),
    ],
)
def test_the_outer_stages_may_differ(split: tuple[int, int, int | None, int | None], sizes: tuple[int, ...]) -> None:
    assert stage_layers(*split) == sizes


@pytest.mark.parametrize("num_layers", [3, 5, 7])
def test_an_odd_number_of_layers_on_two_stages_is_refused(num_layers: int) -> None:
    """Megatron would stop at it, later and without a word about what works."""
    [refusal] = broken_stages(num_layers, 2, 1, None, None)
    assert f"model.num_layers={num_layers} is not divisible by pp(2)" in refusal
    assert "stages of unequal depth work: parallel.first_stage_layers=" in refusal


def test_a_token_passes_through_the_chunks_in_turn() -> None:
    """Megatron's own example: 8 layers, 2 stages of 2 virtual ones; then the same with unequal ranks."""
    assert layers_of_chunks((4, 4), 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert layers_of_chunks((2, 4, 2), 2) == [
        [range(0, 1), range(4, 5)],
        [range(1, 3), range(5, 7)],
        [range(3, 4), range(7, 8)],
    ]


def test_what_is_proposed_works_and_is_the_best_balanced_that_does() -> None:
    for num_layers, pp, vpp in itertools.product((5, 6, 13, 24), (1, 2, 3, 4, 5), (1, 2, 3)):
        sizes = (None, *range(1, num_layers + 1))
        working = {
            stage_layers(num_layers, pp, *pair)
            for pair in itertools.product(sizes, sizes)
            if not list(broken_stages(num_layers, pp, vpp, *pair))
        }
        if pp == 1:
            continue
        proposed = [stage_layers(num_layers, pp, *pair) for pair in uneven_stages(num_layers, pp, vpp)]
        # One for each number of layers between the outer stages, and the best of all first.
        between = [sizes[1:-1] for sizes in proposed]
        assert set(proposed) <= working and set(between) == {sizes[1:-1] for sizes in working}
        assert len(between) == len(set(between))
        assert not working or (max(proposed[0]), max(proposed[0]) - min(proposed[0])) == min(
            (max(sizes), max(sizes) - min(sizes)) for sizes in working
        )
        for split in working:
            assert sum(split) == num_layers and not any(size % vpp for size in split)


QWEN = ("model.preset=qwen3_235b_a22b", "train.tokens_per_micro_batch=32768", "parallel.ep=8")


def test_94_layers_on_8_stages_are_refused_with_values_that_work() -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(load_config(None, [*QWEN, "parallel.pp=8"]), 128)
    message = str(refused.value)
    assert message.startswith("model.num_layers=94 is not divisible by pp(8) * vpp(1) = 8; stages of unequal depth ")
    settings = message.split("work: ")[1].split(";")[0].split()
    assert settings == ["parallel.first_stage_layers=11", "parallel.last_stage_layers=11"]
    layout = check_config(load_config(None, [*QWEN, "parallel.pp=8", *settings]), 128)
    assert layout.stage_layers(94) == (11, *[12] * 6, 11)
    assert str(layout).startswith("tp 1 x pp 8 (first 11 layers, last 11 layers) x cp 1 x dp 16")
    assert layout.layers_of_stage(94, 7) == list(range(83, 94))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("first_stage_layers=3",), "parallel.first_stage_layers=3 splits layers over pipeline stages, but"),
        (
            ("pp=4", "first_stage_layers=2", "last_stage_layers=1"),
            "model.num_layers=6 with parallel.first_stage_layers=2 and parallel.last_stage_layers=1 cannot be split "
            "over pp(4) stages: each needs a multiple of vpp(1) layers, above 0, and all stages between the first and "
            "the last have the same number; stages of unequal depth work: parallel.first_stage_layers=1 "
            "parallel.last_stage_layers=1; nearest layouts that work on WORLD_SIZE=4: parallel.pp=2",
        ),
        (
            ("pp=2", "first_stage_layers=4", "last_stage_layers=1"),
            "model.num_layers=6 with parallel.first_stage_layers=4 and parallel.last_stage_layers=1 cannot be split",
        ),
        (("pp=2", "vpp=2", "first_stage_layers=3"), "model.num_layers=6 with parallel.first_stage_layers=3 and"),
        (("pp=2", "first_stage_layers=6"), "model.num_layers=6 with parallel.first_stage_layers=6 and"),
    ],
)
def test_what_cannot_be_split_is_refused(overrides: tuple[str, ...], complaint: str) -> None:
    config = load_config(None, ["model.num_layers=6", "model.vocab_size=13", *(f"parallel.{x}" for x in overrides)])
    with pytest.raises(ConfigError) as refused:
        check_config(config, 4)
    assert str(refused.value).startswith(complaint), str(refused.value)


def test_more_stages_than_layers_are_refused_without_listing_them() -> None:
    (text,) = broken_stages(4, 10**9 + 7, 1, None, None)
    assert "model.num_layers=4 is not divisible by pp(1000000007)" in text
