"""The table of number formats against Transformer Engine's own checks, and its import against the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_recipe

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.device.facts import Gpu, Machine, Package, version_of
from gspo_megatron.device.machine import Needs, problems
from gspo_megatron.device.own import this_process
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import build_model
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

pytestmark = pytest.mark.te
FP8 = [name for name, recipe in RECIPES.items() if recipe.quantizes]


def te_recipe(name: str) -> Any:
    """Megatron's own translation of its settings."""
    settings = {"fp8_dot_product_attention": False, **RECIPES[name].megatron}
    return get_fp8_recipe(SimpleNamespace(**settings))


def quantizer(name: str) -> Any:
    """What quantizes activations, made without its constructor, which asks the compiled extension."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    made: Any = {"blockwise": Float8BlockQuantizer, "mxfp8": MXFP8Quantizer}[name]
    made = made.__new__(made)
    made.block_len = 128
    return made


@pytest.mark.parametrize("name", FP8)
def test_smoke_rows_and_columns_of_a_recipe_pass_transformer_engines_checks(name: str) -> None:
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    recipe = RECIPES[name]
    assert_dim_for_fp8_exec(torch.empty(recipe.row_multiple, recipe.column_multiple))
    with pytest.raises((AssertionError, ValueError)):
        assert_dim_for_fp8_exec(torch.empty(recipe.row_multiple, recipe.column_multiple // 2 + 1))
    # Megatron pads the tokens of each expert to this.
    assert recipe.row_multiple % get_fp8_align_size(recipe.megatron["fp8_recipe"]) == 0


@pytest.mark.parametrize("name", ["blockwise", "mxfp8"])
def test_smoke_a_ranks_rows_are_gathered_in_fp8(name: str) -> None:
    """`is_quantizable` decides in transformer_engine.pytorch.distributed whether bf16 is gathered instead."""
    width, rows = 4096, RECIPES[name].gathered_row_multiple
    assert quantizer(name).is_quantizable(torch.empty(rows, 1, width, device="meta"))
    assert not quantizer(name).is_quantizable(torch.empty(rows // 2, 1, width, device="meta"))


@pytest.mark.parametrize("name", FP8)
def test_smoke_megatron_makes_the_recipe_of_the_table(name: str) -> None:
    from transformer_engine.common.recipe import Format

    kind = {"blockwise": "float8_block_scaling", "tensorwise": "float8_current_scaling", "mxfp8": "mxfp8"}[name]
    recipe = te_recipe(name)
    assert getattr(recipe, kind)()
    assert recipe.fp8_format == {"e4m3": Format.E4M3, "hybrid": Format.HYBRID}[RECIPES[name].megatron["fp8"]]


@pytest.mark.parametrize("value", ["0", "1"])
def test_smoke_float32_scales_are_read_when_transformer_engine_is_imported(value: str) -> None:
    """Setting the variable afterwards changes nothing."""
    code = (
        "import os\n"
        "from transformer_engine.common.recipe import Float8BlockScaling as recipe\n"
        "os.environ['NVTE_FP8_BLOCK_SCALING_FP32_SCALES'] = '1'\n"
        "print(recipe().fp8_quant_fwd_inp.power_2_scale)"
    )
    environment = os.environ | {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(value == "0")], done.stderr


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("cuda", ["12.6", "12.8", "12.9", "13.0"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_smoke_what_a_gpu_lacks_is_what_transformer_engine_says(
    name: str, capability: tuple[int, int], cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own rules: CUDA that has Blackwell at all (12.8), and no blockwise scaling there, which it emulates."""
    from transformer_engine.pytorch import quantization

    monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    check = {"blockwise": "fp8_block_scaling", "tensorwise": "fp8", "mxfp8": "mxfp8"}[name]
    # Its checks remember their first answer: 2.20 computes it in a function of its own, 2.10 in one that is wrapped.
    computed = getattr(quantization, f"_compute_{check}_support", None)
    supported, why = (computed or getattr(quantization, f"check_{check}_support").__wrapped__)()
    machine = Machine(
        torch=Package("2.14.1"),
        torch_cuda=version_of(cuda),
        gpus=(Gpu("GPU", capability, 80.0),),
        transformer_engine=Package("2.20.2"),
    )
    found = [str(problem) for problem in problems(machine, Needs(fp8=name))]
    ours = (name == "mxfp8" and cuda == "12.6") or (name == "blockwise" and capability >= (10, 0))
    assert (found == []) == supported or ours, (found, why)


def built_deterministic(allowed: str) -> str:
    """What Megatron says when it builds attention of Transformer Engine in deterministic mode."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = allowed
    config = load_config(None, [*SMALL, "precision.dtype=bf16", "precision.deterministic=true"])
    device = open_device("cpu", "bf16", deterministic=True)
    groups = Groups(check_config(config, 1), device.torch_device)
    compat.apply_patches(on_cpu=True)
    try:
        build_model(config, groups, device, use_te=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_smoke_megatron_takes_the_environment_of_deterministic() -> None:
    assert run_distributed(built_deterministic, 1, "0") == [""]
    [message] = run_distributed(built_deterministic, 1, "1")
    assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO is not 0" in message


def test_smoke_the_pair_of_this_environment_works() -> None:
    compat.check_transformer_engine()
    assert this_process().transformer_engine.works


def test_smoke_a_pair_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.extensions, "HAVE_TE", False)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", None)
    with pytest.raises(ConfigError, match=r"Megatron-Core .* cannot use .* \(import of transformer_engine.pytorch.fp8"):
        compat.check_transformer_engine()
