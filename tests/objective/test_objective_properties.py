"""What holds for any batch: ragged and empty responses, tokens spread over ranks, log-ratios of a thousand nats."""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, group_advantages
from tests.objective.test_objective import ROWS, gradients, reduced
from tests.support import oracles as oracles
from tests.support.context_parts import in_parts

unhurried = settings(max_examples=20, deadline=None)  # a busy machine is no failure


class Response(NamedTuple):
    """Log-ratios are multiples of 2^-14, so that their sums are exact in any order, and what differs is the code."""

    log_ratios: list[float]
    advantage: float


LOG_RATIO = st.one_of(
    st.integers(-16, 16).map(lambda n: n / 2**14),  # around the clip range of gspo
    st.integers(-(2**16), 2**16).map(lambda n: n / 2**14),  # around that of the others, and far beyond
    st.sampled_from([1e3, -1e3]),
)
ADVANTAGE = st.integers(-24, 24).map(lambda n: n / 8)
RESPONSES = st.lists(st.builds(Response, st.lists(LOG_RATIO, max_size=5), ADVANTAGE), min_size=1, max_size=6)
LIKELY = RESPONSES.filter(lambda responses: any(response.log_ratios for response in responses))


OLD = -0.5


def loss_of(name: str, responses: list[Response], dtype: torch.dtype = torch.float64) -> tuple[LossTerms, torch.Tensor]:
    """LossTerms without KL and entropy, and the gradient by each log-prob."""
    log_ratios = [x for response in responses for x in response.log_ratios]
    new_R = (torch.tensor(log_ratios, dtype=dtype) + OLD).requires_grad_()
    advantages_S = torch.tensor([response.advantage for response in responses], dtype=dtype)
    segments = Segments.from_lengths([len(response.log_ratios) for response in responses])
    terms = PolicyObjective(VARIANTS[name], kl_coef=0.0)(new_R, torch.full_like(new_R, OLD), advantages_S, segments)
    return terms, gradients(terms.loss, new_R)[0]


@pytest.mark.parametrize("name", ROWS)
@unhurried
@given(responses=LIKELY, order=st.randoms(use_true_random=False))
def test_any_batch_in_any_order_has_the_loss_and_gradient_of_the_equation(
    name: str, responses: list[Response], order: Random
) -> None:
    for batch in (responses, order.sample(responses, len(responses))):
        log_ratios, advantages = zip(*batch, strict=True)
        loss, gradient = oracles.value_and_gradient(name, log_ratios, advantages, OLD)
        (found, metrics), gradient_R = loss_of(name, batch)
        assert found.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(gradient_R, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)
        assert all(math.isfinite(value) for value in reduced([metrics]).values())

    (loss_float32, metrics), gradient_R = loss_of(name, responses, torch.float32)
    assert torch.isfinite(loss_float32) and torch.isfinite(gradient_R).all()
    assert all(math.isfinite(value) for value in reduced([metrics]).values())


@pytest.mark.parametrize("name", ROWS)
@unhurried
@given(responses=LIKELY, size=st.integers(2, 4), seed=st.integers(0, 2**30), data=st.data())
def test_ranks_that_share_the_tokens_add_up(
    name: str, responses: list[Response], size: int, seed: int, data: st.DataObject
) -> None:
    """Context parallel: a rank holds any of the tokens, none included, and learns [S] sums from the others."""
    lengths = [len(response.log_ratios) for response in responses]
    log_ratio_R = torch.tensor([x for response in responses for x in response.log_ratios], dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    old_R = -torch.randint(0, 2**16, log_ratio_R.shape, generator=draw) / 2**14
    new_R = (old_R + log_ratio_R).requires_grad_()
    ref_R = new_R.detach() + torch.randn(log_ratio_R.shape, generator=draw)
    entropy_R = torch.rand(log_ratio_R.shape, generator=draw, dtype=torch.float64, requires_grad=True)
    advantages_S = torch.tensor([response.advantage for response in responses], dtype=torch.float64)
    owner_R = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=len(old_R), max_size=len(old_R))))
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.1, entropy_coef=0.1)

    def share(mine_R: torch.Tensor, segments: Segments) -> LossTerms:
        new, old, ref, entropy = (x_R[mine_R] for x_R in (new_R, old_R, ref_R, entropy_R))
        return objective(new, old, advantages_S, segments, ref_log_probs_T=ref, entropy_T=entropy)

    segments = Segments.from_lengths(lengths)

    def on_rank(rank: int, over_ranks) -> LossTerms:
        mine_R = (owner_R == rank).nonzero().flatten()
        part = Segments.from_lengths(lengths, index_R=segments.index_R[mine_R], over_ranks=over_ranks)
        return share(mine_R, part)

    whole = share(torch.arange(len(old_R)), segments)
    parts = in_parts(size, on_rank)
    total = sum(part.loss for part in parts)
    # Log-probs themselves, of up to a thousand nats, cancel in the sum of a row that weighs them.
    largest = 1e3 if VARIANTS[name].clip.weighs_tokens else 1.0
    torch.testing.assert_close(total, whole.loss, rtol=1e-14, atol=1e-14 * largest)
    inputs = (new_R, entropy_R)
    torch.testing.assert_close(gradients(total, *inputs), gradients(whole.loss, *inputs), rtol=1e-14, atol=1e-14)
    assert reduced([part.metrics for part in parts]) == pytest.approx(reduced([whole.metrics]), rel=1e-14, abs=1e-14)


# A reward function's 0.1 + 0.2 is the 0.3 of its neighbour.
FLAT = st.lists(st.sampled_from([0.3, 0.1 + 0.2]), min_size=1, max_size=4)
GROUPS = st.lists(st.one_of(FLAT, st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=4)), max_size=5)


@pytest.mark.parametrize("name", [name for name, row in VARIANTS.items() if row.baseline.scope == "group"])
@unhurried
@given(flat=FLAT, others=GROUPS, data=st.data())
def test_a_group_of_equal_rewards_teaches_nothing(
    name: str, flat: list[float], others: list[list[float]], data: st.DataObject
) -> None:
    """Whatever the ratios, its tokens have no gradient, not even a small one; a batch of such groups has loss 0."""
    groups = [flat, *others]
    group_ids = [number for number, group in enumerate(groups) for _ in group]
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    advantages = group_advantages(rewards, group_ids, VARIANTS[name].baseline).tolist()
    responses = [
        Response(data.draw(st.lists(LOG_RATIO, min_size=1, max_size=3)), advantage) for advantage in advantages
    ]
    (loss, _), gradient_R = loss_of(name, responses)
    gradient = gradient_R.split([len(response.log_ratios) for response in responses])
    taught = [max(group) - min(group) > 0.1 for group in groups]
    for number, gradient_t in zip(group_ids, gradient, strict=True):
        assert taught[number] or gradient_t.count_nonzero() == 0
    assert any(taught) or loss.item() == 0
    assert torch.isfinite(loss) and torch.isfinite(gradient_R).all()
