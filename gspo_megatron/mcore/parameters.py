"""Each parameter's name and place in the whole model: for weights that depend on run.seed alone, and for comparing
gradients between layouts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gspo_megatron.checkpoint.place import Place
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.models.shape import ModelShape

SLICED: dict[str, tuple[int, int]] = {
    # part of a parameter's name: (dimension that tensor parallel splits, number of matrices concatenated along it)
    "word_embeddings.weight": (0, 1),
    "output_layer.weight": (0, 1),
    "linear_qkv.weight": (0, 1),
    "linear_qkv.bias": (0, 1),
    "linear_q_proj.weight": (0, 1),
    "linear_q_up_proj.weight": (0, 1),
    "linear_kv_up_proj.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_fc1.weight": (0, 2),  # gate and up: every rank holds its part of both
    "linear_fc1.bias": (0, 2),
    "linear_fc2.weight": (1, 1),
    "softmax_offset": (0, 1),
    "in_proj_qkvz.weight": (0, 1),
    "in_proj_ba.weight": (0, 1),
    "conv1d.weight": (0, 1),
    "A_log": (0, 1),
    "dt_bias": (0, 1),
    "out_proj.weight": (1, 1),
}


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Smallest multiple of tp that holds the vocabulary; the rows added are excluded from every softmax."""
    return math.ceil(vocab_size / tp) * tp


def is_vocabulary(name: str) -> bool:
    """True for the matrices with a row for each token id, padding included."""
    return "word_embeddings" in name or "output_layer" in name


def global_name(name: str, layer_offset: int, expert_offset: int) -> str:
    """The parameter's name in the whole model, with layers and experts numbered over all ranks. Names follow the local
    layer spec; the Transformer Engine spec keeps the input norm of attention, and in dense layers that of the
    network, in the linear layer after it, and all experts' matrices in one layer."""
    name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    name = re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda n: str(int(n.group()) + layer_offset), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda n: str(int(n.group()) + expert_offset), name)


def named_parameters(model: Any, shape: ModelShape, groups: Groups) -> Iterator[tuple[Place, Any]]:
    """(place in the whole model, parameter) of one model chunk of this rank."""
    return _placed(model.named_parameters(), model, shape, groups)


def named_tensors(model: Any, shape: ModelShape, groups: Groups) -> Iterator[tuple[Place, Any]]:
    """Parameters, and buffers that are weights all the same: a router's bias, which has no gradient."""
    yield from named_parameters(model, shape, groups)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".expert_bias"))
    yield from _placed(buffers, model, shape, groups)


def _placed(
    named: Iterable[tuple[str, Any]], model: Any, shape: ModelShape, groups: Groups
) -> Iterator[tuple[Place, Any]]:
    layer_offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    expert_offset = groups.collection.ep.rank() * (shape.num_experts // groups.layout.ep)
    for local_name, tensor in named:
        name = global_name(local_name, layer_offset, expert_offset)
        if shape.tie_embeddings and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the copy that the last stage of a pipeline has
        group = groups.collection.expt_tp if ".experts." in name else groups.tp
        how = next((how for part, how in SLICED.items() if part in name), None)
        yield Place(name) if how is None else Place(name, *how, group.rank(), group.size()), tensor


def _constant(name: str, norms_from_0: bool) -> float:
    """Norms multiply by 1; biases and sinks of attention are 0. A gated delta net has A = dt = 1: its decay
    exp(-e softplus(1)) is 0.03, as fast as a decay is on average where A is drawn from U(0, 16)."""
    if name.endswith((".A_log", ".dt_bias", ".out_norm.weight")):
        return 1.0
    return 0.0 if name.endswith(("bias", "softmax_offset")) or norms_from_0 else 1.0


@torch.no_grad()
def initialize_weights(model: Any, shape: ModelShape, groups: Groups, *, std: float, seed: int) -> None:
    """Matrices ~ N(0, std^2), with std divided by sqrt(2 * num_layers) where a layer adds to the residual; vectors as
    `_constant` has them.

    Every rank draws the whole parameter from a generator seeded by (seed, name) and keeps its slice, so every layout
    starts from the same weights.
    """
    for place, parameter in named_tensors(model, shape, groups):
        if parameter.dim() < 2:
            parameter.fill_(_constant(place.name, model.config.layernorm_zero_centered_gamma))
            continue
        adds_to_residual = re.search(r"(linear_(proj|fc2)|out_proj)\.weight", place.name)
        own_std = std / math.sqrt(2 * shape.num_layers) if adds_to_residual else std
        size = list(parameter.shape)
        size[place.dim] *= place.count
        vocabulary = is_vocabulary(place.name)
        # The vocabulary without its padding, whose size depends on tp.
        drawn = [shape.vocab_size, *size[1:]] if vocabulary else size
        digest = hashlib.sha256(f"{seed}:{place.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(drawn, generator=generator) * own_std
        if vocabulary:
            whole = torch.cat([whole, whole.new_zeros(size[0] - whole.size(0), *size[1:])])
        parameter.copy_(place.cut(whole))
