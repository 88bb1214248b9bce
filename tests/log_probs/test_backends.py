"""Which kernels a call uses, and what happens where Triton cannot compile or launch them.

Triton decides when it is imported whether it interprets kernels. So the functions `interpreted_...` and `compiled_...`
are collected by a pytest in a process of its own.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.log_probs import backends, linear_log_probs, torch_kernels
from gspo_megatron.testing.local_ranks import run_distributed
from tests.log_probs.test_log_probs import Collectives

BF16 = torch.empty(1, dtype=torch.bfloat16)


def forget() -> None:
    for remembered in (backends._worst_trial, backends._try, backends._warn):
        remembered.cache_clear()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("which", ["interpreted", "compiled"])
def test_with_triton(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-o", f"python_functions={which}_*", __file__],
        env=os.environ | {"TRITON_INTERPRET": str(int(which == "interpreted"))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_on_a_cpu_auto_is_torch() -> None:
    with Collectives() as collectives:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert backends.choose("auto", torch.empty(1, dtype=dtype), None) is torch_kernels
    assert not collectives.count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_triton_takes_three_formats(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, dtype=dtype)
    with pytest.raises(ConfigError, match=rf"backend='triton' does not support {str(dtype)[6:]}; use torch or auto"):
        backends.choose("triton", x, None)
    monkeypatch.setattr(backends, "HOSTS", ())
    assert backends.choose("auto", x, None) is torch_kernels


def test_triton_on_a_cpu_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"train\.log_prob_backend .* auto falls back to torch's"):
        backends.choose("triton", BF16, None)


def test_where_triton_is_missing_auto_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "HOSTS", ())
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    forget()
    assert backends.choose("auto", BF16, None) is torch_kernels
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"need Triton 3\.5\.1 or newer"):
        backends.choose("triton", BF16, None)
    forget()


def test_the_versions_named_are_the_ones_tested() -> None:
    makefile = Path(__file__).parents[2].joinpath("Makefile").read_text()
    assert f"\nTRITONS = {' '.join(backends.TESTED_TRITON)}\n" in makefile


# --- Triton as it runs on a GPU, with an assembler that fails ---


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Triton believes that it is on a Hopper GPU, and tensors of the host are candidates for it."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(arch=90)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", target.arch, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(backends, "HOSTS", ())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield target
    forget()


def assembler(folder: Path, message: str) -> str:
    """A ptxas that knows its version and cannot do anything else."""
    path = folder / "ptxas"
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.8, V12.8.93"; exit 0; fi\n'
        f'echo "{message}" >&2\nexit 255\n'
    )
    path.chmod(0o755)
    return str(path)


def compiled_a_failing_compiler_falls_back_with_one_line(
    hopper: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import triton

    for variable in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # from 3.9 on the second also for Hopper
        monkeypatch.setenv(variable, assembler(tmp_path, "ptxas fatal : no such instruction"))
    for _ in range(2):
        assert backends.choose("auto", BF16, None) is torch_kernels
    (record,) = caplog.records
    text = record.getMessage()
    assert not capsys.readouterr().out  # Triton would print the program
    assert record.levelno == logging.WARNING and "\n" not in text
    assert text.startswith(
        f"Triton {triton.__version__} cannot run the log-prob kernels for bfloat16 on cpu: PTXASError"
    )
    assert "ptxas fatal : no such instruction" in text and "train.log_prob_backend" in text
    with pytest.raises(ConfigError) as error:
        backends.choose("triton", BF16, None)
    assert str(error.value) == text


def compiled_an_older_gpu_gets_torch_without_a_warning(hopper: Any, caplog: pytest.LogCaptureFixture) -> None:
    hopper.arch = 80
    assert backends.choose("auto", BF16, None) is torch_kernels
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"need compute capability 9\.0 or newer, cpu has 80"):
        backends.choose("triton", BF16, None)


# --- Ranks that share the vocabulary ---


def on_rank(broken: int | None, tp: int) -> tuple[Tensor, list[str], list[int], str, backends.Choice]:
    """log-probs of `auto`; what this rank logged; collectives of the first and second choice; the error of `triton`;
    what a run agrees on. On rank `broken`, Triton looks for a GPU and finds none."""
    rank = dist.get_rank()
    if rank == broken:
        os.environ["TRITON_INTERPRET"] = "0"
    backends.HOSTS = ()
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(backends.__name__).addHandler(handler)
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(n, 16, generator=generator) for n in (6, 40))
    targets_N, shard = torch.tensor([0, 39, 7, 20, 19, 3]), slice(rank * 40 // tp, (rank + 1) * 40 // tp)
    choice = backends.agree("auto", hidden_NH.device, hidden_NH.dtype, dist.group.WORLD)
    assert not logged, "a run prints the warning itself"
    backends._worst_trial.cache_clear()
    counts = []
    for _ in range(2):
        with Collectives() as collectives:
            backends.choose("auto", hidden_NH, dist.group.WORLD)
        counts.append(collectives.count.total())
    log_probs_N, _ = linear_log_probs(hidden_NH, weight_VH[shard], targets_N, group=dist.group.WORLD)
    wanted_N = torch.log_softmax(hidden_NH @ weight_VH.T, 1).gather(1, targets_N[:, None])[:, 0]
    torch.testing.assert_close(log_probs_N, wanted_N, rtol=1e-5, atol=1e-5)
    refusal = ""
    try:
        backends.choose("triton", hidden_NH, dist.group.WORLD)
    except ConfigError as error:
        refusal = str(error)
    is_triton = backends.choose("auto", hidden_NH, dist.group.WORLD) is not torch_kernels
    assert is_triton == (choice.backend == "triton")
    return log_probs_N, logged, counts, refusal, choice


def interpreted_ranks_that_can_all_use_it() -> None:
    for log_probs_N, said, counts, refusal, choice in (results := run_distributed(on_rank, 2, None, 2)):
        assert torch.equal(log_probs_N, results[0][0]) and not said and counts[0] and not counts[1] and not refusal
        assert choice == backends.Choice("triton")


@pytest.mark.parametrize("broken", [0, 1])
def interpreted_one_rank_that_cannot_takes_the_others_along(broken: int) -> None:
    """Whether they share its vocabulary or are its replicas; and one of them says so."""
    results = run_distributed(on_rank, 2, broken, 2)
    for rank, (log_probs_N, said, counts, refusal, choice) in enumerate(results):
        assert torch.equal(log_probs_N, results[0][0]) and counts[0] and not counts[1]
        assert refusal.startswith(f"rank {broken} of 2: Triton ") and "active" in refusal
        assert choice == backends.Choice("torch", refusal)
        assert said == ([refusal] if rank == 0 else [])


def test_other_threads_print_while_the_kernels_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    with backends._silence():
        print("the program")
        other = threading.Thread(target=print, args=("a line of metrics",))
        other.start()
        other.join()
    print("afterwards")
    assert capsys.readouterr().out == "a line of metrics\nafterwards\n"
