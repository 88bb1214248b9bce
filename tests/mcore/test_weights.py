"""The policy's weights by their names on the hub: the same on every layout, and loaded by transformers as the same
model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.log_probs import vocab_parallel_logits
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.mcore.parameters import is_vocabulary, named_parameters
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.models.families import family_of
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.grouped_query import hub_sizes, our_sizes
from tests.support.small import SMALL

SETTINGS = (*SMALL, "model.num_layers=4", "model.max_sequence_length=32", "model.init_std=0.2", "precision.dtype=fp32")


def open_policy(world_size: int, *overrides: str) -> MegatronPolicy:
    config = load_config(None, [*SETTINGS, *overrides])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)


def exported(world_size: int, overrides: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    policy = open_policy(world_size, *overrides)
    rules = family_of(policy.config.model.shape).rules
    found = []
    for name, tensor in policy.weights(rules):
        assert tensor.is_contiguous()
        found.append((name, tensor.clone()))
    return found


@pytest.fixture(scope="module")
def one() -> list[tuple[str, Tensor]]:
    """The weights on one process."""
    return run_distributed(exported, 1, 1, ())[0]


def test_names_and_sizes_are_those_of_the_hub(one: list[tuple[str, Tensor]]) -> None:
    shape = load_config(None, SETTINGS).model.shape
    assert {name: tuple(tensor.shape) for name, tensor in one} == hub_sizes(shape)
    assert len(one) == len(hub_sizes(shape))


def test_tied_embeddings_leave_no_head() -> None:
    [weights] = run_distributed(exported, 1, 1, ("model.tie_embeddings=true",))
    shape = load_config(None, [*SETTINGS, "model.tie_embeddings=true"]).model.shape
    assert {name: tuple(tensor.shape) for name, tensor in weights} == hub_sizes(shape)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ()),
        (2, ("parallel.tp=2",)),
        (2, ("parallel.tp=2", "parallel.etp=2")),
        (2, ("parallel.etp=2",)),
        (2, ("parallel.ep=2",)),
        (2, ("parallel.cp=2",)),
        (2, ("parallel.pp=2",)),
        (2, ("parallel.pp=2", "parallel.vpp=2")),
        (2, ("parallel.pp=2", "parallel.first_stage_layers=1")),
        (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
        (4, ("parallel.pp=2", "parallel.vpp=2", "parallel.etp=2")),
        (4, ("parallel.tp=2", "parallel.ep=2", "parallel.etp=2")),
        (2, ("parallel.tp=2", "precision.dtype=bf16")),
    ],
    ids=lambda value: " ".join(value) or "dp=2" if isinstance(value, tuple) else None,
)
def test_weights_are_the_same_on_every_layout(
    world_size: int, overrides: tuple[str, ...], one: list[tuple[str, Tensor]]
) -> None:
    """To the last bit, in the same order, on every rank."""
    dtype = torch.bfloat16 if "precision.dtype=bf16" in overrides else torch.float32
    for weights in run_distributed(exported, world_size, world_size, overrides):
        assert [name for name, _ in weights] == [name for name, _ in one]
        for (name, tensor), (_, expected) in zip(weights, one, strict=True):
            assert tensor.dtype == dtype and torch.equal(tensor, expected.to(dtype)), name


def our_parameters() -> dict[str, tuple[int, ...]]:
    policy = open_policy(1)
    shape = policy.config.model.shape
    found = {place.name: tuple(p.shape) for place, p in named_parameters(policy.model[0], shape, policy.groups)}
    assert all(size[0] == shape.vocab_size for name, size in found.items() if is_vocabulary(name))
    return found


def test_the_names_that_rules_start_from_are_those_of_the_model() -> None:
    assert run_distributed(our_parameters, 1) == [our_sizes(load_config(None, SETTINGS).model.shape)]


# -------------------------------------------------------------------------------------------------------- transformers

OTHER_MATHS = ("model.rope_base=500.0", "model.norm_epsilon=0.01", "model.max_sequence_length=32")


def logits_of_both(folder: Path, tie: bool, dtype: str) -> tuple[Tensor, Tensor]:
    """[T, V] of one sequence: ours, and those of transformers from a folder written as they are on the hub. In float64
    transformers' own casts to float32 are lifted."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, modeling_rope_utils
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    policy = open_policy(1, *OTHER_MATHS, f"model.tie_embeddings={tie}", f"precision.dtype={dtype}")
    shape = policy.config.model.shape
    family = family_of(shape)
    [model] = policy.model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5)  # norms are drawn as 1, and then could change places
    save_file({name: tensor.clone() for name, tensor in policy.weights(family.rules)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.hf_config(shape)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype == "fp64":  # in this process, which ends with this function
            modeling_qwen3_moe.torch = modeling_rope_utils.torch = Wider(torch)
            torch.Tensor.float = torch.Tensor.double
        how = {"attn_implementation": "eager", "experts_implementation": "eager"}
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=policy.device.dtype, **how)
    assert family.shape(theirs.config.to_dict()) == shape
    tokens = torch.arange(30) % 13
    with torch.no_grad():
        hidden = model(tokens, packed(torch.arange(30), torch.tensor([0, 30]), 30))
        ours = vocab_parallel_logits(hidden.squeeze(1), model.head_weight(), vocab_size=model.true_vocab_size)
        return ours, theirs(tokens[None]).logits[0]


class Wider:
    """A module in which float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(self._module, name)


@pytest.mark.parametrize(
    ("tie", "dtype", "atol"), [(False, "fp32", 1e-4), (True, "fp32", 1e-4), (False, "fp64", 1e-10)]
)
def test_transformers_computes_the_same_logits(tie: bool, dtype: str, atol: float, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    [(ours, theirs)] = run_distributed(logits_of_both, 1, tmp_path, tie, dtype)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=atol)
