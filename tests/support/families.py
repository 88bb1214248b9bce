"""The independent lists of tensors by family."""

from __future__ import annotations

from collections.abc import Callable

from gspo_megatron.models.shape import ModelShape
from tests.support import deepseek_v3, qwen3_moe

Sizes = Callable[[ModelShape], dict[str, tuple[int, ...]]]

HUB_SIZES: dict[str, Sizes] = {"qwen3_moe": qwen3_moe.hub_sizes, "deepseek_v3": deepseek_v3.hub_sizes}
"""Names and sizes in the safetensors files on the hub."""
OUR_SIZES: dict[str, Sizes] = {"qwen3_moe": qwen3_moe.our_sizes, "deepseek_v3": deepseek_v3.our_sizes}
"""Names and sizes in the model here."""
