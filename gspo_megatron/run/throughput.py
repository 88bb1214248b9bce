"""How fast a step is, for the GPUs it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.run.step_state import StepState


@dataclass(frozen=True)
class Throughput:
    """Tokens and floating-point operations of a step, by the second.

    Attributes:
        cost: number of tokens in a sequence -> FLOPs of its forward (`models.counts.sequence_cost`).
        scorings: forwards of every trained sequence ahead of the updates: old and reference log-probs.
        num_processes: of the run; each has a GPU.
        peak_flops: of one GPU in the run's number format, by its data sheet; None where that is not known, as on a CPU.
    """

    cost: Callable[[int], float]
    scorings: int
    num_processes: int
    peak_flops: float | None

    def __call__(self, step: StepState, seconds: float) -> dict[str, float | None]:
        """`tokens` counts prompts and responses; `mfu` is the share of the peak that

            sum over rollouts of cost(L) + (3 + scorings) * sum over trained sequences of cost(L)

        needs: one forward to sample, one for each scoring, one and a backward of twice the work to train. Padding and
        recomputation are no work of the model."""
        lengths = [len(s) for s in step.sequences]
        tokens, num = sum(lengths), self.num_processes
        speed: dict[str, float | None] = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / num,
        }
        if self.peak_flops is None:
            return speed | {"mfu": None}
        trained = sum(self.cost(lengths[n]) for members in step.mini_batches for n in members)
        flops = sum(map(self.cost, lengths)) + (3 + self.scorings) * trained
        return speed | {"mfu": flops / seconds / num / self.peak_flops}
