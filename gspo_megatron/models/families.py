"""The model families that can be trained. A new one is a file, and a row here."""

from __future__ import annotations

from gspo_megatron.models.deepseek_v3 import DEEPSEEK_V3
from gspo_megatron.models.family import Family
from gspo_megatron.models.glm4_moe import GLM4_MOE
from gspo_megatron.models.gpt_oss import GPT_OSS
from gspo_megatron.models.mixtral import MIXTRAL
from gspo_megatron.models.parts import SIGMOID_ROUTER
from gspo_megatron.models.qwen3 import QWEN3
from gspo_megatron.models.qwen3_moe import QWEN3_MOE
from gspo_megatron.models.qwen3_next import QWEN3_NEXT
from gspo_megatron.models.shape import ModelShape

FAMILIES: dict[str, Family] = {
    family.name: family for family in (QWEN3_MOE, QWEN3, MIXTRAL, GLM4_MOE, DEEPSEEK_V3, GPT_OSS, QWEN3_NEXT)
}


def family_of(shape: ModelShape) -> Family:
    """The row that `shape.family` names."""
    return FAMILIES[shape.family]


def has_sigmoid_router(name: str) -> bool:
    """Whether each expert has a sigmoid of its own, in place of a softmax over all of them."""
    return FAMILIES[name].uses >= SIGMOID_ROUTER
