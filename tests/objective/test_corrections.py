"""Weights for another sampler: against plain loops, on ranks that share tokens, and with numbers that are missing."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective import PolicyObjective, Segments, resolve_variant
from gspo_megatron.objective.corrections import CORRECTIONS, drift_by_position
from tests.objective.test_objective import EXACT, LENGTHS, batch, gradients, reduced
from tests.support import oracles
from tests.support.context_parts import in_parts


def sampled(old_R: torch.Tensor) -> torch.Tensor:
    """Log-probs of the sampler: a response is shifted as a whole, and its tokens are."""
    draw = torch.Generator().manual_seed(7)
    shift_S = 0.15 * torch.randn(len(LENGTHS), generator=draw, dtype=torch.float64)
    noise_R = 0.3 * torch.randn(len(old_R), generator=draw, dtype=torch.float64)
    return old_R - shift_S.repeat_interleave(torch.tensor(LENGTHS)) - noise_R


@pytest.mark.parametrize("row", ["gspo", "grpo", "cispo"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_value_and_gradient(name: str, row: str) -> None:
    """Each token's term, times a number. Both kept and dropped tokens are among them."""
    parameters, weight_of = oracles.find(oracles.CORRECTIONS, name)
    new_R, old_R, _, _, advantages_S = batch(row)
    sampler_R, segments = sampled(old_R), Segments.from_lengths(LENGTHS)
    variant = resolve_variant(row, correction=name, dials={f"correction.{k}": v for k, v in parameters.items()})
    loss, metrics = PolicyObjective(variant)(new_R, old_R, advantages_S, segments, sampler_log_probs_T=sampler_R)

    oracle, expected, weights = oracles.ORACLES[row], 0.0, []
    for y_new, y_old, y_sampler, a in zip(
        *(x_R.split(LENGTHS) for x_R in (new_R, old_R, sampler_R)), advantages_S.tolist(), strict=True
    ):
        rhos, moved = (y_old - y_sampler).exp().tolist(), (y_new - y_old).tolist()
        for t, at in enumerate(oracles.seen(oracle, y_new, y_old, a) if len(y_new) else []):
            weights.append(weight_of(rhos, t, moved, a))
            expected = expected - oracle.share(len(y_new), 7, 23) * weights[-1] * oracle.clip.term(at)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(loss, new_R), gradients(expected, new_R), rtol=1e-11, atol=1e-15)
    found = reduced([metrics])
    if name != "none":
        assert len(set(weights)) > 1
        assert found["sampler/weight"] == pytest.approx(sum(weights) / 23)
        assert found["sampler/left_out_fraction"] == pytest.approx(weights.count(0.0) / 23)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_ranks_that_share_the_tokens_add_up(name: str) -> None:
    parameters, _ = oracles.CORRECTIONS[name]
    new_R, old_R, _, _, advantages_S = batch("gspo")
    sampler_R, segments = sampled(old_R), Segments.from_lengths(LENGTHS)
    variant = resolve_variant("gspo", correction=name, dials={f"correction.{k}": v for k, v in parameters.items()})

    def on_rank(rank: int, over_ranks):
        mine_R = torch.arange(rank, len(old_R), 2)
        part = Segments.from_lengths(LENGTHS, index_R=segments.index_R[mine_R], over_ranks=over_ranks)
        new, old, sampler = (x_R[mine_R] for x_R in (new_R, old_R, sampler_R))
        return PolicyObjective(variant)(new, old, advantages_S, part, sampler_log_probs_T=sampler)

    whole = PolicyObjective(variant)(new_R, old_R, advantages_S, segments, sampler_log_probs_T=sampler_R)
    parts = in_parts(2, on_rank)
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, **EXACT)
    torch.testing.assert_close(gradients(total, new_R), gradients(whole.loss, new_R), **EXACT)
    assert reduced([part.metrics for part in parts]) == pytest.approx(reduced([whole.metrics]), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "none"])
def test_a_log_prob_that_is_no_number_is_a_ratio_of_one_and_is_counted(name: str, bad: float) -> None:
    parameters, _ = oracles.CORRECTIONS[name]
    new_R, old_R, _, _, advantages_S = batch("gspo")
    broken_R, mended_R = sampled(old_R), sampled(old_R)
    broken_R[[2, 9]], mended_R[[2, 9]] = bad, old_R[[2, 9]]
    variant = resolve_variant("gspo", correction=name, dials={f"correction.{k}": v for k, v in parameters.items()})
    losses, metrics = zip(
        *(
            PolicyObjective(variant)(
                new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS), sampler_log_probs_T=sampler_R
            )
            for sampler_R in (broken_R, mended_R)
        ),
        strict=True,
    )
    assert losses[0].item() == losses[1].item()
    assert torch.equal(gradients(losses[0], new_R)[0], gradients(losses[1], new_R)[0])
    found = reduced([metrics[0]])
    assert found["sampler/not_finite"] == 2 and all(map(math.isfinite, found.values()))
    assert metrics[0]["sampler/kl"].weight == 21


def test_both_divergences_are_those_of_the_distributions() -> None:
    """Over every token of a small vocabulary, drawn as often as the sampler would: exactly the two divergences."""
    mu = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    pi = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64)
    drawn = torch.tensor([0] * 4 + [1] * 2 + [2, 3])
    old_R, sampler_R = pi.log()[drawn], mu.log()[drawn]
    segments, one_S = Segments.from_lengths([8]), torch.ones(1).double()
    _, metrics = PolicyObjective(resolve_variant("gspo"))(old_R, old_R, one_S, segments, sampler_log_probs_T=sampler_R)
    assert reduced([metrics])["sampler/kl"] == pytest.approx(float((mu * (mu / pi).log()).sum()))
    assert reduced([metrics])["sampler/kl_reverse"] == pytest.approx(float((pi * (pi / mu).log()).sum()))
    # pi / mu is 0.4, 0.8, 1.6, 3.2: beyond 2 or 1/2 in five of eight draws.
    assert reduced([metrics])["sampler/far_fraction"] == 5 / 8


def test_drift_by_position() -> None:
    gap_R = torch.tensor([0.1, -0.3, 0.5, 1.0])
    found = reduced([drift_by_position(gap_R, torch.tensor([1, 63, 64, 300]), 301)])
    assert found == pytest.approx({f"sampler/drift/from_{k}": v for k, v in ((0, 0.2), (64, 0.5), (256, 1.0))})
    assert drift_by_position(gap_R[:2], torch.tensor([1, 63]), 64).keys() == {"sampler/drift/from_0"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"correction": "token_tsi"}, "did you mean 'token_tis'"),
        (
            {"correction": "off_policy_mask"},
            r"needs correction.delta: no default; set algorithm.dials.correction.delta=0.1$",
        ),
        ({"correction": "token_tis", "dials": {"correction.cap": 0.0}}, r"correction.cap=0.0.*set it above 0"),
        ({"correction": "icepop", "dials": {"correction.floor": 6.0}}, r"correction.floor=6.0, correction.cap=5.0"),
        ({"correction": "geometric_mask", "dials": {"correction.low": 1.1}}, "set low below 1 and high above"),
        ({"dials": {"correction.cap": 2.0}}, "correction 'none' has no parameter 'cap'"),
    ],
)
def test_what_is_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_variant("gspo", **settings)


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "none"])
def test_parameters_that_are_no_number_are_refused(name: str) -> None:
    parameters, _ = oracles.CORRECTIONS[name]
    for parameter in parameters:
        dials = {f"correction.{k}": v for k, v in parameters.items()} | {f"correction.{parameter}": math.nan}
        with pytest.raises(ConfigError):
            resolve_variant("gspo", correction=name, dials=dials)


def test_weights_without_log_probs_of_the_sampler_are_refused() -> None:
    variant = resolve_variant("gspo", correction="token_tis")
    zero_R = torch.zeros(1)
    with pytest.raises(ConfigError, match="correction='token_tis' weighs tokens by the sampler's log-probs"):
        PolicyObjective(variant)(zero_R, zero_R, torch.ones(1), Segments.from_lengths([1]))
