"""The cost of a GSPO update against a plain Megatron-Core pre-training step of the same shape, on the same tokens.

Both have the same settings, layout, weights, packed micro-batches, attention core (Megatron's local one rejects packed
sequences), pipeline schedule, gradient buffers and optimizer. They differ in what follows the hidden states, and
around the optimizer:

    pretraining           GPTModel.forward to logits, Megatron's vocab-parallel cross-entropy of every token that has
                          one before it, in the sequence; optimizer.step()
    update                MegatronPolicy.update: log-probs of the response tokens, ratios to old ones, which are given,
                          the clipped objective, its metrics, the check of loss and norm; the optimizer
    update_every_token    the same where every token counts as one of the response: as much work on the vocabulary

The sequences are the run's training prompts with their solutions. Advantages alternate between +1 and -1, so that no
sequence is dropped. The learning rate is 0: every update has the same weights and ratios of 1, so that nothing is
clipped and skipped.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from benchmarks.reports import median_ratio
from gspo_megatron.base.batches import MicroBatch, UpdateBatch
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.schedule import model_input
from gspo_megatron.run.stages import score
from gspo_megatron.run.trainer import Trainer


class Pretraining:
    """The step of a plain pre-training loop, at a learning rate of 0, with the model, gradient buffers and optimizer of
    `policy`."""

    def __init__(self, policy: MegatronPolicy) -> None:
        self.policy = policy
        for group in policy.optimizer.param_groups:
            group["lr"] = 0.0

    def step(self, batch: UpdateBatch) -> tuple[float, float]:
        """loss = -(1 / num_tokens) sum_t log pi(y_t), over every target of the batch. Returns this rank's share of it,
        0 before the last pipeline stage, and the norm of its gradient."""
        for chunk in self.policy.chunks:
            chunk.zero_grad_buffer()
        self.policy.optimizer.zero_grad()
        micro_batches = [m.to(self.policy.device.torch_device) for m in batch.micro_batches]
        # What Megatron divides by; see gspo_megatron/mcore/schedule.py.
        scale = len(micro_batches) * self.policy.groups.dp_size / batch.num_tokens
        losses = get_forward_backward_func()(
            forward_step_func=partial(self._forward, scale),
            data_iterator=[iter(micro_batches) for _ in self.policy.chunks],
            model=list(self.policy.chunks),
            num_microbatches=len(micro_batches),
            seq_length=1,  # micro-batches are ragged; stages exchange their lengths
            micro_batch_size=1,
            forward_only=False,
        )
        with self.policy.device.optimizer_scope():
            _, grad_norm, _ = self.policy.optimizer.step()
        return float(sum(losses)) / batch.num_tokens, float(grad_norm)

    def _forward(self, scale: float, micro_batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
        micro_batch = next(micro_batches)
        tokens_T, packed = model_input(micro_batch, self.policy.groups)
        model = chunk.module
        model.rotary.prepare(packed)
        targets_T = micro_batch.targets_T.to(tokens_T.device, non_blocking=True)
        labels = targets_T.clamp(min=0)[None]
        # PolicyModel's own forward ends in hidden states; its base class continues to logits and cross-entropy.
        output = GPTModel.forward(model, tokens_T[None], None, None, labels=labels, packed_seq_params=packed)

        def loss(losses: Tensor) -> tuple[Tensor, Tensor]:
            total = (losses.view(-1) * (targets_T >= 0)).sum()
            return total * scale, total.detach()

        return output, loss


def measure(trainer: Trainer, config: Config, steps: int, warmup: int) -> dict[str, Any]:
    """Seconds of `steps` updates of each, in turn, and how many tokens they saw and scored."""
    policy: Any = trainer.policy
    # Both work on one model, whose weights a learning rate of 0 leaves as they are: a large one fits only once.
    plain = Pretraining(policy)
    number = config.rollout.prompts_per_step * config.rollout.group_size // config.algorithm.updates_per_rollout
    warm_start, packer = trainer.parts.warm_start, trainer.parts.packer
    solved = [warm_start.with_solution(prompt) for prompt in warm_start.prompts.take(0, number)]
    sequences = [replace(s, advantage=(-1.0) ** i) for i, s in enumerate(solved)]
    responses = packer.update_batch(sequences)
    # Every token but the first is predicted. Equal lengths are packed alike.
    every = packer.update_batch([replace(s, trained=torch.arange(len(s)) > 0) for s in sequences])
    pairs = zip(responses.micro_batches, every.micro_batches, strict=True)
    assert all(torch.equal(a.tokens_T, b.tokens_T) for a, b in pairs)
    score([responses, every], policy, trainer.algorithm)

    works: dict[str, Callable[[], object]] = {
        "update": lambda: policy.update(responses, trainer.loss, lr=0.0, accept=trainer.guards.accept),
        "update_every_token": lambda: policy.update(every, trainer.loss, lr=0.0, accept=trainer.guards.accept),
        "pretraining": lambda: plain.step(every),
    }
    seconds = in_turn(works, warmup + steps, policy.device)
    seconds = {name: times[warmup:] for name, times in seconds.items()}
    return {
        "ratio": median_ratio(seconds["update"], seconds["pretraining"]),
        "ratio_every_token": median_ratio(seconds["update_every_token"], seconds["pretraining"]),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "layers": "Transformer Engine" if policy.use_te else "local",
        "peak_memory_gib": policy.device.peak_memory_gib(),
        "micro_batches": len(every.micro_batches),
        "tokens": {
            name: sum(m.tokens_T.numel() for m in batch.micro_batches)
            for name, batch in (("update", responses), ("update_every_token", every), ("pretraining", every))
        },
        "scored": {
            "update": responses.num_tokens,
            "update_every_token": every.num_tokens,
            "pretraining": every.num_tokens,
        },
        "seconds_all": seconds,
    }


def in_turn(works: dict[str, Callable[[], object]], rounds: int, device: Device) -> dict[str, list[float]]:
    """Seconds of each work in every round. The order rotates from round to round, so that position does not favour
    one."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds):
        names = deque(works)
        names.rotate(i)
        for name in names:
            start = time.perf_counter()
            works[name]()
            device.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds
