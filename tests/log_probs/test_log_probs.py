"""linear_log_probs against log_softmax of the full matrix, on one process and with a vocabulary split over several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.log_probs import blocks, linear_log_probs, vocab_parallel_logits
from gspo_megatron.testing.local_ranks import run_distributed

H = 8
VOCAB = 17
HALF_UNIT_BF16 = torch.finfo(torch.bfloat16).eps / 2 + 1e-5
"""Relative error of a number that was rounded to bf16 once."""


@pytest.fixture(autouse=True)
def odd_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that divide neither the rows nor the vocabulary of any test."""
    monkeypatch.setattr(blocks, "CPU_BLOCK", (3, 4))


@dataclass
class Case:
    hidden_NH: Tensor
    weight_VH: Tensor
    targets_N: Tensor
    d_log_probs_N: Tensor
    d_entropy_N: Tensor

    def oracle(self, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log-probs, entropies, gradient of hidden, gradient of weight) from the full float64 logits."""
        hidden_NH = self.hidden_NH.detach().double().clone().requires_grad_()
        weight_VH = self.weight_VH.detach().double().clone().requires_grad_()
        log_p_NV = torch.log_softmax(hidden_NH @ weight_VH.T / temperature, dim=-1)
        is_scored_N = self.targets_N != IGNORED
        y_N = self.targets_N.clamp(min=0)
        log_probs_N = log_p_NV.gather(1, y_N[:, None])[:, 0].where(is_scored_N, 0.0)
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1).where(is_scored_N, 0.0)
        loss = log_probs_N @ self.d_log_probs_N.double()
        if with_entropy:
            loss = loss + entropy_N @ self.d_entropy_N.double()
        gradients = torch.autograd.grad(loss, (hidden_NH, weight_VH))
        return log_probs_N.detach(), entropy_N.detach(), *gradients


def make_case(targets: list[int], dtype: torch.dtype = torch.float64, vocab_size: int = VOCAB) -> Case:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    num_rows = len(targets)
    return Case(normal(num_rows, H), normal(vocab_size, H), torch.tensor(targets), normal(num_rows), normal(num_rows))


def pad_columns(weight_VH: Tensor, num_columns: int) -> Tensor:
    """NaN in the padding: a column that took part in anything would show."""
    return torch.cat([weight_VH, weight_VH.new_full((num_columns - len(weight_VH), H), torch.nan)])


def run(
    case: Case, hidden_NH: Tensor, weight_VpH: Tensor, *, with_entropy: bool, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    hidden_NH, weight_VpH = hidden_NH.clone().requires_grad_(), weight_VpH.clone().requires_grad_()
    log_probs_N, entropy_N = linear_log_probs(
        hidden_NH, weight_VpH, case.targets_N, with_entropy=with_entropy, **options
    )
    loss = log_probs_N @ case.d_log_probs_N.to(log_probs_N.dtype)
    if entropy_N is not None:
        loss = loss + entropy_N @ case.d_entropy_N.to(log_probs_N.dtype)
    loss.backward()
    assert hidden_NH.grad is not None and weight_VpH.grad is not None
    return log_probs_N.detach(), None if entropy_N is None else entropy_N.detach(), hidden_NH.grad, weight_VpH.grad


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


TARGETS = {
    "mixed": [3, IGNORED, 0, 16, IGNORED, 5, 8, 9, IGNORED, 12, 16, IGNORED],
    "only the last row": [IGNORED] * 11 + [16],
    "none": [IGNORED] * 12,
    "all": [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 16],
}
"""12 rows each: 2 and 3 ranks divide them. "only the last row", a one-token response, leaves ranks without a row."""


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("temperature", "with_entropy"), [(1.0, False), (0.7, True)])
@pytest.mark.parametrize("num_columns", [VOCAB, 24])
def test_value_and_gradient_in_float64(
    targets: list[int], temperature: float, with_entropy: bool, num_columns: int
) -> None:
    case = make_case(targets)
    hidden_NH = case.hidden_NH.clone()
    hidden_NH[case.targets_N == IGNORED] = torch.nan
    log_probs_N, entropy_N, d_hidden_NH, d_weight_VpH = run(
        case,
        hidden_NH,
        pad_columns(case.weight_VH, num_columns),
        vocab_size=VOCAB,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    wanted = case.oracle(temperature, with_entropy)
    assert_near(log_probs_N, wanted[0])
    if with_entropy:
        assert_near(entropy_N, wanted[1])
    else:
        assert entropy_N is None
    assert_near(d_hidden_NH, wanted[2])
    assert_near(d_weight_VpH[:VOCAB], wanted[3])
    assert (d_weight_VpH[VOCAB:] == 0).all()
    assert (d_hidden_NH[case.targets_N == IGNORED] == 0).all()


def test_gradcheck() -> None:
    case = make_case([4, IGNORED, 2, 0], vocab_size=5)
    inputs = (case.hidden_NH.requires_grad_(), case.weight_VH.requires_grad_())
    torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, case.targets_N, temperature=1.3, with_entropy=True), inputs
    )


def test_gradient_of_the_entropy_alone() -> None:
    case = make_case(TARGETS["mixed"])
    case.d_log_probs_N.zero_()
    hidden_NH = case.hidden_NH.clone().requires_grad_()
    _, entropy_N = linear_log_probs(hidden_NH, case.weight_VH, case.targets_N, with_entropy=True)
    (entropy_N @ case.d_entropy_N).backward()
    assert_near(hidden_NH.grad, case.oracle(1.0, True)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_give_float32_results(dtype: torch.dtype) -> None:
    """The oracle sees the same inputs in float64, so what is measured is the arithmetic, not the inputs' rounding."""
    case = make_case(TARGETS["mixed"], dtype)
    case.hidden_NH *= 8  # logits near 100, where bf16 numbers lie 0.5 apart
    log_probs_N, entropy_N, d_hidden_NH, d_weight_VH = run(case, case.hidden_NH, case.weight_VH, with_entropy=True)
    wanted = case.oracle(1.0, True)
    assert log_probs_N.dtype == entropy_N.dtype == torch.float32
    assert_near(log_probs_N, wanted[0], 1e-5)
    assert_near(entropy_N, wanted[1], 1e-5)
    for got, exact in ((d_hidden_NH, wanted[2]), (d_weight_VH, wanted[3])):
        assert got.dtype == dtype
        tolerance = HALF_UNIT_BF16 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-4)


def test_an_almost_certain_token_keeps_its_digits() -> None:
    """z_y - lse would be a multiple of 1.2e-4 at logits near 1500: rounded to 0 here."""
    weight_VH = torch.zeros(VOCAB, 1)
    weight_VH[:, 0] = 1500.0
    weight_VH[6] = 1512.0
    log_probs_N, entropy_N = linear_log_probs(torch.ones(1, 1), weight_VH, torch.tensor([6]), with_entropy=True)
    log_p_V = torch.log_softmax(weight_VH[:, 0].double(), 0)
    torch.testing.assert_close(log_probs_N[0].double(), log_p_V[6], rtol=1e-3, atol=0)
    torch.testing.assert_close(entropy_N[0].double(), -(log_p_V.exp() * log_p_V).sum(), rtol=1e-3, atol=0)


def test_keeps_hidden_rows_and_never_logits() -> None:
    case = make_case([5] * 64)
    shapes: list[torch.Size] = []

    def save(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        with torch.no_grad():
            linear_log_probs(case.hidden_NH.requires_grad_(), case.weight_VH, case.targets_N, with_entropy=True)
        assert shapes == []
        linear_log_probs(case.hidden_NH, case.weight_VH, case.targets_N, with_entropy=True)
    assert shapes
    assert {shape for shape in shapes if len(shape) == 2} <= {(64, H), (VOCAB, H)}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (DataError, r"target 17 of row 2 .*\[0, 17\)", {"targets_N": torch.tensor([1, IGNORED, 17, 99])}),
        (DataError, r"target -1 of row 0 ", {"targets_N": torch.tensor([-1, 0, 0, 0])}),
        (DataError, r"target 16 of row 3 .*\[0, 16\)", {"vocab_size": 16, "targets_N": torch.tensor([0, 0, 0, 16])}),
        (ConfigError, r"vocab_size=18 must lie in \[1, 17\]", {"vocab_size": 18}),
        (ConfigError, "hidden has 4 rows, but 3 targets", {"targets_N": torch.tensor([0, 1, 2])}),
        (ConfigError, "float64 and weight torch.float32", {"weight_VpH": torch.zeros(VOCAB, H)}),
        (ConfigError, "hidden has 8 columns and weight 9", {"weight_VpH": torch.zeros(VOCAB, 9).double()}),
        (ConfigError, "temperature=0.0 must be positive", {"temperature": 0.0}),
        (ConfigError, "temperature=nan must be positive", {"temperature": float("nan")}),
        (ConfigError, "store_bytes=-1 must not be negative", {"store_bytes": -1}),
        (ConfigError, r"targets \(4, 1\) must have the shapes", {"targets_N": torch.zeros(4, 1, dtype=torch.int64)}),
        (ConfigError, r"hidden \(8,\) .* must have the shapes", {"hidden_NH": torch.zeros(H)}),
        (ConfigError, "torch.int64.* in a floating-point format", {"hidden_NH": torch.zeros(4, H, dtype=torch.int64)}),
        (ConfigError, "backend='numpy' is not one of auto, torch, triton", {"backend": "numpy"}),
    ],
)
def test_refuses(error: type[ValueError], message: str, change: dict[str, Any]) -> None:
    case = make_case([0, 1, 2, 3])
    arguments = {"hidden_NH": case.hidden_NH, "weight_VpH": case.weight_VH, "targets_N": case.targets_N} | change
    with pytest.raises(error, match=message):
        linear_log_probs(**arguments)


class Collectives(TorchDispatchMode):
    """Counts what reaches the process group, by whatever Python function it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.count[func._opname.strip("_").removesuffix("_base")] += 1
        return func(*args, **(kwargs or {}))


def expected_collectives(targets: list[int], size: int, sequence_parallel: bool, validate: bool) -> Counter[str]:
    """Forward: the statistics of all rows at once, and the hidden rows under sequence parallel. Backward: one for each
    chunk, of 3 rows or 3 // size of every rank."""
    scored = [[y != IGNORED for y in targets[r * 12 // size : (r + 1) * 12 // size]] for r in range(size)]
    if size == 1 or not any(map(any, scored)):
        return Counter(allgather=int(validate and size > 1))
    if sequence_parallel:
        return Counter(allgather=2 + validate, reduce_scatter=-(-max(map(sum, scored)) // max(1, 3 // size)))
    return Counter(allgather=1 + validate, allreduce=-(-sum(map(sum, scored)) // 3))


def check_every_layout(num_columns: int) -> list[Tensor]:
    """On every rank. Returns all float32 log-probs and entropies, to be compared bit by bit between the ranks."""
    blocks.CPU_BLOCK = (3, 4)
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    shard = slice(rank * num_columns, (rank + 1) * num_columns)
    seen = []
    for targets, sequence_parallel, (temperature, with_entropy), validate in product(
        TARGETS.values(), [False, True], [(1.0, False), (0.7, True)], [True, False]
    ):
        case = make_case(targets)
        weight_VpH = pad_columns(case.weight_VH, size * num_columns)[shard]
        rows = slice(rank * 12 // size, (rank + 1) * 12 // size) if sequence_parallel else slice(None)
        options = {
            "temperature": temperature,
            "with_entropy": with_entropy,
            "group": group,
            "sequence_parallel": sequence_parallel,
            "vocab_size": VOCAB,
            "validate": validate,
            "store_bytes": 200 * (not validate),
        }
        with Collectives() as collectives:
            log_probs_N, entropy_N, d_hidden_NH, d_weight_VpH = run(case, case.hidden_NH[rows], weight_VpH, **options)
        wanted = case.oracle(temperature, with_entropy)
        assert_near(log_probs_N, wanted[0])
        if entropy_N is not None:
            assert_near(entropy_N, wanted[1])
        assert_near(d_hidden_NH, wanted[2][rows])
        own_ids = slice(rank * num_columns, min((rank + 1) * num_columns, VOCAB))
        num_own = len(wanted[3][own_ids])
        assert_near(d_weight_VpH[:num_own], wanted[3][own_ids])
        assert (d_weight_VpH[num_own:] == 0).all()

        assert collectives.count == expected_collectives(targets, size, sequence_parallel, validate)

        single = linear_log_probs(case.hidden_NH[rows].float(), weight_VpH.float(), case.targets_N, **options)
        seen += [x.detach() for x in single if x is not None]
    return seen


def check_gradients_are_rounded_once(num_columns: int) -> None:
    """A sum of bf16 shards would be off by more than half a unit in the last place."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = make_case(TARGETS["all"], torch.bfloat16)
    wanted = case.oracle(1.0, False)[2]
    weight_VpH = pad_columns(case.weight_VH, size * num_columns)[rank * num_columns : (rank + 1) * num_columns]
    for sequence_parallel in (False, True):
        rows = slice(rank * 12 // size, (rank + 1) * 12 // size) if sequence_parallel else slice(None)
        options = {"group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "vocab_size": VOCAB}
        d_hidden_NH = run(case, case.hidden_NH[rows], weight_VpH, with_entropy=False, **options)[2]
        torch.testing.assert_close(d_hidden_NH.double(), wanted[rows], rtol=HALF_UNIT_BF16, atol=1e-5)


def check_errors_and_logits(num_columns: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    case = make_case(TARGETS["all"])
    weight_VpH = pad_columns(case.weight_VH, size * num_columns)[rank * num_columns : (rank + 1) * num_columns]
    logits_NV = vocab_parallel_logits(case.hidden_NH, weight_VpH, group=dist.group.WORLD, vocab_size=VOCAB)
    assert_near(logits_NV, case.hidden_NH @ case.weight_VH.T)

    options = {"group": dist.group.WORLD, "vocab_size": VOCAB}

    def refused(error: type[Exception], message: str, targets_N: Tensor = case.targets_N, **arguments: Any) -> None:
        given = {"hidden_NH": case.hidden_NH, "weight_VpH": weight_VpH} | options | arguments
        with pytest.raises(error, match=message):
            linear_log_probs(targets_N=targets_N, **given)

    too_high = torch.tensor([*TARGETS["all"][:-1], 17])
    refused(DataError, "target 17 of row 11 ", too_high)
    if size == 1:
        return
    refused(
        ConfigError,
        f"7 rows do not divide evenly over {size} .* multiple of {size} rows",
        too_high[:7],
        sequence_parallel=True,
    )
    # What is wrong on the last rank alone is an error on all of them.
    is_last = rank == size - 1
    message = "target 17 of row 11 " if is_last else f"rank {size - 1} of the {size} that share the vocabulary rejected"
    refused(DataError, message, too_high if is_last else case.targets_N)
    num_rows = 12 - size * is_last
    refused(
        DataError,
        r"the number of rows differs between the \d ranks .*: \[12, ",
        case.targets_N[:num_rows],
        hidden_NH=case.hidden_NH[:num_rows],
    )
    refused(
        DataError,
        "the number of scored rows differs",
        torch.full((12,), IGNORED) if is_last else case.targets_N,
    )
    refused(DataError, r"the sum of row \* target differs", case.targets_N.flip(0) if is_last else case.targets_N)
    share = slice(rank * 12 // size, (rank + 1) * 12 // size)
    for value in (torch.nan, torch.inf):
        broken_NH = case.hidden_NH.clone()
        broken_NH[10, 3] = value
        message = "row 10: its hidden state is not finite .* as in 1 of 12 scored rows"
        refused(DataError, message, hidden_NH=broken_NH)
        refused(DataError, message, hidden_NH=broken_NH[share], sequence_parallel=True)
    broken_VpH = weight_VpH.clone()
    broken_VpH[: 17 - rank * num_columns] = torch.nan
    message = "row 0: its logits are not finite, though its hidden state is .* as in 12 of 12 .* vocabulary matrix"
    refused(DataError, message, weight_VpH=broken_VpH if rank == 0 else weight_VpH)


def check_rank(num_columns: int) -> list[Tensor]:
    check_errors_and_logits(num_columns)
    check_gradients_are_rounded_once(num_columns)
    return check_every_layout(num_columns)


@pytest.mark.parametrize(("world_size", "num_columns"), [(1, 20), (2, 10), (3, 9), (3, 6)])
def test_vocabulary_over_ranks(world_size: int, num_columns: int) -> None:
    """17 ids on 2 x 10 and 3 x 6 columns; on 3 x 9 the last rank holds nothing but padding."""
    first, *others = run_distributed(check_rank, world_size, num_columns)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_logits_of_one_shard() -> None:
    case = make_case(TARGETS["all"], torch.bfloat16)
    logits_NV = vocab_parallel_logits(case.hidden_NH, pad_columns(case.weight_VH, 20), vocab_size=VOCAB)
    assert logits_NV.dtype == torch.float32
    assert_near(logits_NV, case.hidden_NH.double() @ case.weight_VH.double().T, 1e-5)


class Products(TorchDispatchMode):
    """(dtypes of the factors, dtype of the result) of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.add((args[0].dtype, args[1].dtype, out.dtype))
        return out


@pytest.mark.skipif("dtype" not in torch.ops.aten.mm.overloads(), reason="torch < 2.8 has no widening product")
def test_accelerators_multiply_bf16_into_float32() -> None:
    """The meta device takes the accelerator's branch and computes dtypes and shapes only."""
    hidden_NH = torch.empty(4, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight_VH = torch.empty(VOCAB, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Products() as products:
        log_probs_N, _ = linear_log_probs(
            hidden_NH,
            weight_VH,
            torch.tensor([1, IGNORED, 2, 3]),
            backend="torch",
            validate=False,
            skip_zero_rows=False,
        )
        log_probs_N.sum().backward()
    assert products.seen == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert hidden_NH.grad is not None and hidden_NH.grad.dtype == torch.bfloat16
