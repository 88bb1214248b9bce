"""Tiny random models of transformers, written to folders, and what transformers computes with them: log-probs, the
gradient of every parameter, greedy tokens. It shares no code with this package.

It computes in float64, with its own casts to float32 lifted, so that 1e-10 can be asked for. The sizes are awkward:
what is not a power of two cannot hide behind one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from gspo_megatron.base.batches import Sequence
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.family import Family
from gspo_megatron.models.shape import OPTIONAL, ModelShape

VOCABULARY = 509
LENGTHS = (5, 31, 2, 4, 6, 40, 7, 8)
"""Among them the windows of mixtral (7) and gpt_oss (5), and one less and one more."""
ADVANTAGES = (1.0, -0.5, 0.25, -1.5, 0.75, 0.5, -1.0, 1.25)
CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4
"""Of GSPO, arXiv 2507.18071, Section 5.1."""
NOISE = 2e-3

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    # A row that transformers' embedding would give no gradient.
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GROUPED_QUERY: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 10}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}


@dataclass(frozen=True)
class Model:
    """A family's classes in transformers, sizes, and variants of them. The first variant is compared on every layout,
    the others on tp 2."""

    architecture: str
    sizes: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Matrices of an expert on the hub."""
    renamed: tuple[str, str] = ("", "")
    """Part of a name in memory, and on the hub."""
    float32: float = 5e-5
    """Largest difference of a log-prob in float32."""


MODELS: dict[str, Model] = {
    "qwen3_moe": Model(
        "Qwen3Moe",
        {
            **GROUPED_QUERY,
            "moe_intermediate_size": 14,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "rope_parameters": PLAIN,
        },
        {"untied": {}, "tied": {"tie_word_embeddings": True}},
    ),
    "qwen3": Model(
        "Qwen3",
        {**GROUPED_QUERY, "intermediate_size": 44, "rope_parameters": PLAIN | {"rope_theta": 1e6}},
        {"tied": {"tie_word_embeddings": True}, "untied": {"rms_norm_eps": 1e-2}},
    ),
    "mixtral": Model(
        "Mixtral",
        {
            **GROUPED_QUERY,
            "intermediate_size": 14,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "rope_parameters": PLAIN,
        },
        {"window": {"sliding_window": 7}, "no window": {"head_dim": None, "tie_word_embeddings": True}},
        gate_up_down=("w1", "w3", "w2"),
        renamed=(".mlp.", ".block_sparse_moe."),
    ),
    "gpt_oss": Model(
        "GptOss",
        {
            **GROUPED_QUERY,
            "intermediate_size": 14,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"truncate": False},
        },
        {"yarn": {}, "plain": {"rope_parameters": PLAIN, "tie_word_embeddings": True}},
    ),
    "qwen3_next": Model(
        "Qwen3Next",
        {
            **GROUPED_QUERY,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "moe_intermediate_size": 14,
            "shared_expert_intermediate_size": 22,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            # 6 of 10 dimensions
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.65},
        },
        {
            "every third": {"full_attention_interval": 3},
            "tied": {"linear_num_value_heads": 2, "tie_word_embeddings": True},
        },
        # The two forms of the rule in transformers itself, by chunks and by tokens, differ by 2.3e-4.
        float32=5e-4,
    ),
    "glm4_moe": Model(
        "Glm4Moe",
        {
            **GROUPED_QUERY,
            "attention_bias": True,
            "use_qk_norm": True,
            "intermediate_size": 44,
            "moe_intermediate_size": 14,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            # 6 of 10 dimensions
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.65},
        },
        {
            "large": {},
            "air": {
                "use_qk_norm": False,
                "first_k_dense_replace": 2,
                "n_shared_experts": 1,
                "tie_word_embeddings": True,
            },
            "no bias": {"attention_bias": False, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        },
    ),
    "deepseek_v3": Model(
        "DeepseekV3",
        {
            **COMMON,
            "num_key_value_heads": 6,
            "q_lora_rank": 20,
            "kv_lora_rank": 14,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 12,
            "intermediate_size": 44,
            "moe_intermediate_size": 14,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
            "rope_parameters": YARN,
        },
        {
            "yarn": {},
            "plain": {
                "rope_parameters": PLAIN,
                "q_lora_rank": None,
                "num_experts_per_tok": 3,
                "n_group": 1,
                "topk_group": 1,
                "n_shared_experts": 1,
                "rms_norm_eps": 1e-2,
                "tie_word_embeddings": True,
            },
            "deepseek": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "first_k_dense_replace": 2},
            "no mscale": {
                "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"truncate": False}
            },
        },
    ),
}
"""By family."""


class Reference(NamedTuple):
    """A model of transformers, and what it computes.

    Attributes:
        folder: the model as it is on the hub.
        settings: of the same model here.
        sequences: ragged; the log-probs of transformers in the column old_log_probs, random weights in ref_log_probs.
        gradients: of the loss of a GSPO update + sum(weights * log-probs), by names on the hub. The old log-probs of
            the update are log-probs + NOISE * weights.
    """

    family: Family
    folder: Path
    settings: tuple[str, ...]
    sequences: list[Sequence]
    gradients: dict[str, Tensor]
    model: Any

    @property
    def shape(self) -> ModelShape:
        return self.family.shape(self.model.config.to_dict())

    @property
    def names(self) -> set[str]:
        """Of all tensors in the folder."""
        from safetensors import safe_open

        with safe_open(self.folder / "model.safetensors", "pt") as file:
            return set(file.keys())

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Of all tokens but the first."""
        with lifted(self.family.name):
            every = torch.log_softmax(self.model(tokens[None]).logits[0], -1)
        return every[:-1].gather(1, tokens[1:, None])[:, 0]

    @torch.no_grad()
    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        row = list(prompt)
        with lifted(self.family.name):
            for _ in range(num_tokens):
                row.append(int(self.model(torch.tensor([row])).logits[0, -1].argmax()))
        return row[len(prompt) :]


class Wider:
    """A module in which float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(self._module, name)


def lifted(family: str) -> ExitStack:
    """While it is open, transformers casts to float64 where it would cast to float32."""
    stack = ExitStack()
    for module in (f"models.{family}.modeling_{family}", "modeling_rope_utils"):
        stack.enter_context(patch.object(importlib.import_module(f"transformers.{module}"), "torch", Wider(torch)))
    # What it calls on a tensor, such as positions.float(), the module's own name does not reach.
    stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
    return stack


def drawn(family: str, variant: str, dtype: torch.dtype) -> Any:
    """A model of transformers with random weights, wide enough that no part of it is without effect."""
    import transformers

    torch.manual_seed(5)
    about = MODELS[family]
    config = getattr(transformers, f"{about.architecture}Config")(**(about.sizes | about.variants[variant]))
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = getattr(transformers, f"{about.architecture}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_((0.1 * torch.randn(len(buffer))).float())  # kept in float32 here
    return model


def reference(family: str, variant: str, folder: Path) -> Reference:
    about = MODELS[family]
    with lifted(family):
        model = drawn(family, variant, torch.float64)
    model.save_pretrained(folder)
    config = model.config
    shape = FAMILIES[family].shape(config.to_dict())
    used = {k: v for k, v in asdict(shape).items() if k in FAMILIES[family].uses or k not in OPTIONAL}
    settings = tuple(f"model.{k}={v}" for k, v in used.items())
    found = Reference(FAMILIES[family], folder, settings, [], {}, model)
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        found.sequences.append(scored(found, torch.randint(VOCABULARY, (length,)), advantage))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return found._replace(gradients=dict(by_expert(gradients, found.names, about)))


def scored(ref: Reference, tokens: Tensor, advantage: float) -> Sequence:
    """Adds the gradient of this sequence's part of the loss to the model's. Some ratios are clipped, some are not."""
    log_probs = ref.log_probs(tokens)
    weights = torch.randn(len(log_probs), dtype=torch.float64)
    old = log_probs.detach() + NOISE * weights
    ratio = (log_probs - old).mean().exp()
    gspo = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage) / len(LENGTHS)
    (gspo + (weights * log_probs).sum()).backward()
    columns = {"old_log_probs": log_probs.detach(), "ref_log_probs": weights}
    return Sequence.after_prompt(tokens.tolist(), 1, advantage, columns)


def by_expert(
    tensors: Mapping[str, Tensor], on_the_hub: AbstractSet[str], about: Model
) -> Iterator[tuple[str, Tensor]]:
    """In memory transformers joins the experts of a layer; on the hub most families have them apart."""
    gate, up, down = about.gate_up_down
    for in_memory, tensor in tensors.items():
        name = in_memory.replace(*about.renamed)
        if name in on_the_hub:
            yield name, tensor
        elif name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, half in zip((gate, up), both.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{e}.{part}.weight"), half
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(tensor):
                yield name.replace("down_proj", f"{e}.{down}.weight"), matrix
        else:
            yield name, tensor
