"""Stand-ins for torch.cuda and NCCL, and patches to Megatron-Core: each entry is still needed, and does no harm.

A test here that fails with a new Megatron-Core or torch shows that an entry can be removed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import router
from torch.utils import _device

from gspo_megatron.base.batches import Sequence, UpdateBatch
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import build_micro_batch
from gspo_megatron.device import Device, cpu, open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor
from tests.support.small import SMALL

SETTINGS = (
    *SMALL,
    "model.max_sequence_length=24",
    "parallel.recompute=full",
)
IN_016 = compat.VERSION.startswith("0.16.")


def resolved(name: str) -> tuple[Any, str]:
    """(owner, attribute) of a dotted name that begins with torch."""
    owner: Any = torch
    *path, attribute = name.split(".")[1:]
    for part in path:
        owner = getattr(owner, part)
    return owner, attribute


def one_update(without: str | None, *axes: str, world_size: int = 1) -> str:
    """Trains once on this rank, without one of the stand-ins or patches; returns what went wrong, or nothing."""
    own = getattr(*resolved(without)) if without and without.startswith("torch.") else None
    device = open_device("cpu", "fp32")
    if own is not None:
        setattr(*resolved(without), own)
    if without == "tensors_named_as_on_device":
        Device.optimizer_scope = lambda self: nullcontext()
    config = load_config(None, [*SETTINGS, *axes])
    groups = Groups(check_config(config, world_size), device.torch_device)
    for patch in compat.PATCHES + compat.CPU_PATCHES:
        if patch.__name__ != without:
            patch()
    sequences = [Sequence.after_prompt([3, 4, 5, 6, 7, 8], 2), Sequence.after_prompt([7, 8, 9, 10], 1)]
    micro_batches = [build_micro_batch(sequences, [i], pad_id=0, rules=packing_rules(config)) for i in range(2)]
    callbacks = len(torch.cuda._queued_calls)
    try:
        policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
        policy.update(UpdateBatch(micro_batches, 2, 7), lambda x, *_: LossTerms(-x.sum() / 7, {}), lr=1e-3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if len(torch.cuda._queued_calls) > callbacks:
        return "callbacks for the day CUDA starts were queued"
    return ""


@pytest.mark.parametrize(
    ("without", "what_happens"),
    [
        ("nothing", ""),
        ("torch.cuda.current_device", "AssertionError: Torch not compiled with CUDA"),
        ("torch.cuda.Stream", "RuntimeError: torch.cuda.Stream requires CUDA"),
        ("torch.cuda.current_stream", "AssertionError: Torch not compiled with CUDA"),
        ("torch.cuda.random.get_rng_state", "AssertionError: Torch not compiled with CUDA"),
        ("torch.zeros", "AssertionError: Torch not compiled with CUDA"),
        ("torch.tensor", "AssertionError: Torch not compiled with CUDA"),
        ("tensors_named_as_on_device", "TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor"),
        # Only 0.16.1 needs this one.
        ("_te_general_gemm", "NameError: name 'te_general_gemm' is not defined" if IN_016 else ""),
        ("_no_device_rng", "callbacks for the day CUDA starts were queued"),
    ],
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch fails elsewhere, or not at all")
def test_training_fails_without(without: str, what_happens: str) -> None:
    [error] = run_distributed(one_update, 1, without)
    assert error.startswith(what_happens) and bool(error) == bool(what_happens)


def hidden_packages() -> dict[str, Any]:
    open_device("cpu", "fp32")
    return {name: sys.modules.get(name, "may be imported") for name in ("transformer_engine", "apex")}


def test_runs_on_the_cpu_go_without_packages_for_gpus() -> None:
    """Megatron-Core would call their kernels in the router, the gradient norm and Adam."""
    assert run_distributed(hidden_packages, 1) == [{"transformer_engine": None, "apex": None}]


@pytest.mark.parametrize(
    ("without", "axis", "what_happens"),
    [
        ("torch.cuda.synchronize", "parallel.pp=2", "AssertionError: Torch not compiled with CUDA"),
        ("_splits_on_cpu", "parallel.ep=2", "TypeError: all_to_all_single(): incompatible function arguments"),
    ],
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch fails elsewhere, or not at all")
def test_training_on_two_processes_fails_without(without: str, axis: str, what_happens: str) -> None:
    assert all(error.startswith(what_happens) for error in run_distributed(_one_of_two, 2, without, axis))


def _one_of_two(without: str, axis: str) -> str:
    return one_update(without, axis, world_size=2)


def routed(patched: bool, scores: str) -> tuple[float, float]:
    """Largest differences of a router's probabilities, and of the scores that its balancing loss uses, from those of
    float64 arithmetic."""
    if patched:
        compat.apply_patches(on_cpu=True)
    logits = torch.linspace(-3, 3, 35, dtype=torch.float64).view(5, 7)
    probs, _ = router.topk_routing_with_score_function(logits, 7, score_function=scores)
    _, balanced = router.compute_routing_scores_for_aux_loss(logits, 2, score_function=scores)
    weights = 1 / (1 + torch.exp(-logits)) if scores == "sigmoid" else torch.exp(logits)
    expected = weights / weights.sum(1, keepdim=True)
    return float((probs - expected).abs().max()), float((balanced - expected).abs().max())


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_a_router_rounds_to_float32_without_its_patch(scores: str) -> None:
    [with_patch], [without] = run_distributed(routed, 1, True, scores), run_distributed(routed, 1, False, scores)
    assert max(with_patch) < 1e-15 and without[0] > 1e-10
    # 0.16.1 computes the sigmoid of the balancing loss in the type of its logits.
    assert without[1] > 1e-10 or (IN_016 and scores == "sigmoid")


def marks_by_megatron() -> set[bool]:
    """`allreduce` of the experts' weights as Megatron-Core itself sets it, on TP 2 with EP 1 and ETP 1."""
    compat.mark_expert_parameters = lambda model, experts_have_own_groups: None
    config = load_config(None, [*SETTINGS, "parallel.tp=2"])
    device = open_device("cpu", "fp32")
    groups = Groups(check_config(config, 2), device.torch_device)
    compat.apply_patches(on_cpu=True)
    [model] = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring).model
    assert groups.experts_have_own_groups
    return {p.allreduce for name, p in model.named_parameters() if ".experts." in name}


def test_expert_parameters_are_marked_wrongly_by_016_alone() -> None:
    """compat.mark_expert_parameters: True means that the gradient would be reduced over the dense layers' ranks. What
    comes of the patch is seen in test_layouts.py, tp2."""
    assert run_distributed(marks_by_megatron, 2) == [{IN_016}] * 2


# ------------------------------------------------------------------------------------------------------- the stand-ins


@pytest.mark.parametrize("name", cpu.STAND_INS)
def test_megatron_still_has_the_place(name: str) -> None:
    file, text = cpu.STAND_INS[name]
    assert text in (Path(megatron.core.__file__).parent / file).read_text()


def installed() -> tuple[set[str], dict[str, Any]]:
    """The names in torch that stand in, after two installations; and what they do."""
    own_type = torch.Tensor.type
    cpu.install()
    first = torch.zeros
    cpu.install()
    again = torch.zeros
    places = {
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.cuda": torch.cuda,
        "torch.cuda.random": torch.cuda.random,
        "torch.distributed": dist,
    }
    names = {
        f"{p}.{n}" for p, owner in places.items() for n, x in vars(owner).items() if getattr(x, "stands_in", 0) is True
    }
    with cpu.tensors_named_as_on_device():
        types = [torch.zeros(1, dtype=d).type() for d in (torch.float32, torch.bfloat16, torch.float64)]
        cast = torch.zeros(1).type(torch.int64).dtype
    with pytest.raises(ConfigError), cpu.tensors_named_as_on_device():
        raise ConfigError("inside")
    return names, {
        "one layer": again is first,
        "zeros": torch.zeros(2, device="cuda").device.type,
        "tensor": torch.tensor([1.0], dtype=torch.float64, device="cuda"),
        "elsewhere": torch.zeros(2, device="meta").device.type,
        "here": torch.empty(1, device=torch.cuda.current_device()).device.type,
        "types": types,
        "cast": cast,
        "type restored": torch.Tensor.type is own_type and torch.zeros(1).type() == "torch.FloatTensor",
        "moved": torch.zeros(1).cuda().device.type,
        "compiled": torch.compile(lambda x: x + torch.compiler.is_compiling())(torch.zeros(1)).item(),
    }


def test_install() -> None:
    """Twice is once; every stand-in has its entry; what was meant for a GPU lands on the CPU, and only that."""
    [(names, seen)] = run_distributed(installed, 1)
    assert names == set(cpu.STAND_INS) - {"torch.Tensor.type"}
    assert seen["one layer"] is True
    assert (seen["zeros"], seen["elsewhere"], seen["here"], seen["moved"]) == ("cpu", "meta", "cpu", "cpu")
    assert torch.equal(seen["tensor"], torch.tensor([1.0], dtype=torch.float64))
    # float64 answers as float32: Megatron's optimizers know no float64, and what they do with float32 is to leave it.
    assert seen["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.FloatTensor"]
    assert seen["cast"] == torch.int64 and seen["type restored"] is True
    assert seen["compiled"] == 0, "functions for the compiler run eagerly"


def rows_of(rank: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, so that sums are exact in any order."""
    return torch.randint(-50, 50, (num_rows, 3), generator=torch.Generator().manual_seed(rank)).to(dtype)


def uneven(sizes: list[int], dtype: torch.dtype, stands_in: bool) -> tuple[Any, Any]:
    """What Megatron-Core's gather and reduce-scatter over the ranks of an expert give where rank r holds sizes[r]
    rows; the message of an error in the place of the first."""
    own = dist.all_gather
    cpu.install()
    if not stands_in:
        dist.all_gather = own
    rank, group = dist.get_rank(), dist.group.WORLD
    try:
        gathered = mappings._gather_along_first_dim(rows_of(rank, sizes[rank], dtype), group, sizes)
    except RuntimeError as error:
        gathered = str(error)
    return gathered, mappings._reduce_scatter_along_first_dim(rows_of(rank, sum(sizes), dtype), group, sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[2, 5], [0, 3], [4, 1, 0], [2, 0, 2], [3, 3], [0, 0]], ids=str)
def test_ranks_of_an_expert_exchange_uneven_numbers_of_rows(sizes: list[int], dtype: torch.dtype) -> None:
    ranks = range(len(sizes))
    whole = torch.cat([rows_of(rank, sizes[rank], dtype) for rank in ranks])
    sums = sum(rows_of(rank, sum(sizes), dtype) for rank in ranks).split(sizes)
    for rank, (gathered, reduced) in enumerate(run_distributed(uneven, len(sizes), sizes, dtype, True)):
        assert torch.equal(gathered, whole)
        assert torch.equal(reduced, sums[rank])


def test_gloo_refuses_to_gather_uneven_numbers_of_rows_but_not_to_reduce_and_scatter_them() -> None:
    sizes = [4, 1, 0]
    sums = sum(rows_of(rank, 5, torch.float64) for rank in range(3)).split(sizes)
    for rank, (error, reduced) in enumerate(run_distributed(uneven, 3, sizes, torch.float64, False)):
        assert "allgather: invalid tensor size" in error
        assert torch.equal(reduced, sums[rank])


def gathered_later() -> list[float]:
    cpu.install()
    parts = [torch.empty(()) for _ in range(2)]
    dist.all_gather(parts, torch.tensor(1.0 + dist.get_rank()), async_op=True).wait()
    return [part.item() for part in parts]


def test_equal_shapes_are_gathered_as_ever() -> None:
    """Also those without a first dimension, and asynchronously: torch's own function does it."""
    assert run_distributed(gathered_later, 2) == [[1.0, 2.0]] * 2


def alone(stands_in: bool) -> tuple[int, list[torch.Tensor]]:
    """Threads that come into being with large exchanges in a group of one, and the results of these."""
    torch.set_num_threads(2)
    own = [dist.all_gather_into_tensor, dist.reduce_scatter_tensor]
    cpu.install()
    gather, reduce_scatter = [dist.all_gather_into_tensor, dist.reduce_scatter_tensor] if stands_in else own
    mine = torch.arange(1e6)  # enough for torch to copy with all its threads
    (mine + 1).exp_()
    for _ in range(8):  # gloo's threads are there, all of them
        dist.all_reduce(torch.zeros(1), async_op=True).wait()
    before = len(os.listdir("/proc/self/task"))
    outputs = [torch.zeros_like(mine) for _ in range(4)]
    gather(outputs[0][None], mine) if stands_in else gather(outputs[0], mine)
    reduce_scatter(outputs[1], mine, op=dist.ReduceOp.AVG if stands_in else dist.ReduceOp.SUM)
    with dist._coalescing_manager(dist.group.WORLD, async_ops=True) as step_state:
        gather(output_tensor=outputs[2], input_tensor=mine, group=dist.group.WORLD, async_op=True)
    step_state.wait()
    reduce_scatter(outputs[3], mine, dist.ReduceOp.SUM, dist.group.WORLD, True).wait()
    return len(os.listdir("/proc/self/task")) - before, outputs


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_large_exchanges_of_one_rank_start_no_threads() -> None:
    [(threads, outputs)] = run_distributed(alone, 1, True)
    assert threads == 0
    assert all(torch.equal(output, torch.arange(1e6)) for output in outputs)
    [(threads, _)] = run_distributed(alone, 1, False)
    assert threads > 0, "gloo copies without threads of its own now: the two stand-ins can go"


# ------------------------------------------------------------------------------------------------ the other device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cuda_lane_trains(dtype: str, tmp_path: Path) -> None:
    """Nothing stands in, and a step of a tiny model runs on the GPU; in a process of its own."""
    root = Path(__file__).parents[2]
    settings = [
        "precision.device=cuda",
        f"precision.dtype={dtype}",
        f"run.dir={tmp_path}",
        "model.max_sequence_length=32",
        "data.eval_size=16",
        "rollout.prompts_per_step=4",
        "train.steps=1",
        # Of an untrained model all rewards are equal, and no sequence has a gradient.
        "train.skip_zero_gradient=false",
        "logging.tensorboard=false",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "gspo_megatron.train", *settings],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300 * time_factor(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nccl" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and rows[1]["ratio/min"] > 0


def made_under_the_meta_device() -> list[bool]:
    _device._device_constructors.cache_clear()  # a fresh process has not asked yet
    open_device("cpu", "fp32")
    with torch.device("meta"):
        return [torch.tensor([1.0]).is_meta, torch.zeros(1).is_meta, torch.ones(1).is_meta]


def test_stand_ins_obey_a_device_that_a_library_sets_for_all_tensors() -> None:
    assert run_distributed(made_under_the_meta_device, 1) == [[True, True, True]]
