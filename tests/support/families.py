"""The independent lists of tensors by family."""

from __future__ import annotations

from collections.abc import Callable

from gspo_megatron.models.shape import ModelShape
from tests.support import deepseek_v3, grouped_query, qwen3_next

Sizes = Callable[[ModelShape], dict[str, tuple[int, ...]]]

HUB_SIZES: dict[str, Sizes] = {
    "deepseek_v3": deepseek_v3.hub_sizes,
    "qwen3_next": qwen3_next.hub_sizes,
    **dict.fromkeys(grouped_query.NAMES, grouped_query.hub_sizes),
}
"""Names and sizes in the safetensors files on the hub."""
OUR_SIZES: dict[str, Sizes] = {
    "deepseek_v3": deepseek_v3.our_sizes,
    "qwen3_next": qwen3_next.our_sizes,
    **dict.fromkeys(grouped_query.NAMES, grouped_query.our_sizes),
}
"""Names and sizes in the model here."""
