"""Layers of Transformer Engine against local ones: log-probs, every gradient, and the gradient's norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspo_megatron.mcore.attention import PackedAttention
from gspo_megatron.testing.local_ranks import run_distributed
from tests.te.bench import (
    TE_FAMILIES,
    Case,
    Measured,
    compare,
    open_groups,
    policy_of,
    relative,
    te_attends_in_float32,
    worst_gradient,
    worst_log_prob,
)

pytestmark = pytest.mark.te

FULL = ("parallel.recompute=full",)
SELECTIVE = ("parallel.recompute=selective",)
LAYOUTS: dict[str, tuple[int, dict[str, int], tuple[str, ...]]] = {
    "one process": (1, {}, ()),
    "recompute full": (1, {}, FULL),
    "recompute selective": (1, {}, SELECTIVE),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}, ()),
    "tp2 ep2 etp2": (4, {"tp": 2, "ep": 2, "etp": 2}, FULL),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, ()),
    "tp2 allgather": (2, {"tp": 2}, ("parallel.token_dispatcher=allgather",)),
}


def close(measured: dict[str, Measured], dtype: str) -> None:
    """fp32: equal up to the order of sums. bf16: a token near a tie may be routed to another expert, whose gradient
    then differs at once, so all parameters are taken together."""
    local, te = measured["local"], measured["te"]
    assert (local.experts, te.experts) in {("WholeExperts", "TEGroupedMLP"), ("", "")}
    if dtype == "fp32":
        assert worst_log_prob(te.log_probs, local.log_probs) < 3e-6
        assert worst_gradient(te, local)[0] < 1e-5, worst_gradient(te, local)
        assert te.grad_norm == pytest.approx(local.grad_norm, rel=1e-6)
    else:
        assert worst_log_prob(te.log_probs, local.log_probs) < 0.1
        together = [torch.cat([m.gradients[name].flatten() for name in sorted(m.gradients)]) for m in (te, local)]
        assert relative(*together) < 0.1
        assert te.grad_norm == pytest.approx(local.grad_norm, rel=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TE_FAMILIES)
@pytest.mark.skipif(not te_attends_in_float32(), reason="this Transformer Engine has no packed attention in float32")
def test_equal_in_float32(family: str, layout: str) -> None:
    world_size, axes, settings = LAYOUTS[layout]
    case = Case(family, world_size, axes, "fp32", settings)
    for measured in run_distributed(compare, world_size, case, timeout_s=120):
        close(measured, "fp32")
    norm = run_distributed(compare, 1, Case(family))[0]["local"].grad_norm
    assert measured["te"].grad_norm == pytest.approx(norm, rel=1e-5), "the norm depends on the layout"


@pytest.mark.parametrize("family", TE_FAMILIES)
def test_smoke_bf16(family: str) -> None:
    close(run_distributed(compare, 1, Case(family, dtype="bf16"))[0], "bf16")


@pytest.mark.skipif(not te_attends_in_float32(), reason="this Transformer Engine has no packed attention in float32")
def test_smoke_a_window() -> None:
    case = Case("mixtral", settings=("model.sliding_window=5",))
    found = run_distributed(compare, 1, case)[0]
    close(found, "fp32")
    without = run_distributed(compare, 1, Case("mixtral"))[0]
    assert worst_log_prob(found["te"].log_probs, without["te"].log_probs) > 1e-3, "the window does nothing"


@pytest.mark.parametrize("family", TE_FAMILIES)
def test_smoke_on_four_ranks_in_bf16(family: str) -> None:
    """The pairs of versions differ in how experts' parameters are marked, reduced and counted."""
    case = Case(family, 4, {"tp": 2, "ep": 2}, "bf16")
    for measured in run_distributed(compare, 4, case, timeout_s=120):
        close(measured, "bf16")


@pytest.mark.parametrize("family", TE_FAMILIES)
def test_context_parallel_as_transformer_engine_does_it(family: str) -> None:
    """Its ring over ranks that hold two chunks of every sequence gives what one process gives, so its split of
    sequences is ours: any other split would pair queries with the wrong keys."""
    alone = run_distributed(compare, 1, Case(family, dtype="bf16"))[0]
    for measured in run_distributed(compare, 2, Case(family, 2, {"cp": 2}, "bf16"), timeout_s=120):
        close(measured, "bf16")
        assert measured["te"].grad_norm == pytest.approx(alone["te"].grad_norm, rel=2e-2)


def attention_cores(case: Case) -> dict[str, list[tuple[int, Any]]]:
    """Of every layer of this rank: how many PackedAttention it has, and the type inside."""
    config, groups = open_groups(case)
    found = {}
    for layers in ("local", "te"):
        policy = policy_of(config, groups, layers)
        found[layers] = [
            (
                sum(isinstance(module, PackedAttention) for module in layer.modules()),
                type(layer.self_attention.core_attention.fused).__name__,
            )
            for chunk in policy.model
            for layer in chunk.decoder.layers
        ]
    return found


@pytest.mark.parametrize("axes", [{}, {"pp": 2}, {"pp": 2, "vpp": 2}], ids=str)
@pytest.mark.parametrize("family", TE_FAMILIES)
def test_smoke_no_attention_core_is_inside_another(family: str, axes: dict[str, int]) -> None:
    case = Case(family, axes.get("pp", 1), axes, settings=("model.num_layers=8",))
    for found in run_distributed(attention_cores, case.world_size, case):
        assert len(found["te"]) == 8 // axes.get("pp", 1)
        assert set(found["local"]) == {(1, "NoneType")}
        assert set(found["te"]) == {(1, "TEDotProductAttention")}
