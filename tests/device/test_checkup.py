"""The doctor's checks: facts that are in order pass all of them, and each has facts that turn it red."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.device.checkup import CHECKS, State, examine, passes
from gspo_megatron.device.facts import Facts, Gpu, Kernel, Package, version_of

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.2)
NODE = Facts(
    torch=Package("2.13.0"),
    torch_cuda=(13, 0),
    transformer_engine=Package("2.18.0"),
    gpus=(H100,) * 8,
    nccl=(2, 30, 5),
    driver="580.159.04",
    driver_cuda=(13, 0),
    kernel=Kernel(90, True, 3.0, 2e-3),
    environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"},
    pins={"numpy": ("2.4.6", "2.4.6")},
)
LAPTOP = Facts(torch=Package("2.13.0+cpu"), torch_cuda=(), transformer_engine=Package(), triton=Package(), cores=2)


def states(facts: Facts, *, build: bool = False) -> dict[str, State]:
    return {name: finding.state for name, finding in examine(facts, build=build)}


@pytest.mark.parametrize("build", [False, True])
def test_a_node_in_order_passes_every_check(build: bool) -> None:
    assert set(states(NODE, build=build).values()) == {State.OK}
    assert passes(examine(NODE, build=build), build=build)


def test_a_laptop_is_told_that_the_cpu_works() -> None:
    found = dict(examine(LAPTOP, build=False))
    assert passes(list(found.items()), build=False)
    assert found["GPUs"].state is State.NOTE and "CPU lane works" in found["GPUs"].problem
    assert {state for name, state in states(LAPTOP).items() if name != "GPUs"} == {State.OK}
    assert set(states(LAPTOP, build=True).values()) == {State.OK}


def with_environment(**variables: str) -> dict[str, Any]:
    return {"environment": {**NODE.environment, **variables}}


RED: list[tuple[str, State, dict[str, Any], str]] = [
    ("Python", State.WRONG, {"python": (3, 9, 2)}, "3.10"),
    ("PyTorch", State.WRONG, {"torch": Package()}, "not installed|needed"),
    ("PyTorch", State.WRONG, {"torch": Package("2.13.0", "OSError: libcudart.so.13")}, "libcudart"),
    ("PyTorch", State.WRONG, {"torch": Package("2.5.1")}, "2.6"),
    ("driver", State.WRONG, {"driver": "550.54", "driver_cuda": (12, 4)}, "580.65.06"),
    ("driver", State.LIMIT, {"torch_cuda": (14, 0), "driver_cuda": ()}, "not compared with what CUDA 14"),
    ("driver", State.NOTE, {"driver": None, "driver_cuda": (), "gpus": ()}, "no NVIDIA driver"),
    ("GPUs", State.WRONG, {"gpus": (), "gpu_error": "RuntimeError: unknown error"}, "unknown error"),
    ("GPUs", State.WRONG, {"gpus": (), "visible": ""}, "hides"),
    ("GPUs", State.LIMIT, {"gpus": (), "torch_cuda": ()}, "CPU build"),
    ("GPUs", State.LIMIT, {"gpus": (replace(H100, capability=(7, 0)),)}, "bf16"),
    ("GPUs", State.LIMIT, {"gpus": (replace(H100, capability=(8, 0)),)}, "FP8"),
    ("GPUs", State.LIMIT, {"gpus": (H100, Gpu("NVIDIA H200", (9, 0), 139.8))}, "kinds"),
    ("GPUs", State.LIMIT, {"gpus": (H100, replace(H100, used_gib=60.0))}, "1: 60.0"),
    ("NCCL", State.WRONG, {"nccl": ()}, "no NCCL"),
    ("Megatron-Core", State.WRONG, {"megatron": Package()}, "needed"),
    (
        "Megatron-Core",
        State.WRONG,
        {"megatron": Package("0.19.2", "ImportError: nvidia_resiliency_ext.x")},
        "uninstall nvidia-resiliency-ext",
    ),
    (
        "Megatron-Core",
        State.WRONG,
        {"megatron": Package("0.19.2", "X: empty"), "transformer_engine": Package("2.20.2", "X: empty")},
        "uninstall it",
    ),
    ("Megatron-Core", State.WRONG, {"megatron": Package("0.15.3")}, "older than 0.16.1"),
    ("Megatron-Core", State.LIMIT, {"megatron": Package("0.18.0")}, "0.19.2"),
    ("Transformer Engine", State.LIMIT, {"transformer_engine": Package()}, "not installed"),
    ("Transformer Engine", State.LIMIT, {"pair_error": "it lacks a name of fp8"}, "lacks a name"),
    ("Transformer Engine", State.LIMIT, {"transformer_engine": Package("2.18.0", "ImportError: x.so")}, "x.so"),
    ("Apex", State.NOTE, {"apex": Package("0.1", "ImportError: amp_C")}, "amp_C"),
    ("Triton kernel", State.LIMIT, {"triton": Package()}, "torch kernels"),
    ("Triton kernel", State.LIMIT, {"kernel": Kernel(90, error="PassManager::run failed")}, "PassManager"),
    ("Triton kernel", State.LIMIT, {"kernel": Kernel(90, error="x", tested=("3.5.1",))}, "Triton 3.5.1"),
    ("Triton kernel", State.WRONG, {"kernel": Kernel(90, True, 1.0, 0.3)}, "off by"),
    ("Triton kernel", State.WRONG, {"kernel": Kernel(90, True, 1.0, float("nan"))}, "off by"),
    ("FP8", State.LIMIT, {"torch_cuda": (12, 8), "driver_cuda": (12, 8)}, "12.9"),
    ("FP8", State.LIMIT, {"transformer_engine": Package("2.2.0")}, "Transformer Engine 2.3"),
    ("FP8", State.LIMIT, {"transformer_engine": Package()}, "see there"),
    ("FP8", State.LIMIT, {"gpus": (replace(H100, capability=(8, 0)),)}, "9.0 or above"),
    ("environment", State.WRONG, with_environment(RANK="0"), "torchrun"),
    ("environment", State.LIMIT, with_environment(CUDA_DEVICE_MAX_CONNECTIONS="8"), "sets 1"),
    ("environment", State.LIMIT, with_environment(NVTE_FP8_BLOCK_SCALING_FP32_SCALES="0"), "sets 1"),
    ("environment", State.LIMIT, with_environment(TRITON_INTERPRET="1"), "interpreted"),
    ("environment", State.LIMIT, with_environment(NVTE_FUSED_ATTN="0"), "context parallel"),
    ("shared memory", State.LIMIT, {"shared_memory_gib": 0.0625}, "--ipc=host"),
    ("locked memory", State.NOTE, {"locked_memory_gib": 0.0078}, "memlock=-1"),
    ("disk", State.WRONG, {"directory_error": "Permission denied"}, "Permission denied"),
    ("disk", State.WRONG, {"free_disk_gib": 0.5}, "1 GiB"),
    ("disk", State.LIMIT, {"free_disk_gib": 50.0}, "14 bytes"),
    ("host", State.LIMIT, {"cores": 4}, "8 processes"),
    ("host name", State.WRONG, {"host_name_error": "Name or service not known"}, "/etc/hosts"),
    ("clock", State.LIMIT, {"clock_behind_s": 3600.0}, "set the clock"),
    ("pinned packages", State.NOTE, {"pins": {"numpy": ("2.4.6", "1.26.4")}}, "1.26.4"),
]


@pytest.mark.parametrize(("check", "state", "facts", "says"), RED)
def test_what_is_wrong_is_found(check: str, state: State, facts: dict[str, Any], says: str) -> None:
    findings = examine(replace(NODE, **facts), build=False)
    finding = dict(findings)[check]
    assert finding.state is state
    assert any(word in f"{finding.found} {finding.problem} {finding.advice}" for word in says.split("|"))
    assert finding.problem and finding.advice
    assert passes(findings, build=False) == (State.WRONG not in states(replace(NODE, **facts)).values())


def test_recipes_are_judged_by_the_table_that_runs_are_built_from() -> None:
    def says(**facts: Any) -> str:
        return dict(examine(replace(NODE, **facts), build=False))["FP8"].found

    assert says() == "precision.fp8=blockwise or tensorwise"
    assert says(torch_cuda=(12, 8)) == "precision.fp8=tensorwise"
    assert "mxfp8" in says(gpus=(replace(H100, capability=(10, 0)),))
    assert says(gpus=(replace(H100, capability=(8, 0)),)) == "no recipe works"


def test_every_check_has_facts_that_turn_it_red() -> None:
    assert {check.name for check in CHECKS} == {name for name, *_ in RED}


def test_an_image_fails_on_limits_too() -> None:
    broken = examine(replace(NODE, transformer_engine=Package("2.18.0", "ImportError")), build=True)
    assert not passes(broken, build=True)
    # What only the machine knows is not asked.
    bare = replace(NODE, gpus=(), driver=None, shared_memory_gib=0.0, directory_error="read-only")
    assert passes(examine(bare, build=True), build=True)


def test_versions_are_read_as_far_as_they_are_numbers() -> None:
    assert [version_of(text) for text in ("13.0", "2.13.0a0+8145d6.nv26.06", "unknown", None)] == [
        (13, 0),
        (2, 13, 0),
        (),
        (),
    ]
