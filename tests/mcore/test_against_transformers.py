"""Every family against transformers, which shares no code with this package: log-probs, the gradient of every
parameter, greedy tokens, and weights there and back (tests/support/transformers_models.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
from gspo_megatron.models.families import FAMILIES, family_of
from gspo_megatron.models.names import NameRule, to_theirs
from gspo_megatron.objective import PolicyObjective, resolve_variant
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.stages import segments_of
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.transformers_models import MODELS, NOISE, VOCABULARY, Reference, reference

pytest.importorskip("transformers")

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
    "tp2 pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
}
ON_MORE_LAYOUTS = {"qwen3_moe", "deepseek_v3"}
"""Families that are compared where tensor parallel splits experts, too, and on four ranks: others share their code."""


def layouts_of(family: str) -> list[str]:
    """A dense family has no experts to share."""
    if family == "qwen3":
        return [name for name in LAYOUTS if "ep" not in name and "etp" not in name]
    return [
        name
        for name in LAYOUTS
        if name != "tp2 pp2" and (family in ON_MORE_LAYOUTS or name not in ("tp2 etp2", "tp2 pp2 ep2"))
    ]


FIRST = [(family, next(iter(model.variants))) for family, model in MODELS.items()]
ON_LAYOUTS = [(family, variant, layout) for family, variant in FIRST for layout in layouts_of(family)]
ON_TP = [(family, variant, "tp2") for family, model in MODELS.items() for variant in list(model.variants)[1:]]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Reference]:
    made: dict[tuple[str, str], Reference] = {}

    def find(family: str, variant: str) -> Reference:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (family, variant) not in made:
                made[family, variant] = reference(family, variant, tmp_path_factory.mktemp("hub"))
        return made[family, variant]

    return find


# --------------------------------------------------------------------------------------------------------- on the ranks


class Case(NamedTuple):
    """A model in a folder, and where it runs."""

    world_size: int
    settings: tuple[str, ...]
    folder: Path


def open_policy(case: Case) -> MegatronPolicy:
    from safetensors import safe_open

    fixed = ("precision.device=cpu", "optimizer.clip_grad=1e9", "optimizer.distributed=false")
    config = load_config(None, ["precision.dtype=fp64", *fixed, *case.settings])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, case.world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    with safe_open(case.folder / "model.safetensors", "pt") as file:
        policy.load_weights(file.get_slice, rules_of(policy))
    return policy


def rules_of(policy: MegatronPolicy) -> tuple[NameRule, ...]:
    return family_of(policy.config.model.shape).rules


class Scored(NamedTuple):
    """Of a rank: the largest difference of a log-prob, log-probs that were compared, slices of gradients, and the
    number of tensors that come back bit for bit as they are in the folder."""

    worst: float
    num_compared: int
    gradients: list[tuple[Place, Tensor]]
    num_equal: int


def scored(case: Case, sequences: list[Sequence]) -> Scored:
    policy = open_policy(case)
    num_equal = round_trip(policy, case.folder)
    groups, rules = policy.groups, packing_rules(policy.config)
    ranks = {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size, "cp_rank": groups.cp_rank, "cp_size": groups.cp_size}
    micro_batches = pack(sequences, pad_id=0, max_tokens=128, rules=rules, **ranks)
    expected = [m.columns["old_log_probs"] for m in micro_batches]
    worst = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(policy.log_probs(micro_batches), expected, strict=True)
    )
    objective = PolicyObjective(resolve_variant("gspo"))

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        log_probs, weights = m.columns["old_log_probs"].to(log_probs_R), m.columns["ref_log_probs"].to(log_probs_R)
        gspo = objective(
            log_probs_R,
            log_probs + NOISE * weights,
            m.advantages_S,
            segments_of(m, groups),
            num_sequences=batch.num_sequences,
            num_tokens=batch.num_tokens,
        )
        return LossTerms(gspo.loss + (weights * log_probs_R).sum(), {})

    policy.update(UpdateBatch(micro_batches, len(sequences), sum(s.num_trained for s in sequences)), loss, lr=0.0)
    gradients = [(place, gradient.clone()) for place, gradient in policy.gradients()]
    return Scored(worst, sum(map(len, expected)), gradients, num_equal)


def round_trip(policy: MegatronPolicy, folder: Path) -> int:
    from safetensors.torch import load_file

    theirs, ours = load_file(folder / "model.safetensors"), dict(policy.weights(rules_of(policy)))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.double(), theirs[name].to(tensor.dtype).double()), name
    assert policy.differing_replicas() == []
    return len(ours)


def sampled(case: Case, prompts: list[tuple[int, ...]]) -> list[list[tuple[list[int], list[float]]]]:
    """Greedy rollouts of this rank, and drawn ones."""
    settings = (*case.settings, "rollout.max_new_tokens=9", "rollout.max_batch=4")
    policy = open_policy(case._replace(settings=settings))
    sampler = MegatronSampler(policy, stops=Stops((-1,)), pad_id=0)
    asked, ids = [Prompt(i, "", tokens, "") for i, tokens in enumerate(prompts)], list(range(len(prompts)))
    mine = slice(policy.groups.dp_rank, None, policy.groups.dp_size)
    drawn = [sampler.generate(asked[mine], ids[mine], greedy=greedy) for greedy in (True, False)]
    return [[(list(r.tokens), list(r.log_probs)) for r in rollouts] for rollouts in drawn]


# --------------------------------------------------------------------------------------------------------------- tests


def case_of(ref: Reference, layout: str, *settings: str) -> Case:
    world_size, axes = LAYOUTS[layout]
    return Case(world_size, (*ref.settings, *axes, *settings), ref.folder)


def joined(results: list[Scored]) -> dict[str, Tensor]:
    """Whole gradients by our names."""
    parts = {place: tensor for result in results for place, tensor in result.gradients}
    wholes: dict[str, Tensor] = {}
    for place in parts:
        if place.index == 0:
            each = [
                next(t for p, t in parts.items() if (p.name, p.index) == (place.name, i)) for i in range(place.count)
            ]
            whole = place.join(each)
            wholes[place.name] = whole[:VOCABULARY] if is_vocabulary(place.name) else whole
    return wholes


def test_every_family_is_compared() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("family", "variant", "layout"), [*ON_LAYOUTS, *ON_TP])
def test_log_probs_gradients_and_weights_are_those_of_transformers(
    family: str, variant: str, layout: str, references: Callable[[str, str], Reference]
) -> None:
    ref = references(family, variant)
    case = case_of(ref, layout)
    results = run_distributed(scored, case.world_size, case, ref.sequences)
    assert sum(r.num_compared for r in results) >= sum(len(s) - 1 for s in ref.sequences)
    assert max(r.worst for r in results) < 1e-10
    ours = dict(to_theirs(ref.family.rules, joined(results).items(), ref.shape))
    # The bias of a router that only its choice sees is a tensor without a gradient.
    assert len(ours) + sum("correction_bias" in name for name in ref.names) == len(ref.names)
    assert {r.num_equal for r in results} == {len(ref.names)}
    for name, gradient in ours.items():
        theirs = ref.gradients[name]
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize(("family", "variant"), FIRST)
def test_float32_is_close(family: str, variant: str, references: Callable[[str, str], Reference]) -> None:
    ref = references(family, variant)
    [result] = run_distributed(scored, 1, case_of(ref, "one", "precision.dtype=fp32"), ref.sequences)
    assert result.worst < MODELS[family].float32


SAMPLED = [
    *((*first, "tp2") for first in FIRST),
    *(("deepseek_v3", "yarn", layout) for layout in ("pp2", "ep2")),
    ("deepseek_v3", "plain", "one"),
    ("qwen3", "tied", "pp2"),
    ("gpt_oss", "yarn", "ep2"),
    ("qwen3_next", "every third", "pp2"),
]


@pytest.mark.parametrize(("family", "variant", "layout"), SAMPLED)
def test_tokens_and_their_log_probs_are_those_of_transformers(
    family: str, variant: str, layout: str, references: Callable[[str, str], Reference]
) -> None:
    """Through the cache, in several batches."""
    ref = references(family, variant)
    prompts = [tuple(s.tokens[: 1 + 3 * i].tolist()) for i, s in enumerate(ref.sequences)]
    case = case_of(ref, layout)
    by_rank = run_distributed(sampled, case.world_size, case, prompts)
    replicas = by_rank if layout == "ep2" else by_rank[-1:]
    order = [prompt for k in range(len(replicas)) for prompt in prompts[k :: len(replicas)]]
    greedy, drawn = ([rollout for both in replicas for rollout in both[which]] for which in (0, 1))
    for prompt, (tokens, _) in zip(order, greedy, strict=True):
        assert tokens == ref.greedy(prompt, 9)
    for prompt, (tokens, log_probs) in zip(order, drawn, strict=True):
        expected = ref.log_probs(torch.tensor([*prompt, *tokens])).detach()[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(log_probs, dtype=torch.float64), expected, rtol=0, atol=1e-10)
