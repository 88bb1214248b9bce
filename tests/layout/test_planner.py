"""The planner: what it proposes keeps all rules and fits, is found again by brute force, and costs what its formulas
say."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.layout.hardware import GPUS, Efficiency, Gpu, gpu_named
from gspo_megatron.layout.layout import Layout
from gspo_megatron.layout.memory import GIB, RESERVED_GIB, fullest_stage
from gspo_megatron.layout.planner import distinct, layouts, search, stage_split
from gspo_megatron.layout.timing import Cluster, StepTime, Work
from gspo_megatron.models.counts import sequence_cost

H100 = Cluster(GPUS["h100"], 8)
WORK = Work(4096, prompt=512, response=4096, longest=8192, updates=8)


def config_of(model: str, *overrides: str) -> Config:
    length = 512 + 8192
    return load_config(
        None,
        [
            f"model.preset={model}",
            f"model.max_sequence_length={length}",
            f"train.tokens_per_micro_batch={length}",
            "precision.dtype=bf16",
            "rollout.max_new_tokens=8192",
            "rollout.prompts_per_step=256",
            "rollout.group_size=16",
            "algorithm.updates_per_rollout=8",
            *overrides,
        ],
    )


# ----------------------------------------------------------------------------------------------------------- hardware


def test_gpus_have_plausible_figures_and_a_source() -> None:
    for name, gpu in GPUS.items():
        assert name == gpu.name and "data sheet" in gpu.source
        assert 1.8 < gpu.fp8_tflops / gpu.bf16_tflops < 2.2 or not gpu.fp8_tflops
        assert gpu.network_gb_s < gpu.nvlink_gb_s < gpu.hbm_gb_s
    e = Efficiency()
    assert all(0 < x < 1 for x in (e.dense, e.grouped, e.attention, e.memory, e.nvlink, e.network))


def test_a_collective_over_nodes_drives_the_network_cards_of_its_members() -> None:
    nvlink, network = 450e9 * 0.8, 50e9 * 0.86
    assert H100.bandwidth(8, 1) == ("NVLink", nvlink)
    assert H100.bandwidth(2, 4) == ("NVLink", nvlink)
    assert H100.bandwidth(2, 8) == ("network", pytest.approx(network))
    assert H100.bandwidth(16, 4) == ("network", pytest.approx(2 * network))
    assert H100.bandwidth(16, 1) == ("network", pytest.approx(8 * network))
    assert Cluster(GPUS["gb200"], 72).bandwidth(64, 1)[0] == "NVLink"


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize(("model", "gpus"), [("qwen3_30b_a3b", 16), ("qwen3_235b_a22b", 128)])
def test_what_is_proposed_keeps_the_rules_and_fits(model: str, gpus: int) -> None:
    plans = search(config_of(model), gpus, H100, WORK, with_reference=False)
    usable = GPUS["h100"].memory_gib - RESERVED_GIB
    assert len(plans) > 20
    for plan in plans[:10]:
        assert check_config(plan.config, gpus) == plan.layout
        assert fullest_stage(plan.config, plan.layout, with_reference=False).peak / GIB == plan.peak_gib <= usable
    assert [p.time.total for p in plans] == sorted(p.time.total for p in plans)
    best = distinct(plans, 5)
    assert len({p.layout for p in best}) == 5 and best[0] is plans[0]


def test_a_model_that_fits_nowhere_has_no_plans() -> None:
    assert search(config_of("qwen3_235b_a22b"), 16, H100, WORK, with_reference=False) == []


def test_a_reference_or_less_memory_leaves_fewer_plans() -> None:
    config = config_of("qwen3_30b_a3b")
    plain, reference, small = (
        len(search(config, 16, H100, WORK, with_reference=with_reference, memory_gib=gib))
        for with_reference, gib in ((False, 73.6), (True, 73.6), (False, 60))
    )
    assert 0 < reference < plain and 0 < small < plain


def test_thousands_of_gpus_take_seconds() -> None:
    start = time.process_time()
    plans = search(config_of("qwen3_235b_a22b"), 4096, H100, replace(WORK, sequences=131_072), with_reference=False)
    assert plans and time.process_time() - start < 60


def test_stages_are_unequal_only_where_they_have_to_be() -> None:
    assert stage_split(48, 4, 2) == (None, None)
    assert stage_split(94, 8, 1) == (11, 11)
    assert stage_split(94, 1, 2) is None and stage_split(4, 8, 1) is None
    found = {(x.pp, x.first, x.last) for x in layouts(config_of("qwen3_235b_a22b"), 64, 8)}
    assert (8, 11, 11) in found and (2, None, None) in found and (8, None, None) not in found


# ------------------------------------------------------------------------------------------------------------ seconds


def step(config: Config, layout: Layout, work: Work = WORK, cluster: Cluster = H100) -> StepTime:
    return StepTime(config, layout, cluster, work)


PERFECT = Efficiency(1, 1, 1, 1e9, 1e9, 1e9, 0.0, 0, 0.0)
"""Nothing but matrix products takes time."""


def test_products_alone_take_the_flops_of_the_model() -> None:
    """Update, old log-probs: 3 and 1 forwards of every sequence, and a quarter of the head's work for what log-probs
    recompute."""
    config, layout = config_of("qwen3_30b_a3b"), Layout(8, ep=8)
    work = replace(WORK, prompt=0, response=4096)
    time_ = step(config, layout, work, Cluster(GPUS["h100"], 8, PERFECT))
    forward = work.sequences * sequence_cost(config.model.shape)(4096)
    assert time_.flops["update"] == pytest.approx(3 * forward, rel=1e-3)
    head = 2 * 4096 * 151_936 * 2048 * work.sequences
    peak = 8 * 989.4e12
    # Attention looks back over half the sequence on average, which leaves out half a token.
    assert time_.parts["log_probs"] == pytest.approx(forward / peak, rel=2e-3)
    assert time_.parts["update"] == pytest.approx((3 * forward + head) / peak, rel=2e-3)
    assert time_.bubble == pytest.approx(0)


def test_fp8_halves_products_and_recomputation_adds_a_forward() -> None:
    perfect = Cluster(GPUS["h100"], 8, PERFECT)
    layout = Layout(8, ep=8)
    plain, fp8, full = (
        step(config_of("qwen3_30b_a3b", *more), layout, replace(WORK, prompt=4000, response=1), perfect).parts["update"]
        for more in ((), ("precision.fp8=blockwise",), ("parallel.recompute=full",))
    )
    # Attention's own products stay in bf16.
    assert 0.5 < fp8 / plain < 0.8
    assert full / plain == pytest.approx(4 / 3, rel=1e-3)


def test_the_bubble_is_that_of_the_schedule() -> None:
    """(pp - 1) / (micro-batches + pp - 1) with equal stages, and 1 / vpp of the numerator's part with virtual ones."""
    perfect = Cluster(GPUS["h100"], 8, PERFECT)
    # A head of no weight makes stages equal.
    config = config_of("qwen3_30b_a3b", "model.vocab_size=16")
    for vpp in (1, 2):
        time_ = step(config, Layout(8, pp=4, vpp=vpp, ep=2), replace(WORK, sequences=8 * 32), perfect)
        n = time_.micro_batches
        assert n == 16
        assert time_.bubble == pytest.approx(3 / vpp / (n + 3 / vpp), rel=1e-2)


def test_a_deeper_last_stage_slows_every_micro_batch() -> None:
    config = config_of("qwen3_235b_a22b")
    balanced, heavy = (step(config, Layout(128, pp=8, ep=16, first=f, last=x)) for f, x in ((11, 11), (5, 17)))
    assert heavy.parts["update"] > 1.3 * balanced.parts["update"] and heavy.bubble > balanced.bubble + 0.1


def test_experts_in_a_node_exchange_over_nvlink() -> None:
    """16 ranks of experts in two nodes: half of what a token sends leaves the node, over a ninth of the bandwidth."""
    config = config_of("qwen3_30b_a3b")
    inside, across = (step(config, Layout(16, ep=ep)) for ep in (8, 16))
    assert inside.by_axis()["ep"][0] == "NVLink" and across.by_axis()["ep"][0] == "network"
    size, e = 1e9, Efficiency()
    assert inside.exchange(size) == pytest.approx(size * 7 / 8 / (450e9 * 0.8) + e.message_s)
    over_nodes = e.message_s + e.network_message_s
    assert across.exchange(size) == pytest.approx(size * 8 / 16 / (50e9 * 0.86) + over_nodes)


def test_experts_over_nodes_pay_for_every_other_node() -> None:
    """Of the few tokens of a decoding forward, messages are the whole price: so experts stay in a node."""
    assert [H100.latency(ep, 1) for ep in (2, 8, 16, 64)] == pytest.approx([15e-6, 15e-6, 29e-6, 113e-6])
    assert H100.latency(8, 2) == H100.latency(16, 1) and H100.latency(2, 16) == pytest.approx(29e-6)
    config = config_of("qwen3_235b_a22b")
    inside, over = (StepTime(config, Layout(128, tp=4, pp=2, ep=ep), H100, WORK) for ep in (8, 64))
    assert over.exchange(0) - inside.exchange(0) == pytest.approx(7 * 14e-6)
    assert search(config, 128, H100, WORK, with_reference=False)[0].layout.ep <= 8


def test_decoding_waits_for_launches_or_for_memory() -> None:
    config, layout = config_of("qwen3_30b_a3b"), Layout(8, ep=8)
    e = Efficiency()
    launches = 48 * e.kernels * e.launch_s
    eager, engine = (step(config, layout, replace(WORK, engine=engine)).decode(1, 10) for engine in (False, True))
    assert eager > launches > engine
    few, many = (step(config, layout, replace(WORK, engine=True)).decode(rows, 8000) for rows in (64, 256))
    # The caches of four times as many rows, but not four times the weights.
    assert 1.5 < many / few < 4


def test_waiting_rollouts_take_rows_that_end() -> None:
    config, layout = config_of("qwen3_30b_a3b", "rollout.max_batch=512"), Layout(8, ep=8)
    at_once = step(config, layout)
    in_turn = step(replace(config, rollout=replace(config.rollout, max_batch=128)), layout)
    # 512 rollouts a rank. Prompts take little time.
    assert at_once.rollout() / at_once.decode(512, 512 + 2048) == pytest.approx(8192, rel=0.02)
    assert in_turn.rollout() / in_turn.decode(128, 512 + 2048) == pytest.approx(8192 + 4096 * 3, rel=0.02)


def test_overlap_hides_gradients_behind_a_micro_batch() -> None:
    config, layout = config_of("qwen3_30b_a3b"), Layout(64, ep=8)
    overlapped, exposed = (
        step(config, layout, replace(WORK, overlaps=x)).parts["communication"] for x in (True, False)
    )
    assert exposed == pytest.approx(8 * step(config, layout).gradients_and_weights()[1])
    assert overlapped < exposed


def test_a_save_is_spread_over_its_steps() -> None:
    config, layout = config_of("qwen3_30b_a3b"), Layout(8, ep=8)
    once, seldom, never = (step(config, layout, replace(WORK, save_every=n)).parts["save"] for n in (1, 10, 0))
    assert once == pytest.approx(10 * seldom) and never == 0
    assert once == pytest.approx(12 * 30_532_122_624 / 8 / 64e9, rel=0.02)


def test_another_gpu_is_a_row_of_the_table() -> None:
    gpu = Gpu("twice", 80, 2 * 989.4, 0, 6700, 900, 100, 128, 8, "", "data sheet")
    config, layout = config_of("qwen3_30b_a3b"), Layout(8, ep=8)
    slow, fast = (step(config, layout, cluster=Cluster(g, 8)).parts["update"] for g in (GPUS["h100"], gpu))
    assert fast == pytest.approx(slow / 2, rel=0.05)


def test_a_gpu_is_known_by_its_drivers_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H200": "h200",
        "NVIDIA GB200": "gb200",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA H800": None,
        "CPU": None,
    }
    for name, row in names.items():
        found = gpu_named(name)
        assert (found and found.name) == row, name
