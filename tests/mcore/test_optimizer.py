"""Megatron's optimizer as MegatronPolicy steps it."""

from __future__ import annotations

from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.data.packing import build_micro_batch
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_sampler import open_sampler


def decayed(distributed: bool) -> dict[str, tuple[int, bool]]:
    """name -> (dimensions, whether it shrank), after one update without a gradient at weight decay 0.5 and rate 0.1."""
    settings = ("optimizer.weight_decay=0.5", f"optimizer.distributed={str(distributed).lower()}")
    policy, _ = open_sampler(1, *settings, dtype="fp32")
    [model] = policy.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def no_loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        return LossTerms((log_probs_R * 0).sum(), {})

    batch = UpdateBatch([build_micro_batch([Sequence.after_prompt([3, 4, 5, 1], 2)], [0], pad_id=0)], 1, 2)
    policy.update(batch, no_loss, lr=0.1)
    return {
        name: (p.dim(), bool((p.detach() - 0.95 * before[name]).abs().max() < 1e-6))
        for name, p in model.named_parameters()
    }


def test_weight_decay_is_for_matrices() -> None:
    """Norms keep their weights: Megatron marks them, and leaves it to a scheduler of its own to act on the mark."""
    for distributed in (True, False):
        (found,) = run_distributed(decayed, 1, distributed)
        assert {dim for dim, _ in found.values()} == {1, 2}
        assert all(shrank == (dim == 2) for dim, shrank in found.values()), found
