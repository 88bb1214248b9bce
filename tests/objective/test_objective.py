from __future__ import annotations

import math

import pytest
import torch

from gspo_megatron.base.metrics import Metric
from gspo_megatron.objective import VARIANTS, LikelihoodObjective, PolicyObjective, Segments, resolve_variant
from gspo_megatron.objective.variants import DIALS
from tests.support import oracles as oracles

ROWS = list(VARIANTS)
PPO_ROWS = [name for name in ROWS if VARIANTS[name].clip.name == "ppo"]
NEVER_HELD, ONLY_HIGH = ("sapo", "vespo", "rloo"), ("cispo",)
LENGTHS = [5, 1, 0, 7, 1, 3, 4, 2, 0]
# The ratio of each sequence in clip ranges (beyond 1 is outside), and its advantage: all six branches of min().
RANGES = [3.0, -3.0, 0.1, 3.0, 0.3, -3.0, -0.3, 3.0, 0.2]
ADVANTAGES = [1.3, -0.9, 1.0, -1.1, 0.7, 0.5, -0.4, 1.0, -1.0]
OWN_ORACLES = {"baseline": oracles.BASELINES, "correction": oracles.CORRECTIONS}
EXACT = {"rtol": 1e-12, "atol": 1e-15}


def batch(name: str, lengths=LENGTHS):
    """new, old, ref log-probs, entropy [R] and advantages [S], with ratios around the clip range of the row `name`.

    Every sequence has the mean (gspo_sum: the sum) of RANGES; around it its tokens are spread by the range.
    """
    oracle, draw = oracles.find(oracles.ORACLES, name), torch.Generator().manual_seed(0)

    def noise(count, scale=1.0):
        return scale * torch.randn(count, generator=draw, dtype=torch.float64)

    log_ratio = []
    for i, length in enumerate(lengths):
        centre = RANGES[i % 9] * (oracle.clip.high if RANGES[i % 9] > 0 else oracle.clip.low)
        around = noise(length, oracle.clip.low)
        log_ratio.append(centre / max(oracle.level.moves(length), 1) + around - around.sum() / max(length, 1))
    old_R = -noise(sum(lengths)).abs() - 0.1
    new_R = old_R + torch.cat(log_ratio)
    ref_R = new_R + noise(sum(lengths), 0.3)
    advantages_S = torch.tensor([ADVANTAGES[i % 9] for i in range(len(lengths))], dtype=torch.float64)
    return new_R.requires_grad_(), old_R, ref_R, noise(sum(lengths)).abs().requires_grad_(), advantages_S


def reduced(metrics: list[dict[str, Metric]]) -> dict[str, float]:
    """What types.Metric says a metric means."""
    result = {}
    for name in metrics[0]:
        totals, weights = (
            [float(part) for part in parts] for parts in zip(*((m[name][:2]) for m in metrics), strict=True)
        )
        reduction = metrics[0][name].reduction
        result[name] = (
            sum(totals) / sum(weights)
            if reduction == "mean"
            else {"min": min, "max": max, "sum": sum}[reduction](totals)
        )
    return result


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


# --- against the equations ---


def test_every_row_and_every_dial_has_an_oracle():
    for name in ROWS:
        oracles.find(oracles.ORACLES, name)
    for kind, own in OWN_ORACLES.items():
        for name in DIALS[kind]:
            oracles.find(own, name)
    for kind, table in DIALS.items():
        used = {row.dials[kind].name: type(row.dials[kind]) for row in VARIANTS.values()}
        for name, dial in used.items():
            assert table.get(name) is dial, (
                f"{kind} {name!r} of a row is not in the table of its kind: add a line there"
            )
        unused = table.keys() - used.keys() if kind not in OWN_ORACLES else set()
        assert not unused, (
            f"{kind} {', '.join(unused)} is in no row, so no oracle covers it: add a row of VARIANTS that has it, and "
            "the row's oracle to ORACLES in tests/support/oracles.py"
        )


def test_a_row_without_an_oracle_is_refused():
    message = r"'mine' has no oracle.*tests/support/oracles.py, ORACLES: 'mine': Oracle"
    with pytest.raises(AssertionError, match=message):
        batch("mine")


@pytest.mark.parametrize("estimator", [None, "k1", "k2", "k3", "k1+", "k3+"])
@pytest.mark.parametrize("name", ROWS)
def test_value_and_gradient_of_every_row(name, estimator):
    row = VARIANTS[name]
    new_R, old_R, ref_R, entropy_R, advantages_S = batch(name)
    kl_coef, entropy_coef = (0.3, 0.2) if estimator else (0.0, 0.0)
    objective = PolicyObjective(row, kl_coef=kl_coef, kl_estimator=estimator or "k3", entropy_coef=entropy_coef)
    loss, _ = objective(
        new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS), ref_log_probs_T=ref_R, entropy_T=entropy_R
    )

    new, old, ref, entropy = (x_R.split(LENGTHS) for x_R in (new_R, old_R, ref_R, entropy_R))
    expected = oracles.policy_loss(name, new, old, advantages_S.tolist())
    if estimator:
        expected = expected + kl_coef * oracles.aggregated(name, oracles.kl(estimator, new, ref))
        expected = expected - entropy_coef * oracles.aggregated(name, entropy)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(
        gradients(loss, new_R, entropy_R), gradients(expected, new_R, entropy_R), rtol=1e-11, atol=1e-15
    )


def test_a_dual_clip_bounds_what_a_response_with_a_negative_advantage_costs(monkeypatch):
    """1912.09729: a token of A < 0 beyond the ceiling has the constant term ceiling * A."""
    dual = oracles.ORACLES["grpo"]._replace(clip=oracles.PpoClip(0.2, 0.2, 1.3))
    monkeypatch.setitem(oracles.ORACLES, "grpo", dual)
    new_R, old_R, _, _, advantages_S = batch("grpo")
    row = resolve_variant("grpo", dials={"clip.ceiling": 1.3})
    loss, metrics = PolicyObjective(row)(new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS))
    pairs = zip(new_R.split(LENGTHS), old_R.split(LENGTHS), advantages_S.tolist(), strict=True)
    held = [dual.clip.held(at) for pair in pairs if len(pair[0]) for at in oracles.seen(dual, *pair)]
    expected = oracles.policy_loss("grpo", new_R.split(LENGTHS), old_R.split(LENGTHS), advantages_S.tolist())
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(loss, new_R), gradients(expected, new_R), **EXACT)
    assert reduced([metrics])["clip_fraction_high"] == pytest.approx(held.count("high") / len(held))
    plain = PolicyObjective(resolve_variant("grpo"))(new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS))
    assert reduced([plain.metrics])["clip_fraction_high"] < reduced([metrics])["clip_fraction_high"]


@pytest.mark.parametrize("name", ROWS)
def test_metrics_of_every_row(name):
    oracle = oracles.find(oracles.ORACLES, name)
    new_R, old_R, ref_R, entropy_R, advantages_S = batch(name)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.0, kl_estimator="k1")
    _, metrics = objective(
        new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS), ref_log_probs_T=ref_R, entropy_T=entropy_R
    )
    assert not any(torch.is_tensor(m.total) and m.total.requires_grad for m in metrics.values())
    found = reduced([metrics])

    pairs = zip(new_R.detach().split(LENGTHS), old_R.split(LENGTHS), strict=True)
    responses = [
        oracles.seen(oracle, *pair, a) if len(pair[0]) else []
        for pair, a in zip(pairs, advantages_S.tolist(), strict=True)
    ]
    tokens = [(at.ratio.item(), at.advantage) for response in responses for at in response]
    per_sequence = oracle.level.unit == "sequence"
    units = [response[0].ratio.item() for response in responses if response] if per_sequence else [w for w, _ in tokens]
    held = [oracle.clip.held(at) for response in responses for at in response]
    low, high = held.count("low") / len(tokens), held.count("high") / len(tokens)
    # Every branch of min() is there, so that the comparison with the equations has met them all.
    if name in PPO_ROWS:
        assert any(w > 1 + oracle.clip.high and a > 0 for w, a in tokens)
        assert any(w < 1 - oracle.clip.low and a < 0 for w, a in tokens)
        assert any(w > 1 + oracle.clip.high and a < 0 for w, a in tokens)
        assert any(w < 1 - oracle.clip.low and a > 0 for w, a in tokens)
        assert {a > 0 for w, a in tokens if 1 - oracle.clip.low < w < 1 + oracle.clip.high} == {True, False}
    assert low > 0 or name in ONLY_HIGH or name in NEVER_HELD
    assert high > 0 or name in NEVER_HELD

    log_ratio_R = (new_R - old_R).detach()
    expected = {
        "ratio/mean": sum(units) / len(units),
        "ratio/min": min(units),
        "ratio/max": max(units),
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "kl/old": (log_ratio_R.exp() - 1 - log_ratio_R).mean().item(),
        "kl/ref": (new_R - ref_R).mean().item(),
        "entropy": entropy_R.mean().item(),
    }
    # exp(x) - 1 - x of the expected side cancels to about ten digits.
    assert found == pytest.approx(expected, rel=1e-9)


# The sg[] of a sequence_token level or of a weight is not what a difference sees.
@pytest.mark.parametrize(
    "name",
    [name for name, row in VARIANTS.items() if row.level.name != "sequence_token" and not row.clip.weighs_tokens],
)
def test_gradcheck(name):
    new_R, old_R, ref_R, entropy_R, advantages_S = batch(name)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.1, entropy_coef=0.1)
    segments = Segments.from_lengths(LENGTHS)

    def loss(log_probs_R, entropy_R):
        return objective(log_probs_R, old_R, advantages_S, segments, ref_log_probs_T=ref_R, entropy_T=entropy_R).loss

    assert torch.autograd.gradcheck(loss, (new_R, entropy_R), eps=1e-7, atol=1e-6)


def test_gspo_equals_gspo_token():
    new_R, old_R, _, _, advantages_S = batch("gspo")
    losses = [
        PolicyObjective(VARIANTS[name])(new_R, old_R, advantages_S, Segments.from_lengths(LENGTHS)).loss
        for name in ("gspo", "gspo_token")
    ]
    torch.testing.assert_close(*losses, **EXACT)
    torch.testing.assert_close(*(gradients(loss, new_R) for loss in losses), **EXACT)


def test_all_rows_are_one_where_every_response_is_one_token():
    lengths = [1] * 12
    new_R, old_R, _, _, advantages_S = batch("grpo", lengths)
    segments = Segments.from_lengths(lengths)
    losses = [
        PolicyObjective(resolve_variant(name, clip_low=0.2, clip_high=0.25, kl_coef=0.0))(
            new_R, old_R, advantages_S, segments
        ).loss
        for name in PPO_ROWS
        if VARIANTS[name].aggregate.name in ("sequence_mean", "token_mean")
    ]
    assert len(losses) >= 5
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], **EXACT)
        torch.testing.assert_close(gradients(loss, new_R), gradients(losses[0], new_R), **EXACT)


def test_at_the_old_policy_every_row_is_the_policy_gradient():
    """2507.18071 Eq. 10 and 12 at ratio 1: grad J = (1/S) sum A (1/|y|) sum_t grad log pi, over all tokens for dapo.
    The ratio of gspo_sum has |y| times the gradient. Nothing is clipped, whether or not old is detached.
    Other rows have the scale that their oracle says."""
    new_R, _, _, _, advantages_S = batch("gspo")
    segments = Segments.from_lengths(LENGTHS)
    length_R = segments.spread(segments.lengths_S)
    advantages_R = segments.spread(advantages_S)
    for name in ROWS:
        oracle = oracles.find(oracles.ORACLES, name)
        said_R = torch.tensor(
            [
                oracle.share(length, 7, 23) * (1 if oracle.clip.is_weight else oracle.level.moves(length))
                for length in length_R.tolist()
            ]
        )
        scale_R = {
            **dict.fromkeys(("gspo", "gspo_token", "grpo"), 1 / length_R / 7),
            "gspo_sum": torch.ones(23) / 7,
            "dapo": torch.ones(23) / 23,
        }.get(name, said_R)
        loss, metrics = PolicyObjective(VARIANTS[name], kl_coef=0.0)(new_R, new_R, advantages_S, segments)
        torch.testing.assert_close(gradients(loss, new_R)[0], -advantages_R * scale_R, check_dtype=False)
        found = reduced([metrics])
        assert (found["ratio/min"], found["ratio/max"], found["clip_fraction"], found["kl/old"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("outlier, arithmetic, geometric", [(5.0, 1.04, 1.0162), (50.0, 1.49, 1.0399)])
def test_one_odd_token_of_a_hundred(outlier, arithmetic, geometric):
    new_R = torch.zeros(100, dtype=torch.float64)
    new_R[40] = math.log(outlier)
    segments, one_S = Segments.from_lengths([100]), torch.ones(1, dtype=torch.float64)
    found = {
        name: reduced([PolicyObjective(VARIANTS[name], kl_coef=0.0)(new_R, 0 * new_R, one_S, segments).metrics])
        for name in ROWS
    }
    assert found["grpo"]["ratio/mean"] == pytest.approx(arithmetic, abs=1e-12)
    assert found["gspo"]["ratio/mean"] == pytest.approx(geometric, abs=1e-4)
    assert found["gspo_sum"]["ratio/mean"] == pytest.approx(found["gspo"]["ratio/mean"] ** 100)  # r = s^|y|


def test_gspo_clips_the_response_where_grpo_clips_a_token():
    """Mean log-ratio .0503, s = 1.0516: above 1 + 4e-4, so that no token learns; GRPO stops only the token at 1.30."""
    new_R = torch.tensor([1.30, 1.05, 0.98, 1.02, 0.90]).double().log()
    new_R[4] = 5 * 0.0503 - new_R[:4].sum()
    new_R.requires_grad_()
    segments, one_S = Segments.from_lengths([5]), torch.ones(1, dtype=torch.float64)
    old_R = torch.zeros(5, dtype=torch.float64)

    loss, metrics = PolicyObjective(VARIANTS["gspo"])(new_R, old_R, one_S, segments)
    assert reduced([metrics])["ratio/mean"] == pytest.approx(math.exp(0.0503), rel=1e-12)
    assert math.exp(0.0503) == pytest.approx(1.0516, abs=1e-4)
    assert reduced([metrics])["clip_fraction"] == 1
    assert gradients(loss, new_R)[0].count_nonzero() == 0
    assert loss.item() == pytest.approx(-1.0004)

    loss, metrics = PolicyObjective(VARIANTS["grpo"])(new_R, old_R, one_S, segments)
    assert reduced([metrics])["clip_fraction"] == pytest.approx(1 / 5)
    assert (gradients(loss, new_R)[0] == 0).tolist() == [True, False, False, False, False]


# --- a share of the update ---


@pytest.mark.parametrize("cut", [[9], [1, 2, 6], [2, 1, 3, 3]])  # [2, 1, ...]: a micro-batch of one empty response
@pytest.mark.parametrize("name", ROWS)
def test_micro_batches_add_up(name, cut):
    new_R, old_R, ref_R, entropy_R, advantages_S = batch(name)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.1, entropy_coef=0.1)

    def call(new_R, old_R, ref_R, entropy_R, advantages_S, lengths, **counts):
        return objective(
            new_R,
            old_R,
            advantages_S,
            Segments.from_lengths(lengths),
            ref_log_probs_T=ref_R,
            entropy_T=entropy_R,
            **counts,
        )

    whole = call(new_R, old_R, ref_R, entropy_R, advantages_S, LENGTHS)
    parts, first = [], 0
    for size in cut:
        chosen = slice(first, first + size)
        tokens = slice(sum(LENGTHS[:first]), sum(LENGTHS[: first + size]))
        packed = (x_R[tokens] for x_R in (new_R, old_R, ref_R, entropy_R))
        parts.append(call(*packed, advantages_S[chosen], LENGTHS[chosen], num_sequences=7, num_tokens=23))
        first += size
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss, **EXACT)
    torch.testing.assert_close(gradients(total, new_R, entropy_R), gradients(whole.loss, new_R, entropy_R), **EXACT)
    assert reduced([part.metrics for part in parts]) == pytest.approx(reduced([whole.metrics]), rel=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_empty_responses_count_nowhere(name):
    new_R, old_R, _, _, advantages_S = batch(name)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.0)
    empty_S = torch.tensor(LENGTHS) == 0
    with_empty = objective(new_R, old_R, torch.where(empty_S, math.nan, advantages_S), Segments.from_lengths(LENGTHS))
    without = objective(
        new_R, old_R, advantages_S[~empty_S], Segments.from_lengths([length for length in LENGTHS if length])
    )
    assert with_empty.loss.item() == without.loss.item()
    assert torch.equal(gradients(with_empty.loss, new_R)[0], gradients(without.loss, new_R)[0])
    assert reduced([with_empty.metrics]) == reduced([without.metrics])


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("name", ROWS)
def test_without_a_token_the_loss_is_zero_and_has_a_gradient(name, lengths):
    hidden = torch.ones(4, 3, requires_grad=True)
    none_R = hidden[:0].sum(dim=1)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.1, entropy_coef=0.1)
    for counts in ({}, {"num_sequences": 5, "num_tokens": 9}):
        loss, metrics = objective(
            none_R,
            none_R,
            torch.full((len(lengths),), math.nan),
            Segments.from_lengths(lengths),
            ref_log_probs_T=none_R,
            entropy_T=none_R,
            **counts,
        )
        assert loss.item() == 0
        assert gradients(loss, hidden)[0].count_nonzero() == 0
        assert loss.requires_grad
        assert metrics["ratio/mean"][:2] == (0, 0) and metrics["clip_fraction"][:2] == (0, 0)
        assert (metrics["ratio/min"].total, metrics["ratio/max"].total) == (math.inf, -math.inf)
    loss = LikelihoodObjective()(none_R, Segments.from_lengths(lengths)).loss
    assert loss.item() == 0 and loss.requires_grad


def test_likelihood_adds_up():
    log_probs_R = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_probs_R.requires_grad_()
    objective = LikelihoodObjective()
    whole = objective(log_probs_R, Segments.from_lengths([1, 5])).loss
    assert whole.item() == pytest.approx(-sum(log_probs_R.tolist()) / 6)
    parts = [
        objective(log_probs_R[tokens], Segments.from_lengths([length]), num_tokens=6).loss
        for tokens, length in ((slice(0, 1), 1), (slice(1, 6), 5))
    ]
    torch.testing.assert_close(sum(parts), whole, **EXACT)
    assert gradients(whole, log_probs_R)[0].tolist() == pytest.approx([-1 / 6] * 6)


# --- numbers at the edge ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PPO_ROWS)
def test_extreme_log_ratios(name, dtype):
    """A > 0 and A < 0, each with every token's log-ratio at +1000 and at -1000, beside a response that is fine."""
    lengths = [3, 3, 3, 3, 3]
    log_ratio_R = torch.tensor([1e3, 1e3, -1e3, -1e3, 0.0], dtype=dtype).repeat_interleave(3)
    new_R = log_ratio_R.clone().requires_grad_()
    advantages_S = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=dtype)
    objective = PolicyObjective(VARIANTS[name], kl_coef=0.0)
    loss, metrics = objective(new_R, torch.zeros_like(new_R), advantages_S, Segments.from_lengths(lengths))
    assert loss.dtype == dtype and torch.isfinite(loss)
    assert all(math.isfinite(value) for value in reduced([metrics]).values())

    oracle = oracles.find(oracles.ORACLES, name)
    said = oracle.share(3, 5, 15) * oracle.level.moves(3)
    share = {"gspo_sum": 1 / 5, **dict.fromkeys(("gspo", "gspo_token", "grpo", "dapo"), 1 / 15)}.get(name, said)
    # Clipped; pushed back at the cap; its ratio is 0; clipped; the policy gradient.
    expected = torch.tensor([0, math.exp(20) * share, 0, 0, -share], dtype=dtype).repeat_interleave(3)
    torch.testing.assert_close(gradients(loss, new_R)[0], expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_reference_a_thousand_nats_away_stays_finite_and_pulls(estimator):
    new_R = torch.zeros(4, requires_grad=True)
    ref_R = torch.tensor([1e3, 1e3, -1e3, -1e3])
    objective = PolicyObjective(VARIANTS["grpo"], kl_coef=1.0, kl_estimator=estimator)
    loss, metrics = objective(new_R, new_R, torch.zeros(2), Segments.from_lengths([2, 2]), ref_log_probs_T=ref_R)
    assert torch.isfinite(loss) and math.isfinite(reduced([metrics])["kl/ref"])
    slope = {"k1": (1, 1), "k2": (-1e3, 1e3), "k3": (1 - math.exp(20), 1)}[estimator]
    torch.testing.assert_close(gradients(loss, new_R)[0], torch.tensor(slope).repeat_interleave(2) / 4)


def test_float32_resolves_the_clip_band_of_the_paper():
    length = 4096
    old_R = -8 * torch.rand(length, generator=torch.Generator().manual_seed(0))
    for mean_log_ratio, clipped in ((3.9e-4, 0.0), (4.1e-4, 1.0)):
        new_R = (old_R + mean_log_ratio).requires_grad_()
        loss, metrics = PolicyObjective(VARIANTS["gspo"])(new_R, old_R, torch.ones(1), Segments.from_lengths([length]))
        assert loss.dtype == torch.float32
        assert reduced([metrics])["clip_fraction"] == clipped
        # Log-probs near 8 carry an error near 5e-7 in float32, relative to the log-ratio a thousandth.
        assert reduced([metrics])["kl/old"] == pytest.approx(mean_log_ratio**2 / 2, rel=1e-3)
        assert (gradients(loss, new_R)[0].abs().max() == 0) == bool(clipped)


def test_half_precision_is_raised_and_what_is_only_measured_cannot_spoil_the_loss():
    new_R = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    broken_R = torch.full((2,), math.nan)
    loss, _ = PolicyObjective(VARIANTS["gspo"])(
        new_R, new_R, torch.ones(1), Segments.from_lengths([2]), ref_log_probs_T=broken_R, entropy_T=broken_R
    )
    assert loss.dtype == torch.float32 and loss.item() == -1
    assert gradients(loss, new_R)[0].tolist() == [-0.5, -0.5]
