"""Recorded experts: the same on every layout, used where replayed, and no difference where nothing has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import NO_EXPERT, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms, merge, on_host, values
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.layout.layout import Layout, packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.routing import Choice, Recording
from gspo_megatron.run.stages import PolicyLoss, reduced
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_spans import named_parameters_of, open_policy, sequences
from tests.support import oracles

LAYERS, EXPERTS, CHOSEN = 4, 4, 2
REPLAY = ("algorithm.routing_replay=R2",)
LAYOUTS = {
    "one process": (1, ()),
    "recompute": (1, ("parallel.recompute=full",)),
    "dp2 ep2 allgather": (2, ("parallel.ep=2", "parallel.token_dispatcher=allgather")),
    "tp2 etp2": (2, ("parallel.tp=2", "parallel.etp=2")),
    "pp2 vpp2 recompute": (2, ("parallel.pp=2", "parallel.vpp=2", "parallel.recompute=full")),
    "tp2 cp2 ep2": (4, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=2")),
}


def drawn_experts(sequence: int, length: int) -> Tensor:
    """[length, LAYERS, CHOSEN]: experts that no router would choose all the time."""
    draws = torch.Generator().manual_seed(100 + sequence)
    return torch.rand(length, LAYERS, EXPERTS, generator=draws).argsort(dim=2)[..., :CHOSEN].to(torch.int8)


def batch_of(policy: MegatronPolicy, made: list[Sequence]) -> tuple[UpdateBatch, StepState]:
    ranks = policy.groups
    share = {"dp_rank": ranks.dp_rank, "dp_size": ranks.dp_size, "cp_rank": ranks.cp_rank, "cp_size": ranks.cp_size}
    micro_batches = pack(made, pad_id=0, max_tokens=48, rules=packing_rules(policy.config), **share)
    counts = [s.num_trained for s in made if s.num_trained]
    batch = UpdateBatch(micro_batches, len(counts), sum(counts))
    return batch, StepState(1, [], made, [list(range(len(made)))], [batch])


class Result(NamedTuple):
    """Of a rank."""

    recording_changes: bool
    """The log-probs of the pass that records."""
    replay_changes: int
    """Gradients that differ from those without replay, before anything has changed."""
    drift: dict[str, float]
    recorded: list[Tensor]
    """Of each sequence."""
    forced: tuple[float, list[tuple[Any, Tensor]]]
    """Loss and slices of gradients with `drawn_experts`."""
    drift_of_forced: dict[str, float]
    router_gradients: list[float]
    """Largest element, with `drawn_experts`."""


def replayed(world_size: int, settings: tuple[str, ...]) -> Result:
    policy, algorithm = open_policy(world_size, "algorithm.kl_coef=0", *REPLAY, *settings)
    loss = PolicyLoss(algorithm.objective, policy.groups, False)

    def update(batch: UpdateBatch) -> tuple[dict[str, float], list[tuple[Any, Tensor]]]:
        metrics = on_host(policy.update(batch, loss, lr=0.0))
        gradients = [(place, gradient.clone()) for place, gradient in policy.gradients()]
        return values(merge(policy.groups.gather([metrics]))), gradients

    batch, step = batch_of(policy, sequences())
    plain = policy.log_probs(batch.micro_batches)
    _, without = update(batch)
    recorded = policy.log_probs(batch.micro_batches, as_old=True)
    metrics, replay = update(batch)
    step.collect_columns(policy.groups)

    made = sequences()
    for i, sequence in enumerate(made):
        sequence.columns["routed_experts"] = drawn_experts(i, len(sequence))
    forced_metrics, forced = update(batch_of(policy, made)[0])
    return Result(
        recording_changes=not all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True)),
        replay_changes=sum(not torch.equal(a, b) for (_, a), (_, b) in zip(without, replay, strict=True)),
        drift={k: v for k, v in metrics.items() if "changed" in k},
        recorded=[s.columns["routed_experts"] for s in step.sequences],
        forced=(forced_metrics["loss"], forced),
        drift_of_forced={k: v for k, v in forced_metrics.items() if "changed" in k},
        router_gradients=[float(g.abs().max()) for place, g in forced if "router" in place.name],
    )


class Forced:
    """`Routing` of one whole sequence on one process."""

    def __init__(self, experts_TLk: Tensor) -> None:
        self.experts_TLk = experts_TLk.long()

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        experts_Tk = self.experts_TLk[:, layer]
        return scores_TE.gather(1, experts_Tk), experts_Tk


def by_hand() -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by name) with `drawn_experts`, one sequence after the other."""
    policy, _ = open_policy(1, *REPLAY)
    [model] = policy.model
    new, made = [], sequences()
    for i, s in enumerate(made):
        length = len(s)
        routing = Forced(drawn_experts(i, length))
        tokens = packed(torch.arange(length), torch.tensor([0, length]), length, routing=routing)
        hidden = model(s.tokens, tokens).squeeze(1)
        log_probs = (hidden @ model.head_weight().T)[:, :13].log_softmax(dim=-1)
        new.append([log_probs[t - 1, s.tokens[t]] for t in range(length) if s.trained[t]])
    stacked = [torch.stack(y) if y else torch.empty(0) for y in new]
    old = [s.columns["old_log_probs"] for s in made]
    loss = oracles.policy_loss("gspo", stacked, old, [s.advantage for s in made])
    names, parameters = zip(*((place.name, p) for place, p in named_parameters_of(policy)), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    return run_distributed(by_hand, 1)[0]


@pytest.fixture(scope="module")
def of_one_process() -> Result:
    return run_distributed(replayed, 1, 1, ())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_every_layout(layout: str, expected: tuple[float, dict[str, Tensor]], of_one_process: Result) -> None:
    world_size, settings = LAYOUTS[layout]
    results = run_distributed(replayed, world_size, world_size, settings)
    loss, gradients = expected
    slices: dict[str, dict[int, Tensor]] = {}
    places = {}
    for result in results:
        assert not result.recording_changes
        assert result.replay_changes == 0, "replay of what the routers choose anyway changes gradients"
        assert result.drift == {f"router/changed_fraction/layer_{n:02d}": 0 for n in range(1, LAYERS + 1)}
        for one, other in zip(of_one_process.recorded, result.recorded, strict=True):
            assert torch.equal(one.sort(dim=2).values, other.sort(dim=2).values)
            assert other.dtype == torch.int8 and other.min() >= 0
        assert result.forced[0] == pytest.approx(loss, rel=1e-10)
        assert result.drift_of_forced == pytest.approx(of_one_process.drift_of_forced, abs=0)
        assert min(result.drift_of_forced.values()) > 0.3
        assert all(result.router_gradients)
        for place, gradient in result.forced[1]:
            places[place.name] = place
            slices.setdefault(place.name, {})[place.index] = gradient
    assert gradients.keys() <= places.keys()
    for name, wanted in gradients.items():
        place = places[name]
        whole = place.join([slices[name][i] for i in range(place.count)])[: len(wanted)]
        assert float((whole - wanted).abs().max()) < 1e-9 * float(wanted.abs().max()), name


def with_unknown_experts() -> list[list[Tensor]]:
    policy, algorithm = open_policy(1, "algorithm.kl_coef=0", *REPLAY)
    loss, found = PolicyLoss(algorithm.objective, policy.groups, False), []
    for unknown in (False, True):
        made = sequences()
        for sequence in made if unknown else ():
            sequence.columns["routed_experts"] = torch.full((len(sequence), LAYERS, CHOSEN), NO_EXPERT)
        metrics = policy.update(batch_of(policy, made)[0], loss, lr=0.0)
        assert not any("changed" in name for name in metrics), "nothing was recorded"
        found.append([gradient.clone() for _, gradient in policy.gradients()])
    return found


def test_an_unknown_expert_is_the_routers_own() -> None:
    [(without, unknown)] = run_distributed(with_unknown_experts, 1)
    assert all(torch.equal(a, b) for a, b in zip(without, unknown, strict=True))


def compared() -> tuple[dict[str, float], bool]:
    policy, algorithm = open_policy(1, "algorithm.kl_coef=0", "algorithm.routing_replay=compare")
    loss = PolicyLoss(algorithm.objective, policy.groups, False)
    made, gradients = sequences(), []
    for forced in (False, True):
        for i, sequence in enumerate(made if forced else ()):
            sequence.columns["routed_experts"] = drawn_experts(i, len(sequence))
        metrics = policy.update(batch_of(policy, made)[0], loss, lr=0.0)
        gradients.append([gradient.clone() for _, gradient in policy.gradients()])
    same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    return {k: v for k, v in reduced([metrics], policy.groups).items() if "changed" in k}, same


def test_compare_changes_nothing() -> None:
    [(drift, same)] = run_distributed(compared, 1)
    assert same and len(drift) == LAYERS and min(drift.values()) > 0.3


@pytest.mark.parametrize("has_router", [True, False], ids=["a router", "dense layers alone"])
def test_a_record_has_the_dtypes_of_its_columns(has_router: bool) -> None:
    """From the moment it is made, 64 bits a choice would add up over the layers; and whatever a pipeline stage has
    seen, since stages exchange records as bytes."""
    groups: Any = SimpleNamespace(layout=Layout(1), device=torch.device("cpu"))
    shape = load_config(None, ["model.preset=tiny_moe", "model.num_layers=2"]).model.shape
    recording = Recording(shape, groups, log_prob_dtype=torch.float64)
    scores = torch.randn(5, shape.num_experts)
    own = torch.topk(scores, shape.experts_per_token)
    if has_router:
        assert recording.choose(1, scores, own) is own
        assert [kept.dtype for kept in recording._experts.values()] == [torch.int8]
        assert [kept.dtype for kept in recording._log_probs.values()] == [torch.float64]
    assert recording.seen(5).dtype == torch.int8
    made: Any = SimpleNamespace(tokens_T=torch.zeros(5), inside_T=torch.tensor([True] * 4 + [False]))
    found = recording.columns(made)
    assert {name: values.dtype for name, values in found.items()} == {
        "routed_experts": torch.int8,
        "expert_log_probs": torch.float64,
    }
    expected = torch.full((5, 2, shape.experts_per_token), NO_EXPERT, dtype=torch.int8)
    if has_router:
        expected[:4, 1] = own.indices[:4].to(torch.int8)
    assert torch.equal(found["routed_experts"], expected)


def scored_and_updated(settings: tuple[str, ...]) -> list[bool]:
    """Whether old log-probs equal those of the first update's forward, by micro-batch, where a top-k that need not
    be sorted comes in the opposite order."""
    topk, unsorted = torch.topk, []

    def any_order(*arguments: Any, sorted: bool = True, **options: Any) -> Any:
        values_and_indices = topk(*arguments, **options)
        unsorted.append(not sorted)
        return values_and_indices if sorted else tuple(x.flip(-1) for x in values_and_indices)

    torch.topk = any_order  # type: ignore[assignment]
    policy, _ = open_policy(1, *settings)
    batch, _ = batch_of(policy, sequences())
    old = policy.log_probs(batch.micro_batches)
    assert any(unsorted) or compat.VERSION.startswith("0.16."), "Megatron-Core sorts now: `_in_order` can go"
    new: list[Tensor] = []

    def loss(log_probs_R: Tensor, *_: Any) -> LossTerms:
        new.append(log_probs_R.detach())
        return LossTerms(-log_probs_R.sum(), {})

    policy.update(batch, loss, lr=0.0)
    return [torch.equal(a, b) for a, b in zip(old, new, strict=True)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_experts_come_in_the_same_order_without_gradient(dtype: str) -> None:
    """So that the ratios of a first update are 1 to the last bit."""
    [equal] = run_distributed(scored_and_updated, 1, (f"precision.dtype={dtype}", "model.experts_per_token=3"))
    assert len(equal) > 1 and all(equal)
