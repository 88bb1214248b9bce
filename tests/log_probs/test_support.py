"""Log-probs among the ids that a row keeps, against log_softmax of float64 logits with -inf elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.log_probs import blocks, linear_log_probs
from gspo_megatron.testing.local_ranks import run_distributed
from tests.log_probs.test_log_probs import TARGETS, VOCAB, Case, assert_near, make_case, pad_columns, run


@pytest.fixture(autouse=True)
def odd_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", (3, 4))


def kept_ids(case: Case) -> Tensor:
    """[N, V] bool: few ids for most rows, the target alone for one and all for another. Most blocks have none of a
    row's ids, and some rows have ids on one rank only."""
    draws = torch.Generator().manual_seed(3)
    kept_NV = torch.rand(len(case.targets_N), VOCAB, generator=draws) < 0.15
    scored = (case.targets_N != IGNORED).nonzero().flatten()
    kept_NV[scored[:1]], kept_NV[scored[1:2]] = False, True
    kept_NV[scored, case.targets_N[scored]] = True
    return kept_NV


def ragged(case: Case) -> Ragged:
    rows = zip(case.targets_N.tolist(), kept_ids(case), strict=True)
    return Ragged.of([kept_V.nonzero().flatten().tolist() for target, kept_V in rows if target != IGNORED])


def oracle(case: Case, temperature: float, with_entropy: bool) -> list[Tensor]:
    """[log-probs, entropies, gradient of hidden, gradient of weight]."""
    hidden_NH = case.hidden_NH.detach().double().requires_grad_()
    weight_VH = case.weight_VH.detach().double().requires_grad_()
    kept_NV, is_scored_N = kept_ids(case), case.targets_N != IGNORED
    z_NV = (hidden_NH @ weight_VH.T / temperature).masked_fill(~kept_NV, -torch.inf)
    log_p_NV = z_NV[is_scored_N].log_softmax(1)
    log_probs_n = log_p_NV.gather(1, case.targets_N[is_scored_N][:, None])[:, 0]
    entropy_n = torch.special.entr(log_p_NV.exp()).sum(1)
    loss = log_probs_n @ case.d_log_probs_N[is_scored_N].double()
    if with_entropy:
        # p log p without a NaN in its gradient where p is 0.
        of_kept = torch.where(kept_NV[is_scored_N], log_p_NV, 0.0)
        loss = loss - (of_kept.exp() * of_kept).sum(1) @ case.d_entropy_N[is_scored_N].double()
    gradients = torch.autograd.grad(loss, (hidden_NH, weight_VH))
    values = [torch.zeros(len(is_scored_N), dtype=torch.float64) for _ in range(2)]
    values[0][is_scored_N], values[1][is_scored_N] = log_probs_n.detach(), entropy_n.detach()
    return [*values, *gradients]


@pytest.mark.parametrize("targets", ["mixed", "only the last row", "all"])
@pytest.mark.parametrize(
    ("temperature", "with_entropy", "store_bytes"),
    [(1.0, False, 0), (0.7, True, 0), (0.7, False, 300), (1.0, False, 1 << 20)],
)
def test_value_and_gradient_in_float64(targets: str, temperature: float, with_entropy: bool, store_bytes: int) -> None:
    case = make_case(TARGETS[targets])
    case.d_log_probs_N[3] = 0  # a row that the backward leaves out
    weight = pad_columns(case.weight_VH, 24)
    found = run(
        case,
        case.hidden_NH,
        weight,
        with_entropy=with_entropy,
        temperature=temperature,
        vocab_size=VOCAB,
        kept_ids=ragged(case),
        store_bytes=store_bytes,
    )
    log_probs, entropy, d_hidden, d_weight = oracle(case, temperature, with_entropy)
    assert_near(found[0], log_probs)
    assert_near(found[2], d_hidden)
    assert_near(found[3][:VOCAB], d_weight)
    assert not found[3][VOCAB:].any()
    if found[1] is not None:
        assert_near(found[1], entropy)


def sharded(rank_targets: dict[str, list[int]]) -> dict[str, list[Tensor]]:
    """Of this rank: log-probs, entropies, its rows of the hidden gradient, its shard of the weight's."""
    blocks.CPU_BLOCK = (3, 4)
    rank, found = dist.get_rank(), {}
    for name, targets in rank_targets.items():
        case = make_case(targets)
        weight = pad_columns(case.weight_VH, 24).chunk(2)[rank]
        how: dict[str, Any] = {"with_entropy": name != "all", "store_bytes": 200, "vocab_size": VOCAB}
        hidden = case.hidden_NH.chunk(2)[rank]
        support = ragged(case)
        found[name] = run(case, hidden, weight, group=dist.group.WORLD, sequence_parallel=True, kept_ids=support, **how)
    return found


def test_on_two_shards_of_the_vocabulary() -> None:
    ranks = run_distributed(sharded, 2, TARGETS)
    for name, targets in TARGETS.items():
        case = make_case(targets)
        (log_probs, entropy, d_hidden, d_weight), (again, _, d_hidden_1, d_weight_1) = (rank[name] for rank in ranks)
        wanted = oracle(case, 1.0, name != "all")
        assert torch.equal(log_probs, again)
        assert_near(log_probs, wanted[0])
        assert entropy is None or assert_near(entropy, wanted[1]) is None
        assert_near(torch.cat([d_hidden, d_hidden_1]), wanted[2])
        assert_near(torch.cat([d_weight, d_weight_1])[:VOCAB], wanted[3])


def test_a_second_backward_finds_what_the_first_used() -> None:
    case = make_case(TARGETS["mixed"])
    weight_VH = case.weight_VH.requires_grad_()
    log_probs_N, _ = linear_log_probs(case.hidden_NH, weight_VH, case.targets_N, kept_ids=ragged(case))
    first, second = (torch.autograd.grad(log_probs_N.sum(), weight_VH, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_formats(dtype: torch.dtype) -> None:
    """Nothing overflows on the way, not even where a block has no id of a row."""
    case = make_case(TARGETS["mixed"], dtype)
    found = run(case, case.hidden_NH, case.weight_VH, with_entropy=True, kept_ids=ragged(case))
    for x, wanted in zip(found, oracle(case, 1.0, True), strict=True):
        assert_near(x, wanted, 2e-5 if dtype == torch.float32 or x.dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda lists: lists[:-1], ConfigError, "kept_ids has 7 lists of ids for 8 scored rows"),
        (lambda lists: [[*lists[0], VOCAB], *lists[1:]], DataError, "kept_ids has the id 17, which is not in [0, 17)"),
        (lambda lists: [*lists[:2], [3], *lists[3:]], DataError, "target 16 of row 3 is not among the ids"),
        (lambda lists: [*lists[:2], [], *lists[3:]], DataError, "target 16 of row 3 is not among the ids"),
    ],
)
def test_ids_that_cannot_be_are_refused(change: Any, error: type[Exception], words: str) -> None:
    case = make_case(TARGETS["mixed"])
    with pytest.raises(error) as raised:
        run(case, case.hidden_NH, case.weight_VH, with_entropy=False, kept_ids=Ragged.of(change(ragged(case).tolist())))
    assert words in str(raised.value)


def test_lists_are_indexed_and_joined_as_rows_are() -> None:
    lists = [[3, 1], [], [7], [2, 2, 9], []]
    r = Ragged.of(lists)
    assert r.tolist() == lists and len(r) == 5
    assert r[torch.tensor([3, 0, 3])].tolist() == [[2, 2, 9], [3, 1], [2, 2, 9]]
    assert r[torch.tensor([False, True, True, False, True])].tolist() == [[], [7], []]
    assert r[1:3].tolist() == [[], [7]] and r[torch.empty(0, dtype=torch.int64)].tolist() == []
    assert [one.tolist() for one in r.each()] == [[x] for x in lists]
    assert not list(r[:0].each())
    assert Ragged.join([r[3:], r[:1]]).tolist() == [[2, 2, 9], [], [3, 1]]
    assert r.lacks(torch.tensor([1, 0, 7, 3, 0])).tolist() == [False, True, False, True, True]
