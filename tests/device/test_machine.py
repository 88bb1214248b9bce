"""What a machine lacks for a run: every refusal, on machines that are only described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gspo_megatron.device.facts import Facts, Gpu, Machine, Package
from gspo_megatron.device.machine import BUILT_TOGETHER, OLDEST_DRIVERS, Needs, driver_problem, problems
from gspo_megatron.device.own import UNKNOWN, this_process
from gspo_megatron.device.precision import RECIPES

H100 = Machine(
    torch=Package("2.10.0"),
    torch_cuda=(13, 1),
    gpus=(Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.1),),
    driver="580.82.07",
    transformer_engine=Package("2.10.0"),
)
B200 = replace(H100, gpus=(Gpu("NVIDIA B200", (10, 0), 178.4),))
A100 = replace(H100, gpus=(Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 79.3),))
RTX5090 = replace(H100, gpus=(Gpu("NVIDIA GeForce RTX 5090", (12, 0), 31.8),))
NOWHERE = Machine(
    torch=Package("2.10.0"),
    torch_cuda=(12, 9),
    gpu_error="RuntimeError: Found no NVIDIA driver on your system",
)
WITHOUT = {"transformer_engine": Package()}


@pytest.mark.parametrize(
    ("machine", "needs"),
    [
        (H100, Needs()),
        (H100, Needs(cp=2)),
        (H100, Needs(fp8="blockwise", cp=2)),
        (H100, Needs(fp8="tensorwise", transformer_engine="on")),
        (replace(H100, torch_cuda=(12, 8)), Needs(fp8="tensorwise")),
        (B200, Needs(fp8="mxfp8")),
        (B200, Needs(fp8="tensorwise")),
        (RTX5090, Needs(fp8="tensorwise")),
        (A100, Needs(cp=2)),
        (H100, Needs(dtype="fp32")),
        (replace(H100, transformer_engine=Package("2.20.2")), Needs(dtype="fp32", transformer_engine="on")),
        (replace(H100, transformer_engine=Package(UNKNOWN)), Needs(fp8="blockwise")),
        (replace(H100, **WITHOUT), Needs()),
        (replace(H100, transformer_engine=Package("2.10.0", "ImportError: x")), Needs(transformer_engine="off")),
    ],
)
def test_a_machine_that_has_what_a_run_needs(machine: Machine, needs: Needs) -> None:
    assert list(problems(machine, needs)) == []


@pytest.mark.parametrize(
    ("machine", "needs", "what", "fix"),
    [
        (NOWHERE, Needs(), "torch 2.10.0 for CUDA 12.9 sees no GPU (RuntimeError: Found no NVIDIA", "nvidia-smi"),
        (replace(NOWHERE, torch_cuda=()), Needs(), "torch 2.10.0 was built without CUDA", "install a build for CUDA"),
        (replace(NOWHERE, visible=""), Needs(), "CUDA_VISIBLE_DEVICES= hides them all", "unset CUDA_VISIBLE_DEVICES"),
        (
            replace(NOWHERE, driver="470.57.02"),
            Needs(),
            "the driver 470.57.02 is older than 525.60.13, the first that runs CUDA 12",
            "upgrade the driver, or install a torch built for CUDA 11",
        ),
        (
            replace(NOWHERE, driver="570.86.10", torch_cuda=(13, 0)),
            Needs(),
            "the driver 570.86.10 is older than 580.65.06, the first that runs CUDA 13",
            "a torch built for CUDA 12",
        ),
        (
            A100,
            Needs(fp8="blockwise"),
            "precision.fp8=blockwise needs a GPU of compute capability 9.0 or above and below 10.0, and NVIDIA "
            "A100-SXM4-80GB has 8.0",
            "set precision.fp8=none",
        ),
        (
            H100,
            Needs(fp8="mxfp8"),
            "precision.fp8=mxfp8 needs a GPU of compute capability 10.0 or above and below 12.0, and NVIDIA H100 80GB "
            "HBM3 has 9.0",
            "set precision.fp8=blockwise",
        ),
        (RTX5090, Needs(fp8="mxfp8"), "NVIDIA GeForce RTX 5090 has 12.0", "set precision.fp8=tensorwise"),
        (
            B200,
            Needs(fp8="blockwise"),
            "and below 10.0, and NVIDIA B200 has 10.0 (Transformer Engine emulates it there by MXFP8, which would drop "
            "the mantissas of its scales)",
            "set precision.fp8=mxfp8",
        ),
        (RTX5090, Needs(fp8="blockwise"), "NVIDIA GeForce RTX 5090 has 12.0 (Tran", "set precision.fp8=tensorwise"),
        (
            replace(H100, torch_cuda=(12, 8)),
            Needs(fp8="blockwise"),
            "precision.fp8=blockwise needs CUDA 12.9 or newer, and torch 2.10.0 was built for CUDA 12.8",
            "or set precision.fp8=tensorwise",
        ),
        (
            replace(H100, **WITHOUT),
            Needs(fp8="tensorwise"),
            "precision.fp8=tensorwise needs Transformer Engine, which is not installed",
            f"pip install 'gspo_megatron[te]' ({BUILT_TOGETHER}), or set precision.transformer_engine=off and "
            "precision.fp8=none",
        ),
        (
            replace(H100, **WITHOUT),
            Needs(transformer_engine="on"),
            "precision.transformer_engine=on needs Transformer Engine, which is not installed",
            "or set precision.transformer_engine=off",
        ),
        (
            replace(
                H100,
                transformer_engine=Package("2.10.0", "ModuleNotFoundError: No module named 'transformer_engine_torch'"),
            ),
            Needs(),
            "precision.transformer_engine=auto: Transformer Engine 2.10.0 is installed, but `import "
            "transformer_engine.pytorch` fails with ModuleNotFoundError: No module named 'transformer_engine_torch'",
            "it must be built for torch 2.10.0 and CUDA 13.1",
        ),
        (
            replace(H100, transformer_engine=Package("2.2.0")),
            Needs(fp8="blockwise"),
            "precision.fp8=blockwise needs Transformer Engine 2.3 or newer, and 2.2.0 is installed",
            "upgrade it",
        ),
        (
            replace(H100, **WITHOUT),
            Needs(cp=2),
            "parallel.cp=2 on a GPU needs Transformer Engine and precision.dtype=bf16",
            "set parallel.cp=1",
        ),
        (H100, Needs(cp=4, transformer_engine="off"), "grows with the square of the length", "set parallel.cp=1"),
        (H100, Needs(cp=2, dtype="fp32"), "needs Transformer Engine and precision.dtype=bf16", "precision.dtype=bf16"),
        (
            H100,
            Needs(cp=2, dtype="fp32", transformer_engine="on"),
            "unfused attention alone, which has no context parallelism",
            "set precision.dtype=bf16, or parallel.cp=1",
        ),
        (
            H100,
            Needs(dtype="fp32", transformer_engine="on"),
            "no attention of Transformer Engine 2.10.0 takes packed sequences in float32, those of 2.11 and newer do",
            "precision.transformer_engine=off",
        ),
    ],
)
def test_what_a_machine_lacks_is_named_with_what_to_do(machine: Machine, needs: Needs, what: str, fix: str) -> None:
    first = next(problems(machine, needs))
    assert what in first.what and fix in first.fix
    assert "\n" not in str(first)


def test_every_recipe_is_refused_on_a_gpu_without_it_and_names_one_that_has_it() -> None:
    for machine in (A100, H100, B200, RTX5090, replace(H100, torch_cuda=(12, 6))):
        for name in RECIPES:
            for problem in problems(machine, Needs(fp8=name)):
                instead = problem.fix.rsplit("precision.fp8=")[-1]
                assert list(problems(machine, Needs(fp8=instead))) == [], (machine.weakest.name, name)


def test_which_layers_a_run_uses() -> None:
    without = replace(H100, **WITHOUT)
    assert Needs().uses_transformer_engine(H100) and not Needs().uses_transformer_engine(without)
    assert not Needs(transformer_engine="off").uses_transformer_engine(H100)
    assert not Needs(dtype="fp32").uses_transformer_engine(H100)
    assert Needs(dtype="fp32", transformer_engine="on").uses_transformer_engine(H100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_facts_of_this_process() -> None:
    machine = this_process()
    assert machine.torch == Package(torch.__version__) and bool(machine.torch_cuda) == bool(torch.version.cuda)
    assert not machine.gpus and bool(machine.gpu_error) == bool(machine.torch_cuda)
    assert "GPU" in next(problems(machine, Needs())).what


def test_an_import_that_half_works_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the package transformer-engine without its part for torch: the first import works, the second fails."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("import transformer_engine_torch")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = this_process().transformer_engine
    if found.version != UNKNOWN:
        pytest.skip("a real Transformer Engine is installed")
    assert found.error == "ModuleNotFoundError: No module named 'transformer_engine_torch'"


def test_drivers_are_ordered_as_the_versions_of_cuda() -> None:
    assert list(OLDEST_DRIVERS.values()) == sorted(OLDEST_DRIVERS.values())


@pytest.mark.parametrize(
    ("driver", "runs", "torch_cuda", "says"),
    [
        ("580.65.06", (), (13, 0), None),
        ("570.86.10", (), (13, 0), "570.86.10 is older than 580.65.06, the first that runs CUDA 13"),
        ("570.86.10", (12, 8), (13, 0), "570.86.10, which runs CUDA 12.8, is older than 580.65.06"),
        ("700.1", (14, 0), (14, 1), None),
        ("580.65.06", (13, 0), (14, 1), "580.65.06, which runs CUDA 13.0, is older than CUDA 14 asks for"),
        ("580.65.06", (), (14, 1), "was not compared with what CUDA 14 needs"),
        (None, (), (14, 1), None),
        ("580.65.06", (13, 0), (), None),
    ],
)
def test_drivers(driver: str | None, runs: tuple[int, ...], torch_cuda: tuple[int, ...], says: str | None) -> None:
    """One rule for a run and for the doctor: what the driver itself says, else the table."""
    problem = driver_problem(Machine(driver=driver, driver_cuda=runs, torch_cuda=torch_cuda))
    assert problem is None if says is None else problem is not None and says in problem.what


def test_a_driver_that_nobody_can_judge_is_said_and_not_refused() -> None:
    unknown = replace(NOWHERE, driver="580.65.06", torch_cuda=(14, 1))
    problem = driver_problem(unknown)
    assert problem is not None and not problem.is_certain
    (first,) = problems(unknown, Needs())
    assert "Found no NVIDIA driver" in first.what and "was not compared with what CUDA 14 needs" in first.what


def test_the_doctor_and_a_run_describe_a_machine_by_one_record() -> None:
    facts = Facts(gpus=H100.gpus, torch_cuda=(12, 8), transformer_engine=Package("2.20.2"))
    assert "CUDA 12.9" in next(problems(facts, Needs(fp8="blockwise"))).what
