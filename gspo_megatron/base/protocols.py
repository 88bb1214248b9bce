"""What the trainer needs from a policy, a sampler, the processes of a run and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from threading import Event
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Position, Prompt, Rollout, Sampling, UpdateBatch
from gspo_megatron.base.metrics import LossTerms, Metric

Result = TypeVar("Result")
Loss = Callable[[Tensor, "Tensor | None", MicroBatch, UpdateBatch], LossTerms]
"""(log_probs_R, entropy_R or None, micro_batch, its update) -> LossTerms."""


Accept = Callable[[float, bool], bool]
"""(gradient norm, whether the loss is finite on all ranks) -> whether to apply the update."""


class Scores(Protocol):
    """A model that scores sequences. All ranks call it together."""

    def log_probs(self, micro_batches: Seq[MicroBatch]) -> list[Tensor]:
        """Log-probs without gradient, [R] in `score_dtype` for each micro-batch, on every rank."""


class Policy(Protocol):
    """The model in training, whatever its parallelism. All ranks call every method together."""

    version: int
    """Completed updates since `begin`."""
    score_dtype: torch.dtype
    """Format of log-probs: float32, or float64 in a float64 run."""

    def begin(self, *, with_reference: bool) -> None:
        """Called before the first RL step: sets `version` to 0 and, `with_reference`, keeps the current policy as the
        reference."""

    def log_probs(
        self, micro_batches: Seq[MicroBatch], *, reference: bool = False, as_old: bool = False
    ) -> list[Tensor]:
        """See `Scores.log_probs`; of the reference, where asked. `as_old`: the updates compare with this pass, which
        reads and writes `routed_experts` of the micro-batches as algorithm.routing_replay says."""

    def update(self, batch: UpdateBatch, loss: Loss, *, lr: float, accept: Accept | None = None) -> dict[str, Metric]:
        """One optimizer step; `version` grows by 1. Returns this rank's loss metrics, merged over its micro-batches,
        with `loss` and, on the ranks of one replica, `grad_norm`.

        `accept` is called before the optimizer step, on every rank with the same two values (a non-finite norm is
        passed as inf). When it returns False, weights and optimizer stay bitwise unchanged, and `version` still grows.
        None: every update is applied."""

    def differing_replicas(self) -> list[str]:
        """One text for each parameter whose copies differ: `NAME on ranks 0, 1 | 2`, with the ranks that agree listed
        together. The same on every rank. Reads all weights once."""


class Sampler(Protocol):
    """Samples responses. All ranks call it together, each with its own data-parallel share of the rollouts."""

    def generate(
        self,
        prompts: Seq[Prompt],
        ids: Seq[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Seq[int] = (),
    ) -> list[Rollout]:
        """One rollout for each (prompt, rollout id), in order, sampled as the settings say, or as `sampling` does.
        `ended` is called with each as soon as it has ended, on every rank of the model that samples it. `begun`: of
        each prompt, how many of its last tokens belong to the response already (none by default): they count against
        its length, and positions go on after them."""


class Ranks(Protocol):
    """What the trainer needs to know about the processes: this one's share of the data, and how to combine shares."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    """Context parallel: the ranks that share the tokens of one data-parallel rank's sequences."""
    is_main: bool
    """True on the one process that writes files and prints."""
    is_reporter: bool
    """True on one process for each (dp_rank, cp_rank), on the pipeline stage that has the loss."""

    def any_rank(self, flag: bool) -> bool:
        """True on every process when `flag` is true on one."""

    def gather(self, mine: list[Any]) -> list[Any]:
        """Concatenates the reporters' lists in rank order; every process gets the same result."""

    def from_main(self, work: Callable[[Event], Result], stop: Callable[[], bool]) -> Result:
        """The result of work(stopped) on the main process, on all processes; or its CheckpointError, DataError or
        EngineError. `stop` is asked on every process meanwhile: once one says yes, `stopped` is set, which work looks
        at to end early, and StopRequested is raised on all."""

    def sum_over_parts(self, partial_S: Tensor) -> Tensor:
        """Sum over the context-parallel ranks, of values and, in the backward pass, of gradients."""

    def exchange(self, parts: Seq[Tensor]) -> list[Tensor]:
        """Part i, a list of numbers, goes to rank i of the dp_size * cp_size that hold the same part of the model,
        counted as dp_rank * cp_size + cp_rank; returns what each of these has sent here. All are of one dtype and on
        the host."""


class SavedState(Protocol):
    """What a checkpoint keeps besides the policy."""

    def to_json(self) -> dict[str, Any]:
        """Numbers and text, the same on every process."""

    def tensors(self) -> dict[str, Tensor]:
        """This process's share of what is too large for JSON."""


class Checkpoints(Protocol):
    """Saves a run. All ranks call every method together."""

    def save(self, position: Position, state: SavedState, *, wait: bool, best: Position | None = None) -> None:
        """Saves the policy and `state`. Without `wait` it may return before the files are written. `best`: the
        position of a checkpoint to keep, this one or an earlier one."""

    def finish(self, *, wait: bool = True) -> None:
        """Completes a save in progress. Without `wait`, only as far as that needs no waiting."""


class Exports(Protocol):
    """Writes the policy as Hugging Face folders. All ranks call every method together."""

    def after(self, step: int) -> None:
        """Called after every completed step; writes where one is due."""

    def at_end(self, step: int) -> None:
        """Called at the end of the run, after `step`; writes what is still due."""
