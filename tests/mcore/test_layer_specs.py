"""Layer specs: every layer has one attention core, whether Megatron lists its spec once or many times."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.mcore.attention import PackedAttention
from gspo_megatron.mcore.layers import LAYERS, distinct_layers, wrap_attention_cores
from gspo_megatron.mcore.model import transformer_config
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL


def transformer(layers: str = "local") -> Any:
    config = load_config(None, [*SMALL, "model.num_layers=4"])
    return transformer_config(config, open_device("cpu", "fp32"), layers)


def cores(block: Any) -> list[Any]:
    return [layer.submodules.self_attention.submodules.core_attention for layer in block.layer_specs]


def wrapped_once() -> tuple[int, int, list[bool], list[bool]]:
    """Megatron's own spec stands in for that of Transformer Engine, which needs a GPU."""
    block = get_gpt_decoder_block_spec(transformer(), use_transformer_engine=False, pp_rank=0, vp_stage=None)
    before = cores(block)
    wrap_attention_cores(block)
    after = cores(block)
    inside = [core.params["fused"] is own for core, own in zip(after, before, strict=True)]
    return len(block.layer_specs), len(distinct_layers(block)), [c.module is PackedAttention for c in after], inside


def test_no_attention_core_is_inside_another() -> None:
    [(layers, distinct, outside, inside)] = run_distributed(wrapped_once, 1)
    assert layers == 4 > distinct, "Megatron lists one spec for all layers of a kind: what this test is about"
    assert all(outside) and all(inside)


def local_cores() -> list[tuple[bool, Any]]:
    return [
        (core.module is PackedAttention, core.params) for core in cores(LAYERS["local"].spec(transformer(), 0, None))
    ]


def test_local_layers_have_no_fused_core() -> None:
    assert run_distributed(local_cores, 1) == [[(True, {"fused": None})] * 4]


def settings() -> list[tuple[bool, Any]]:
    return [(transformer(layers).moe_grouped_gemm, transformer(layers).activation_func) for layers in LAYERS]


def test_each_kind_of_layer_brings_its_settings() -> None:
    assert run_distributed(settings, 1) == [[(False, torch.nn.functional.silu), (True, torch.nn.functional.silu)]]
