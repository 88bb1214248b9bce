"""DeepSeek-V3 against transformers, which shares no code with this package: log-probs, the gradient of every parameter,
greedy tokens, and weights there and back.

Both run in float64, with transformers' own casts to float32 lifted, so that 1e-10 can be asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Prompt, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.parameters import is_vocabulary
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.models.deepseek_v3 import DEEPSEEK_V3
from gspo_megatron.models.names import to_theirs
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed

transformers = pytest.importorskip("transformers")

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
SIZES: dict[str, Any] = {
    "vocab_size": 509,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
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
    "max_position_embeddings": 64,
    # A row that transformers' embedding would give no gradient.
    "pad_token_id": None,
    "rope_parameters": YARN,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "yarn": {},
    "plain": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "q_lora_rank": None,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-2,
        "tie_word_embeddings": True,
    },
    "deepseek": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "first_k_dense_replace": 2},
    "no mscale": {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 etp2": (2, ("parallel.tp=2", "parallel.etp=2")),
    "pp2": (2, ("parallel.pp=2",)),
    "pp2 vpp2": (2, ("parallel.pp=2", "parallel.vpp=2")),
    "ep2": (2, ("parallel.ep=2",)),
    "cp2": (2, ("parallel.cp=2",)),
    "tp2 ep2": (2, ("parallel.tp=2", "parallel.ep=2")),
    "tp2 pp2 ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
}


class Reference(NamedTuple):
    """A model of transformers, and what it computes.

    Attributes:
        folder: the model as it is on the hub.
        settings: of the same model here.
        sequences: ragged; the expected log-probs in the column old_log_probs, the loss's weights in ref_log_probs.
        gradients: of sum(weights * log-probs), by names on the hub.
    """

    folder: Path
    settings: tuple[str, ...]
    sequences: list[Sequence]
    gradients: dict[str, Tensor]
    model: Any


class Wider:
    """A module in which float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(self._module, name)


def lifted() -> ExitStack:
    """While it is open, transformers casts to float64 where it would cast to float32."""
    from transformers import modeling_rope_utils
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    stack = ExitStack()
    for module in (modeling_deepseek_v3, modeling_rope_utils):
        stack.enter_context(patch.object(module, "torch", Wider(torch)))
    return stack


def reference(folder: Path, variant: str) -> Reference:
    torch.manual_seed(5)
    config = transformers.DeepseekV3Config(**(SIZES | VARIANTS[variant]))
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    with lifted():
        model = transformers.DeepseekV3ForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.15 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_((0.1 * torch.randn(len(buffer))).float())  # kept in float32 here
    model.save_pretrained(folder)
    sequences = [scored_by(model, torch.randint(509, (length,))) for length in (5, 31, 2, 17, 40, 8)]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    shape = DEEPSEEK_V3.shape(config.to_dict())
    used = {
        k: v for k, v in asdict(shape).items() if k in DEEPSEEK_V3.uses or k not in ("num_query_groups", "head_dim")
    }
    return Reference(
        folder, tuple(f"model.{k}={v}" for k, v in used.items()), sequences, dict(by_expert(gradients)), model
    )


def scored_by(model: Any, tokens: Tensor) -> Sequence:
    """Adds the gradient of this sequence's part of the loss to the model's."""
    with lifted():
        log_probs = torch.log_softmax(model(tokens[None]).logits[0], -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    weights = torch.randn(len(log_probs), dtype=torch.float64)
    (weights * log_probs).sum().backward()
    columns = {"old_log_probs": log_probs.detach(), "ref_log_probs": weights}
    return Sequence.after_prompt(tokens.tolist(), 1, 0.0, columns)


def by_expert(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """In memory transformers joins the experts of a layer; on the hub they are apart."""
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{e}.{part}_proj.weight"), half
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), down
        else:
            yield name, tensor


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def find(variant: str) -> Reference:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if variant not in made:
                made[variant] = reference(tmp_path_factory.mktemp("hub"), variant)
        return made[variant]

    return find


# --------------------------------------------------------------------------------------------------------- on the ranks


def open_policy(world_size: int, settings: tuple[str, ...], folder: Path) -> MegatronPolicy:
    from safetensors import safe_open

    fixed = ("precision.device=cpu", "optimizer.clip_grad=1e9", "optimizer.distributed=false")
    config = load_config(None, ["precision.dtype=fp64", *fixed, *settings])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    with safe_open(folder / "model.safetensors", "pt") as file:
        policy.load_weights(file.get_slice, DEEPSEEK_V3.rules)
    return policy


Slices = list[tuple[Place, Tensor]]


def scored(
    world_size: int, settings: tuple[str, ...], folder: Path, sequences: list[Sequence]
) -> tuple[float, int, Slices]:
    """(largest difference of a log-prob, log-probs that were compared, slices of gradients)."""
    policy = open_policy(world_size, settings, folder)
    groups, rules = policy.groups, packing_rules(policy.config)
    ranks = {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size, "cp_rank": groups.cp_rank, "cp_size": groups.cp_size}
    micro_batches = pack(sequences, pad_id=0, max_tokens=128, rules=rules, **ranks)
    expected = [m.columns["old_log_probs"] for m in micro_batches]
    worst = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(policy.log_probs(micro_batches), expected, strict=True)
    )

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        return LossTerms((m.columns["ref_log_probs"].to(log_probs_R) * log_probs_R).sum(), {})

    policy.update(UpdateBatch(micro_batches, len(sequences), 1), loss, lr=0.0)
    gradients = [(place, gradient.clone()) for place, gradient in policy.gradients()]
    return worst, sum(map(len, expected)), gradients


def round_trip(world_size: int, settings: tuple[str, ...], folder: Path) -> int:
    """The number of tensors that are bit for bit those of the folder: all of them, on every rank."""
    from safetensors.torch import load_file

    policy = open_policy(world_size, settings, folder)
    theirs, ours = load_file(folder / "model.safetensors"), dict(policy.weights(DEEPSEEK_V3.rules))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.double(), theirs[name].double()), name
    assert policy.differing_replicas() == []
    return len(ours)


def sampled(
    world_size: int, settings: tuple[str, ...], folder: Path, prompts: list[tuple[int, ...]], greedy: bool
) -> list[tuple[list[int], list[float]]]:
    policy = open_policy(world_size, (*settings, "rollout.max_new_tokens=9", "rollout.max_batch=4"), folder)
    sampler = MegatronSampler(policy, stop_ids=[-1], pad_id=0)
    asked = [Prompt(i, "", tokens, "") for i, tokens in enumerate(prompts)]
    ids = list(range(len(prompts)))
    mine = slice(policy.groups.dp_rank, None, policy.groups.dp_size)
    drawn = sampler.generate(asked[mine], ids[mine], greedy=greedy)
    return [(list(r.tokens), list(r.log_probs)) for r in drawn]


# --------------------------------------------------------------------------------------------------------------- tests


def joined(results: list[tuple[float, int, Slices]], vocab_size: int) -> dict[str, Tensor]:
    """Whole gradients by their names on the hub."""
    parts = {place: tensor for _, _, slices in results for place, tensor in slices}
    wholes: dict[str, Tensor] = {}
    for place in parts:
        if place.index == 0:
            each = [
                next(t for p, t in parts.items() if (p.name, p.index) == (place.name, i)) for i in range(place.count)
            ]
            whole = place.join(each)
            wholes[place.name] = whole[:vocab_size] if is_vocabulary(place.name) else whole
    return wholes


@pytest.mark.parametrize(
    ("variant", "layout"), [*(("yarn", layout) for layout in LAYOUTS), *((v, "tp2") for v in VARIANTS if v != "yarn")]
)
def test_log_probs_and_gradients_are_those_of_transformers(
    variant: str, layout: str, references: Callable[[str], Reference]
) -> None:
    ref = references(variant)
    world_size, axes = LAYOUTS[layout]
    results = run_distributed(scored, world_size, world_size, (*ref.settings, *axes), ref.folder, ref.sequences)
    assert sum(count for _, count, _ in results) >= sum(len(s) - 1 for s in ref.sequences)
    assert max(worst for worst, _, _ in results) < 1e-10
    shape = load_config(None, list(ref.settings)).model.shape
    ours = {
        name: part
        for our_name, whole in joined(results, 509).items()
        for name, part in to_theirs(DEEPSEEK_V3.rules, our_name, whole, shape)
    }
    theirs = {name: gradient for name, gradient in ref.gradients.items() if name in ours}
    assert len(theirs) == len(ours) == len(ref.gradients)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()), msg=name)


def test_float32_is_close(references: Callable[[str], Reference]) -> None:
    ref = references("yarn")
    [(worst, _, _)] = run_distributed(scored, 1, 1, (*ref.settings, "precision.dtype=fp32"), ref.folder, ref.sequences)
    assert worst < 5e-5


@pytest.mark.parametrize("layout", ["one", "tp2 etp2", "pp2 vpp2", "ep2", "tp2 pp2 ep2"])
def test_weights_come_back_bit_for_bit(layout: str, references: Callable[[str], Reference]) -> None:
    ref = references("yarn")
    world_size, axes = LAYOUTS[layout]
    counts = run_distributed(round_trip, world_size, world_size, (*ref.settings, *axes), ref.folder)
    assert set(counts) == {3 + 4 * 9 + 3 + 3 * (2 + 3 + 12 * 3)}


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "ep2"])
def test_greedy_tokens_are_those_of_transformers(layout: str, references: Callable[[str], Reference]) -> None:
    """Through the cache of latents, in several batches."""
    ref = references("yarn")
    prompts = [tuple(s.tokens[: 1 + 3 * i].tolist()) for i, s in enumerate(ref.sequences)]
    world_size, axes = LAYOUTS[layout]
    drawn = run_distributed(sampled, world_size, world_size, (*ref.settings, *axes), ref.folder, prompts, True)
    ours = [tokens for tokens, _ in drawn[0]]
    if layout == "ep2":
        ours = [tokens for pair in zip(drawn[0], drawn[1], strict=True) for tokens, _ in pair]
    for prompt, tokens in zip(prompts, ours, strict=True):
        with lifted(), torch.no_grad():
            row = list(prompt)
            for _ in range(9):
                row.append(int(ref.model(torch.tensor([row])).logits[0, -1].argmax()))
        assert tokens == row[len(prompt) :]


@pytest.mark.parametrize("variant", ["yarn", "plain"])
def test_sampled_log_probs_are_those_of_transformers(variant: str, references: Callable[[str], Reference]) -> None:
    ref = references(variant)
    prompts = [tuple(s.tokens[: 1 + 3 * i].tolist()) for i, s in enumerate(ref.sequences)]
    [drawn] = run_distributed(sampled, 1, 1, ref.settings, ref.folder, prompts, False)
    for prompt, (tokens, log_probs) in zip(prompts, drawn, strict=True):
        row = torch.tensor([*prompt, *tokens])
        with lifted(), torch.no_grad():
            every = torch.log_softmax(ref.model(row[None]).logits[0], -1)[:-1].gather(1, row[1:, None])[:, 0]
        found = torch.tensor(log_probs, dtype=torch.float64)
        torch.testing.assert_close(found, every[len(prompt) - 1 :], rtol=0, atol=1e-10)
