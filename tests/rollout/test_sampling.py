from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.rollout.native.sampling import Decoding, _cumulative, next_tokens, uniforms
from gspo_megatron.rollout.native.sampling import distribution as distribution_of

GOLDEN = {
    (0, 0, 0): 0.9045419551356693,
    (1, 0, 0): 0.47694441081590555,
    (1, 0, 1): 0.20596723503359726,
    (1, 1, 0): 0.22584231368238583,
    (123456789, 98765, 4321): 0.5979977191935854,
}
ALMOST_ONE = 1 - 2**-53


def grid(seed: int, num_ids: int, num_positions: int, first_id: int = 0) -> NDArray[np.float64]:
    """u[id, position]."""
    ids, positions = np.meshgrid(first_id + np.arange(num_ids), np.arange(num_positions), indexing="ij")
    return uniforms(seed, ids.ravel(), positions.ravel()).reshape(num_ids, num_positions)


# --- the random numbers ---


def test_the_numbers_are_what_they_have_always_been() -> None:
    """A change here changes every run that was ever seeded."""
    for (seed, rollout_id, position), expected in GOLDEN.items():
        (u,) = uniforms(seed, np.array([rollout_id]), np.array([position]))
        assert u == expected, (seed, rollout_id, position, float(u))


def test_a_number_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    whole = grid(7, 50, 20)
    order = np.random.default_rng(0).permutation(1000)
    shuffled = uniforms(7, order // 20, order % 20)
    assert np.array_equal(shuffled, whole.ravel()[order])
    assert np.array_equal(
        np.concatenate([uniforms(7, np.array([i // 20]), np.array([i % 20])) for i in order[:50]]), shuffled[:50]
    )
    assert uniforms(7, np.array([], dtype=np.int64), np.array([], dtype=np.int64)).shape == (0,)


def test_the_numbers_lie_in_the_half_open_unit_interval_and_never_repeat() -> None:
    u = np.concatenate([grid(seed, 300, 100).ravel() for seed in (0, 1, 2, 2**31, 2**62)])
    assert u.dtype == np.float64
    assert u.min() >= 0 and u.max() < 1
    assert len(np.unique(u)) == len(u)
    assert not np.any(np.isin(grid(1, 300, 100), grid(2, 300, 100)))


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("first_id", [0, 10**9])
def test_the_numbers_are_uniform_and_uncorrelated(seed: int, first_id: int) -> None:
    """Each bound is beyond 4.5 standard deviations of what true randomness would show."""
    u = grid(seed, 400, 250, first_id)
    n = u.size
    assert abs(u.mean() - 1 / 2) < 4.5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / n)
    observed = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((observed - n / 100) ** 2 / (n / 100)).sum()
    assert abs(chi_square - 99) < 4.5 * math.sqrt(2 * 99)

    def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    beside = {
        "next position": (u[:, :-1], u[:, 1:]),
        "next rollout": (u[:-1], u[1:]),
        "one on, one back": (u[:-1, 1:], u[1:, :-1]),
        "next seed": (u, grid(seed + 1, 400, 250, first_id)),
        "id and position exchanged": (u[:250, :250], u[:250, :250].T),
    }
    for name, (a, b) in beside.items():
        if name != "id and position exchanged" or first_id == 0:
            assert abs(correlation(a, b)) < 5 / math.sqrt(a.size), name


def test_the_low_bits_are_as_good_as_the_high_ones() -> None:
    bits = (grid(3, 200, 100) * 2**53).astype(np.uint64)
    for k in range(53):
        ones = int((bits >> np.uint64(k) & np.uint64(1)).sum())
        assert abs(ones - 10_000) < 5 * math.sqrt(20_000) / 2, k


# --- the tokens ---


def spread_uniforms(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def draw(logits_V: list[float], n: int, how: Decoding, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(share of each token [V], log-probs [n]) over n evenly spread uniforms."""
    logits_BV = torch.tensor(logits_V, dtype=dtype).expand(n, -1)
    tokens_B, log_probs_B = next_tokens(logits_BV, spread_uniforms(n), how)
    return torch.bincount(tokens_B, minlength=len(logits_V)) / n, log_probs_B


def distribution(logits_V: list[float], how: Decoding) -> list[float]:
    """The probabilities that `next_tokens` documents, by plain loops."""
    weights = [math.exp(z / how.temperature) for z in logits_V]
    p = [w / sum(weights) for w in weights]
    ranked = sorted(range(len(p)), key=lambda v: (-p[v], v))
    if how.top_k:
        ranked = ranked[: how.top_k]
    within = sum(p[v] for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:
        if mass >= how.top_p:
            break
        kept.append(v)
        mass += p[v] / within
    total = sum(p[v] for v in kept)
    return [p[v] / total if v in kept else 0.0 for v in range(len(p))]


LOGITS = [0.3, -1.2, 2.0, 0.9, -0.4, 1.1, -3.0]

WAYS = [
    Decoding(),
    Decoding(temperature=0.5),
    Decoding(temperature=3.0),
    Decoding(top_k=1),
    Decoding(top_k=3),
    Decoding(top_k=7),
    Decoding(top_k=99),
    Decoding(top_p=0.05),
    Decoding(top_p=0.6),
    Decoding(top_p=0.95),
    Decoding(top_k=3, top_p=0.8),
    Decoding(temperature=1.5, top_k=5, top_p=0.8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_tokens_come_with_their_probabilities(how: Decoding, dtype: torch.dtype) -> None:
    """20,000 evenly spread uniforms hit each token as often as its probability says, to one in 20,000."""
    n = 20_000
    expected = torch.tensor(distribution(LOGITS, how), dtype=torch.float64)
    shares, log_probs_B = draw(LOGITS, n, how, dtype)
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1.5 / n)
    assert torch.equal(shares > 0, expected > 0)
    assert log_probs_B.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_log_prob_is_that_of_the_distribution_drawn_from(how: Decoding, dtype: torch.dtype) -> None:
    logits_BV = torch.tensor(LOGITS, dtype=dtype).expand(500, -1)
    tokens_B, log_probs_B = next_tokens(logits_BV, spread_uniforms(500), how)
    expected = torch.tensor(distribution(LOGITS, how), dtype=torch.float64).log()[tokens_B]
    torch.testing.assert_close(log_probs_B.double(), expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-13)


def test_drawing_with_the_runs_own_random_numbers() -> None:
    n = 20_000
    u_B = torch.from_numpy(uniforms(5, np.arange(n), np.zeros(n, dtype=np.int64)))
    tokens_B, _ = next_tokens(torch.tensor(LOGITS, dtype=torch.float64).expand(n, -1), u_B, Decoding())
    for token, p in enumerate(distribution(LOGITS, Decoding())):
        assert abs(int((tokens_B == token).sum()) - n * p) < 4.5 * math.sqrt(n * p * (1 - p))


def test_rows_are_drawn_each_from_its_own_logits() -> None:
    logits_BV = torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u_B = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for how in WAYS:
        together = next_tokens(logits_BV, u_B, how)
        apart = [next_tokens(logits_BV[b : b + 1], u_B[b : b + 1], how) for b in range(40)]
        assert together[0].tolist() == [int(tokens) for tokens, _ in apart]
        torch.testing.assert_close(together[1], torch.cat([log_probs for _, log_probs in apart]))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_greedy_takes_the_likeliest_and_the_first_among_equals(temperature: float) -> None:
    how = Decoding(temperature=temperature, top_k=1, top_p=0.1, greedy=True)
    logits_BV = torch.tensor([LOGITS, [1.0, 5.0, 5.0, -1.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    tokens_B, log_probs_B = next_tokens(logits_BV, torch.tensor([0.9, ALMOST_ONE], dtype=torch.float64), how)
    assert tokens_B.tolist() == [2, 1]
    expected = [
        math.log(distribution(row, Decoding(temperature))[t]) for row, t in zip(logits_BV.tolist(), [2, 1], strict=True)
    ]
    assert log_probs_B.tolist() == pytest.approx(expected)


def test_equal_logits_are_cut_from_the_high_ids() -> None:
    size = 4096
    for how, kept in ((Decoding(top_k=3), 3), (Decoding(top_p=0.25), size // 4)):
        tokens_B, _ = next_tokens(torch.ones(48, size), spread_uniforms(48), how)
        assert tokens_B.tolist() == [int(u * kept) for u in spread_uniforms(48).tolist()], how


@pytest.mark.parametrize("u", [0.0, 2**-53, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("how", [Decoding(), Decoding(top_k=2), Decoding(top_p=0.7), Decoding(greedy=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(u: float, how: Decoding, dtype: torch.dtype) -> None:
    """Such tokens at the head, in the midst and at the tail; the last row has one token left."""
    no = -math.inf
    rows = [[no, no, 0.1, no, 2.0, 1.0, no], [no, 0.3, 0.3, no, 0.3, no, no], [no, no, no, 3.0, no, no, no]]
    # Many rows of random logits, so that cumulative sums end a little below and a little above 1.
    random = torch.randn(300, 7, generator=torch.Generator().manual_seed(4), dtype=dtype) * 5
    random[:, [0, 3, 6]] = no
    logits_BV = torch.cat([torch.tensor(rows, dtype=dtype), random])
    tokens_B, log_probs_B = next_tokens(logits_BV, torch.full((len(logits_BV),), u, dtype=torch.float64), how)
    assert bool(logits_BV.gather(1, tokens_B[:, None]).isfinite().all())
    assert bool(log_probs_B.isfinite().all())
    assert int(tokens_B[2]) == 3 and float(log_probs_B[2]) == 0


def test_a_large_vocabulary_keeps_its_rare_tokens() -> None:
    """One token in 151,936 has half of the mass; the others share the rest evenly, down to the last id."""
    size = 151_936
    logits_V = torch.zeros(size)
    logits_V[7] = math.log(size - 1)
    u_B = torch.tensor([0.0, 0.25, ALMOST_ONE], dtype=torch.float64)
    tokens_B, log_probs_B = next_tokens(logits_V.expand(3, -1), u_B, Decoding())
    assert tokens_B.tolist() == [0, 7, size - 1]
    rare = -math.log(2 * (size - 1))
    assert log_probs_B.tolist() == pytest.approx([rare, -math.log(2), rare], abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_the_largest_random_number_draws_a_token_that_has_probability(size: int) -> None:
    """The last tokens have none; rounding must not reach them."""
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(size))
    logits = torch.cat([logits, torch.full((64, 5), -torch.inf)], dim=1)
    tokens, log_probs = next_tokens(logits, torch.full((64,), 1 - 2.0**-53, dtype=torch.float64), Decoding())
    assert (tokens < size).all() and log_probs.isfinite().all()


def test_cumulative_sums_do_not_depend_on_how_they_are_added() -> None:
    """What a GPU's scan, which adds in another order each time, gives for whole numbers."""
    probabilities = torch.rand(3, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    units = (probabilities * 2**50).long()
    by_halves = torch.cat([units[:, :2048].cumsum(-1), units[:, 2048:].cumsum(-1) + units[:, :2048].sum(-1, True)], 1)
    assert torch.equal(_cumulative(probabilities), by_halves)


@pytest.mark.parametrize(
    "how", [Decoding(top_k=3), Decoding(top_p=0.3), Decoding(top_p=0.95), Decoding(top_k=40, top_p=0.8)], ids=str
)
@pytest.mark.parametrize("ties", [False, True])
def test_transformers_keeps_the_same_ids(how: Decoding, ties: bool) -> None:
    """Of ids with equal logits at the edge, transformers' top-k keeps all and its top-p some; here the lowest are kept,
    and there are never more than k."""
    warpers = pytest.importorskip("transformers").generation.logits_process
    logits = 2 * torch.randn(50, 200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = logits.round() if ties else logits
    theirs = logits
    if how.top_k:
        theirs = warpers.TopKLogitsWarper(how.top_k)(None, theirs)
    if how.top_p < 1:
        theirs = warpers.TopPLogitsWarper(how.top_p)(None, theirs)
    ours, theirs = distribution_of(logits, how) > -torch.inf, theirs > -torch.inf
    if not ties:
        assert torch.equal(ours, theirs)
    else:
        values = [logits.masked_fill(~kept, torch.inf).amin(1) for kept in (ours, theirs)]
        if not (how.top_k and how.top_p < 1):  # else their mass is that of more ids
            assert torch.equal(*values), "the same edge"
        least = values[0][:, None]
        assert ours[logits > least].all(), "all above the edge"
        at_edge = logits == least
        lowest_first = (at_edge & ~ours).cumsum(1)[at_edge & ours]
        assert not lowest_first.any(), "of those at the edge, the lowest ids"
        assert not how.top_k or int(ours.sum(1).max()) <= how.top_k


@pytest.mark.parametrize(("above", "kept"), [(-1e-9, 2), (1e-9, 3)])
def test_the_mass_of_top_p_is_added_in_float64(above: float, kept: int) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    _, log_prob = next_tokens(logits, torch.zeros(1, dtype=torch.float64), Decoding(top_p=0.8 + above))
    assert log_prob.exp().item() == pytest.approx(0.5 / (0.8, 0.9)[kept - 2])
