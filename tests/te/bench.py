"""What the tests here share: one policy in each row of LAYERS, on the same batch."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import AXES, packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.presets import PRESETS
from gspo_megatron.run.algorithm import Algorithm

VOCABULARY = 99
TE_FAMILIES = [name for name, family in FAMILIES.items() if not family.only_local]
WIDTHS = ("hidden_size", "ffn_size", "head_dim", "lora_rank")


def preset_of(family: str) -> str:
    """The override for a published model of a family: `small` shrinks it."""
    for name in PRESETS:
        if load_config(None, [f"model.preset={name}"]).model.shape.family == family:
            return f"model.preset={name}"
    raise LookupError(f"no row of PRESETS is of family {family}: the bench needs one to build its smallest model from")


@dataclass(frozen=True)
class Case:
    """One comparison. `axes` as in tools/check_layout.py: {"tp": 2, "ep": 2}."""

    family: str
    world_size: int = 1
    axes: dict[str, int] = field(default_factory=dict)
    dtype: str = "fp32"
    settings: tuple[str, ...] = ()
    widened: int = 1
    """Every width of the smallest model is multiplied by it."""

    def config(self) -> Config:
        preset = preset_of(self.family)
        published = load_config(None, [preset]).model.shape
        # A dense layer has no experts to share: those ranks become replicas.
        shared = () if published.num_experts else ("ep", "etp")
        axes = {axis: 1 if axis in shared else self.axes.get(axis, 1) for axis in AXES}
        # One model for all layouts, so that what they give can be compared.
        sizes = FAMILIES[self.family].small(published, dict.fromkeys(AXES, 2))
        overrides = [
            preset,
            *(f"model.{name}={size * (self.widened if name.endswith(WIDTHS) else 1)}" for name, size in sizes.items()),
            f"model.vocab_size={VOCABULARY}",
            "model.max_sequence_length=64",
            "model.init_std=0.1",
            *(f"parallel.{axis}={size}" for axis, size in axes.items()),
            f"precision.dtype={self.dtype}",
            "precision.device=cpu",
            "optimizer.distributed=false",
            "optimizer.clip_grad=1e9",
            *self.settings,
        ]
        return load_config(None, overrides)


@dataclass(frozen=True)
class Measured:
    """What a policy gave on this rank. Log-probs of every micro-batch; gradients by name, this rank's shards."""

    log_probs: list[Tensor]
    gradients: dict[str, Tensor]
    grad_norm: float
    experts: str


def sequences() -> list[Sequence]:
    """Ragged conversations: several spans of trained tokens, one sequence with none, one of two tokens."""
    draw, made = random.Random(3), []
    for number, length in enumerate((9, 17, 5, 30, 2, 24, 12, 21)):
        trained = torch.tensor([False, *(draw.random() < 0.6 for _ in range(length - 1))]) & (number != 2)
        tokens = torch.tensor([draw.randrange(1, VOCABULARY) for _ in range(length)])
        made.append(Sequence(tokens, trained, draw.choice([-1.5, -0.5, 0.25, 1.0])))
    return made


def micro_batches_of(policy: MegatronPolicy, max_tokens: int = 64) -> list[MicroBatch]:
    groups = policy.groups
    return pack(
        sequences(),
        pad_id=0,
        max_tokens=max_tokens,
        rules=packing_rules(policy.config),
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        cp_rank=groups.cp_rank,
        cp_size=groups.layout.cp,
    )


def open_groups(case: Case) -> tuple[Config, Groups]:
    """Once in a process."""
    config = case.config()
    device = open_device("cpu", case.dtype)
    groups = Groups(check_config(config, case.world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return config, groups


def policy_of(config: Config, groups: Groups, layers: str) -> MegatronPolicy:
    device = open_device("cpu", config.precision.dtype)
    return MegatronPolicy(config, groups, device, layers == "te", Algorithm.of(config).scoring)


def advantage_weighted(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
    """-sum of advantage * log-prob over trained tokens, by the number of sequences."""
    return LossTerms(-(log_probs_R * m.advantages_S[m.sequence_R]).sum() / batch.num_sequences, {})


def measured(policy: MegatronPolicy) -> Measured:
    """Log-probs, and one update whose step is refused."""
    micro_batches, everything = micro_batches_of(policy), sequences()
    log_probs = policy.log_probs(micro_batches)
    counted = [s.num_trained for s in everything]
    batch = UpdateBatch(micro_batches, sum(map(bool, counted)), sum(counted))
    norms: list[float] = []
    policy.update(batch, advantage_weighted, lr=1e-3, accept=lambda norm, finite: norms.append(norm) or False)
    gradients = {place.name: gradient.clone() for place, gradient in policy.gradients()}
    layers = (layer for chunk in policy.model for layer in chunk.decoder.layers)
    experts = next((type(layer.mlp.experts).__name__ for layer in layers if hasattr(layer.mlp, "experts")), "")
    return Measured(log_probs, gradients, norms[0], experts)


def compare(case: Case) -> dict[str, Measured]:
    """On every rank: what each row of LAYERS gives."""
    config, groups = open_groups(case)
    return {layers: measured(policy_of(config, groups, layers)) for layers in ("local", "te")}


def relative(value: Tensor, other: Tensor) -> float:
    return float((value - other).norm() / other.norm().clamp(min=1e-12))


def worst_gradient(value: Measured, other: Measured) -> tuple[float, str]:
    """The largest relative difference over parameters, and whose it is."""
    assert value.gradients.keys() == other.gradients.keys() and len(value.gradients) > 10
    return max((relative(value.gradients[name], gradient), name) for name, gradient in other.gradients.items())


def worst_log_prob(values: Seq[Tensor], others: Seq[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(values, others, strict=True) if x.numel())


def te_attends_in_float32() -> bool:
    """2.10's attention without cuDNN refuses packed sequences, and cuDNN's takes float16 and bfloat16 only."""
    try:
        return version("transformer-engine") != "2.10.0"
    except PackageNotFoundError:  # tests of this folder are left out
        return False
