"""What this package corrects or switches on around Transformer Engine's layers: each is needed, and works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import UpdateBatch
from gspo_megatron.mcore import compat
from gspo_megatron.mcore import optimizer as our_optimizer
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.testing.local_ranks import run_distributed
from tests.te.bench import (
    Case,
    advantage_weighted,
    compare,
    micro_batches_of,
    open_groups,
    policy_of,
    relative,
    sequences,
    te_attends_in_float32,
)

pytestmark = pytest.mark.te
IN_016 = compat.VERSION.startswith("0.16.")
FAMILY = next(iter(FAMILIES))
TP2_EP2 = Case(FAMILY, 4, {"tp": 2, "ep": 2}, "bf16")


def marks_by_megatron() -> set[bool]:
    """`tensor_model_parallel` of the experts' matrices as Megatron-Core itself sets it."""
    compat.mark_expert_parameters = lambda model, experts_have_own_groups: None
    config, groups = open_groups(TP2_EP2)
    [model] = policy_of(config, groups, "te").model
    matrices = [p for name, p in model.named_parameters() if ".experts." in name]
    return {bool(getattr(p, "tensor_model_parallel", False)) for p in matrices}


def test_smoke_experts_are_marked_wrongly_by_016_alone() -> None:
    """compat.mark_expert_parameters: False means that the gradient norm leaves them out on all but tensor-parallel rank
    0. When this fails for the oldest supported version, that part of the patch can go."""
    # Transformer Engine 2.10 marks them itself; 2.20 no longer does.
    assert run_distributed(marks_by_megatron, 4) == [{not IN_016 or not te_attends_in_float32()}] * 4


def norm_without_marks() -> tuple[float, float]:
    compat.mark_expert_parameters = lambda model, experts_have_own_groups: None
    both = compare(TP2_EP2)
    return both["te"].grad_norm, both["local"].grad_norm


@pytest.mark.skipif(not IN_016, reason="later versions count every expert")
def test_the_norm_would_be_too_small() -> None:
    for te, local in run_distributed(norm_without_marks, 4, timeout_s=120):
        assert te < 0.99 * local


def settings_and_calls() -> tuple[bool, int]:
    import stand_in_permutation
    from megatron.core.transformer.moe import moe_utils

    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return stand_in_permutation.moe_unpermute(*args, **kwargs)

    moe_utils.fused_unpermute = counted
    config, groups = open_groups(Case(FAMILY, dtype="bf16"))
    policy = policy_of(config, groups, "te")
    policy.log_probs(micro_batches_of(policy))
    return policy.model[0].config.moe_permute_fusion, len(calls)


def test_smoke_transformer_engine_permutes() -> None:
    [(fused, calls)] = run_distributed(settings_and_calls, 1)
    assert fused and calls > 0


def main_gradients(dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one micro-batch with everything: (added by Transformer Engine, added by Megatron's hook)."""
    config, groups = open_groups(Case(FAMILY, dtype=dtype))
    found = []
    for add in (our_optimizer.add_weight_gradients_in_float32, lambda model: None):
        our_optimizer.add_weight_gradients_in_float32 = add
        policy = policy_of(config, groups, "te")
        [micro_batch] = micro_batches_of(policy, max_tokens=1000)
        batch = UpdateBatch([micro_batch], len(sequences()), 1)
        policy.update(batch, advantage_weighted, lr=0.0, accept=lambda norm, finite: False)
        found.append({place.name: gradient.clone() for place, gradient in policy.gradients()})
    return found[0], found[1]


def is_matrix_of_a_layer(name: str) -> bool:
    return name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))


def test_smoke_weight_gradients_are_float32_sums() -> None:
    """Through Megatron's hook each is a bf16 number; from Transformer Engine it is not, and rounds to the same."""
    [(added_there, added_by_hook)] = run_distributed(main_gradients, 1, "bf16")
    names = [name for name in added_there if is_matrix_of_a_layer(name)]
    assert len(names) > 10
    for name in names:
        fine, rounded = added_there[name], added_by_hook[name]
        assert fine.dtype == rounded.dtype == torch.float32
        assert torch.equal(rounded, rounded.bfloat16().float()), "the hook adds float32 now: the switch can go"
        if fine.any():
            assert not torch.equal(fine, fine.bfloat16().float()), name
        assert torch.equal(fine.bfloat16().float(), rounded), name


def several_against_one() -> list[float]:
    """How far the gradient of each matrix over several micro-batches is from that of one with the same sequences."""
    config, groups = open_groups(Case(FAMILY, dtype="bf16"))
    policy = policy_of(config, groups, "te")
    everything = [s.num_trained for s in sequences()]
    found = []
    for max_tokens in (64, 1000):
        micro_batches = micro_batches_of(policy, max_tokens)
        batch = UpdateBatch(micro_batches, len(everything), sum(everything))
        policy.update(batch, advantage_weighted, lr=0.0, accept=lambda norm, finite: False)
        found.append((len(micro_batches), {place.name: g.clone() for place, g in policy.gradients()}))
    (many, several), (single, one) = found
    assert many > single == 1
    return [relative(several[name], one[name]) for name in one if is_matrix_of_a_layer(name) and one[name].any()]


def test_gradients_of_several_micro_batches_add_up() -> None:
    """The first micro-batch of an update overwrites the buffer, the later ones add to it."""
    [differences] = run_distributed(several_against_one, 1)
    assert len(differences) > 10 and max(differences) < 2e-2
