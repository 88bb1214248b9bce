from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from gspo_megatron.data.mixture import BLOCK, Mixture, Part
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.testing.fakes import Prompts

SIZES, WEIGHTS = {"a": 7, "b": 1000, "c": 10}, {"a": 2.0, "b": 1.0, "c": 0.001}


def mixture(weights: dict[str, float] = WEIGHTS) -> Mixture:
    return Mixture([Part(name, weights[name], Prompts(size)) for name, size in SIZES.items()])


def test_prompts_keep_their_number_and_name_their_source() -> None:
    mixed = mixture()
    assert [(mixed[i].id, mixed[i].source) for i in (0, 1, 2, 3)] == [(0, "a"), (1, "b"), (2, "c"), (3, "a")]
    assert mixed[3 * 5 + 1].text == mixed.parts[1].prompts[5].text


def test_every_block_holds_the_weights_and_the_mean_is_exact() -> None:
    order = mixture().order(seed=3)
    drawn = [index % 3 for index in order.slice(0, 100 * BLOCK)]
    shares = [weight / sum(WEIGHTS.values()) for weight in WEIGHTS.values()]
    for block in range(0, len(drawn), BLOCK):
        counts = Counter(drawn[block : block + BLOCK])
        assert all(abs(counts[s] - share * BLOCK) < 2 for s, share in enumerate(shares))
    assert Counter(drawn)[2] / 100 == pytest.approx(shares[2] * BLOCK, abs=0.15)  # a third of a prompt in a block
    assert drawn[:50] != sorted(drawn[:50]) and drawn[:BLOCK] != drawn[BLOCK : 2 * BLOCK]


def test_every_source_goes_through_its_epochs() -> None:
    order = mixture().order(seed=3)
    of_source: dict[int, list[int]] = defaultdict(list)
    for index in order.slice(0, 5 * BLOCK):
        of_source[index % 3].append(index // 3)
    for source, size in enumerate(SIZES.values()):
        own = of_source[source]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))
    assert of_source[0][:7] != of_source[0][7:14]


def test_any_position_can_be_read_at_any_time() -> None:
    whole = mixture().order(seed=1).slice(0, 3 * BLOCK)
    order = mixture().order(seed=1)
    for start in (2500, 999, 0, 1001):
        assert order.slice(start, 40) == whole[start : start + 40]
    assert order[1234] == whole[1234]
    assert mixture().order(seed=2).slice(0, 100) != whole[:100]
    ordered = OrderedPrompts(mixture(), seed=1, taken=1200)
    assert [prompt.id for prompt in ordered.next(5)] == whole[1200:1205]
