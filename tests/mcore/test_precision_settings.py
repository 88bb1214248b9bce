"""What precision.* becomes in Megatron-Core's own configuration. Its FP8 arithmetic needs Transformer Engine."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core import utils
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from packaging.version import Version

from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.mcore.model import transformer_config
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_model import build
from tests.support.small import SMALL

ON_GPU = ("model.num_layers=6", "precision.dtype=bf16", "model.hidden_size=256")


def transformer(*overrides: str) -> Any:
    """Megatron's configuration of a run on a GPU. It asks which Transformer Engine is installed."""
    utils._te_version = Version("2.20.2")
    config = load_config(None, [*SMALL, *ON_GPU, *overrides])
    return transformer_config(config, open_device("cpu", "bf16"), "te")


def settings_of(*overrides: str) -> dict[str, Any]:
    transformer_of_run = transformer(*overrides)
    fields = ("fp8", "fp8_recipe", "fp8_param", "fp8_dot_product_attention", "fp8_multi_head_attention", "fp8_wgrad")
    others = ("moe_router_dtype", "deterministic_mode", "params_dtype", "fp8_output_proj")
    found = {name: getattr(transformer_of_run, name, None) for name in (*fields, *others)}
    bf16 = [is_first_last_bf16_layer(transformer_of_run, layer) for layer in range(6)]
    return {**found, "bf16_layers": bf16}


@pytest.mark.parametrize("fp8", RECIPES)
def test_a_recipe_sets_the_format_of_attention_and_experts_alone(fp8: str) -> None:
    """Parameters, attention scores, router and output head keep precision.dtype or float32."""
    [found] = run_distributed(settings_of, 1, f"precision.fp8={fp8}")
    for name, value in RECIPES[fp8].megatron.items():
        assert found[name] == value
    if fp8 == "none":
        assert found["fp8"] is None
    assert not any(found[name] for name in ("fp8_param", "fp8_dot_product_attention", "fp8_multi_head_attention"))
    assert not found["fp8_output_proj"] and found["moe_router_dtype"] == "fp32" and found["fp8_wgrad"]
    assert not any(found["bf16_layers"]) and found["deterministic_mode"] is False


def test_formats_of_the_recipes() -> None:
    assert {name: recipe.megatron.get("fp8") for name, recipe in RECIPES.items()} == {
        "none": None,
        "blockwise": "e4m3",
        "tensorwise": "hybrid",
        "mxfp8": "e4m3",
    }


@pytest.mark.parametrize("ends", [1, 2])
def test_layers_at_both_ends_stay_in_bf16(ends: int) -> None:
    [found] = run_distributed(
        settings_of, 1, "precision.fp8=blockwise", f"precision.first_last_layers_bf16={ends}", "parallel.pp=2"
    )
    assert found["bf16_layers"] == [layer < ends or layer >= 6 - ends for layer in range(6)]


def test_deterministic_reaches_megatron() -> None:
    [found] = run_distributed(settings_of, 1, "precision.deterministic=true")
    assert found["deterministic_mode"] is True


def classes() -> tuple[bool, bool, str]:
    _, _, _, models = build(1)
    model = models[0]
    router = model.decoder.layers[0].mlp.router
    return (
        type(model.output_layer) is ColumnParallelLinear,
        type(model.embedding.word_embeddings) is VocabParallelEmbedding,
        type(router).__module__,
    )


def test_head_embedding_and_router_are_no_layers_of_a_spec() -> None:
    """Megatron builds them itself, whatever the layers: FP8 never reaches them."""
    assert run_distributed(classes, 1) == [(True, True, "megatron.core.transformer.moe.router")]
