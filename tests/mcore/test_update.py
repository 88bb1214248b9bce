"""One policy update on one process: the gradient does not depend on how the batch is split, ordered or padded."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, PackingRules, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.objective import PolicyObjective, Segments, resolve_variant
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

VARIANTS = ("gspo", "gspo_sum", "gspo_token", "grpo", "dapo")
Found = tuple[float, dict[str, Tensor], int]
"""Loss, gradients by name, number of micro-batches."""


def sequences() -> list[Sequence]:
    """Ragged prompts and responses, an empty one among them; ratios on both sides of every clip."""
    draw, made = random.Random(5), []
    for number in range(24):
        length = 0 if number == 3 else draw.randint(1, 9)
        prompt = draw.randint(1, 6)
        old = torch.tensor([-2.5 + draw.gauss(0, 0.4) for _ in range(length)], dtype=torch.float64)
        tokens = [draw.randrange(2, 13) for _ in range(prompt + length)]
        made.append(
            Sequence.after_prompt(tokens, prompt, draw.gauss(0, 1), {"old_log_probs": old, "ref_log_probs": old + 0.1})
        )
    return made


def updates(variant: str, ways: list[tuple[list[int], int, PackingRules]]) -> list[Found]:
    """One update from the same weights for each (order of the sequences, tokens per micro-batch, packing rules)."""
    config = load_config(None, [*SMALL, "precision.dtype=fp64", "model.init_std=0.3", "optimizer.clip_grad=1e9"])
    device = open_device("cpu", "fp64")
    groups = Groups(check_config(config, 1), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    objective = PolicyObjective(resolve_variant(variant, kl_coef=0.05), entropy_coef=0.01)

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        counts = {"num_sequences": batch.num_sequences, "num_tokens": batch.num_tokens}
        segments = Segments.from_lengths(m.trained_lengths)
        terms = {"ref_log_probs_T": m.columns["ref_log_probs"], "entropy_T": entropy_R}
        return objective(log_probs_R, m.columns["old_log_probs"], m.advantages_S, segments, **terms, **counts)

    found, data = [], sequences()
    lengths = [s.num_trained for s in data]
    for order, max_tokens, rules in ways:
        micro_batches = pack([data[i] for i in order], pad_id=0, max_tokens=max_tokens, rules=rules)
        batch = UpdateBatch(micro_batches, sum(map(bool, lengths)), sum(lengths))
        # A rate of 0: the next way starts from the same weights.
        metrics = policy.update(batch, loss, lr=0.0)
        gradients = {place.name: gradient.clone() for place, gradient in policy.gradients()}
        found.append((float(metrics["loss"].total), gradients, len(micro_batches)))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_cut_nor_order_nor_padding_shows(variant: str) -> None:
    as_given = list(range(24))
    shuffled = random.Random(1).sample(as_given, 24)
    ways = [
        (as_given, 1000, PackingRules()),
        (as_given, 16, PackingRules()),
        (shuffled, 40, PackingRules()),
        (shuffled, 48, PackingRules(sequence_multiple=8)),
        (as_given, 40, PackingRules(token_multiple=64, count_multiple=8)),
    ]
    [found] = run_distributed(updates, 1, variant, ways)
    (loss, gradients, _), others = found[0], found[1:]
    counts = [count for *_, count in found]
    assert counts[0] == 1 and counts[1] > counts[2] > 3 and counts[4] % 8 == 0
    assert len(gradients) > 20 and all(g.any() for g in gradients.values())
    for other_loss, other_gradients, _ in others:
        assert other_loss == pytest.approx(loss, rel=1e-13)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                other_gradients[name], gradient, rtol=0, atol=1e-13 * float(gradient.abs().max())
            )
