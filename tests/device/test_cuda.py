"""The environment of a GPU run, and what happens before the first call to CUDA. No test here needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.device import cuda, open_device
from gspo_megatron.device.cuda import ALWAYS, DETERMINISTIC, set_variables, variables_of
from gspo_megatron.device.precision import RECIPES

ROOT = Path(__file__).parents[2]

RECORDER = """
import json, os, sys
import torch

WATCHED = {watched}
seen = []

def recorded(name, answer):
    def call(*args, **kwargs):
        seen.append([name, list(args), {{key: os.environ.get(key) for key in WATCHED}}])
        return answer
    return call

torch.backends.cuda.is_built = lambda: True
torch.cuda.is_available = recorded("is_available", True)
torch.cuda.device_count = recorded("device_count", 8)
torch.cuda.set_device = recorded("set_device", None)

from gspo_megatron.device import open_device

device = open_device({device!r}, "bf16", fp8={fp8!r}, deterministic={deterministic})
libraries = [name for name in sys.modules if name.startswith(("megatron", "transformer_engine"))]
print(json.dumps([seen, str(device.torch_device), list(device.warnings), libraries,
                  torch.are_deterministic_algorithms_enabled()]))
"""


def opened(
    device: str, fp8: str = "none", deterministic: bool = False, **user: str
) -> tuple[list, str, list, list, bool]:
    """`open_device` in a process whose torch.cuda records its calls, with the environment that each one saw."""
    watched = [variable.name for variable in variables_of(fp8, deterministic)]
    code = RECORDER.format(watched=watched, device=device, fp8=fp8, deterministic=deterministic)
    of_ours = {variable.name for variable in (*ALWAYS, *DETERMINISTIC)} | set(RECIPES["blockwise"].environment)
    clean = {key: value for key, value in os.environ.items() if key not in of_ours}
    environment = {**clean, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "3", **user}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))  # type: ignore[return-value]


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_variables_are_set_before_the_first_call_to_cuda(device: str) -> None:
    seen, where, warnings, libraries, _ = opened(device, "blockwise", deterministic=True)
    expected = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }
    assert [name for name, _, _ in seen][-1] == "set_device" and len(seen) >= 3
    assert all(environment == expected for _, _, environment in seen)
    assert (where, warnings) == ("cuda:3", [])
    assert libraries == [], "they read the environment when they are imported, which must come later"


def test_only_what_is_asked_for_is_set() -> None:
    names = [variable.name for variable in variables_of("tensorwise", False)]
    assert names == [variable.name for variable in ALWAYS]
    assert opened("cuda")[4] is False
    assert opened("cuda", deterministic=True)[4] is True


def test_the_users_values_stay_and_those_that_cost_something_are_told() -> None:
    seen, _, warnings, _, _ = opened(
        "cuda",
        "blockwise",
        CUDA_DEVICE_MAX_CONNECTIONS="8",
        PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512",
        NVTE_FP8_BLOCK_SCALING_FP32_SCALES="0",
    )
    assert seen[0][2] == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0",
    }
    connections, scales = warnings
    assert connections.startswith("CUDA_DEVICE_MAX_CONNECTIONS=8 in the environment is kept; a run sets 1: ")
    assert scales.startswith("NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0 in the environment is kept; a run sets 1: ")


@pytest.mark.parametrize("variable", DETERMINISTIC, ids=lambda variable: variable.name)
def test_a_value_that_contradicts_determinism_is_refused(variable: cuda.Variable) -> None:
    with pytest.raises(
        ConfigError, match=f"precision.deterministic=true with {variable.name}=x .* unset {variable.name}"
    ):
        set_variables([variable], {variable.name: "x"})
    for value in (variable.value, *variable.accepted):
        assert set_variables([variable], {variable.name: value}) == []


def test_another_name_of_a_setting_counts() -> None:
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    assert set_variables(ALWAYS[1:], environment) == []
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}


def test_a_run_on_the_cpu_sets_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [variable.name for variable in variables_of("blockwise", True)]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    device = open_device("cpu", "fp32", fp8="blockwise")
    assert device.on_cpu and device.warnings == ()
    assert not os.environ.keys() & set(names)


@pytest.mark.parametrize(
    ("count", "visible", "message"),
    [
        (4, None, r"LOCAL_RANK=4, but this process sees 4 GPUs: .* --nproc_per_node 4"),
        (1, "0", r"LOCAL_RANK=4, but this process sees 1 GPU \(CUDA_VISIBLE_DEVICES=0\): .* --nproc_per_node 1"),
    ],
)
def test_more_processes_than_gpus(
    count: int, visible: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=message):
        cuda.open_gpu(4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ALWAYS:
        monkeypatch.setenv(variable.name, variable.value)
    with pytest.raises(ConfigError, match=r"precision.device=cuda, but .* or set precision.device=cpu$"):
        open_device("cuda", "bf16")
