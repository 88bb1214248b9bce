"""The nouns of a step, in the order in which a step makes them, and the two protocols that the trainer drives.

Shape suffixes used in the whole package:
    T  packed tokens of a micro-batch (prompts, responses, padding)      S  sequences
    N  rows handed to the log-prob (one per predicted token)             R  response tokens, the predicted ones of all S
    V  vocabulary      Vp  this tensor-parallel rank's vocabulary shard  H  hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]

IGNORED = -100
"""Target of a row that predicts nothing (prompt, padding): it never reaches the vocabulary matmul."""


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. Says the value, the rule and the fix."""


class DataError(ValueError):
    """A prompt file, tokenizer or reward that cannot be used. Says the place, what was found and what was expected."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model."""


class StopAsked(Exception):
    """The run is to save and end. Raised at a safe point, on all processes together."""


class GuardError(RuntimeError):
    """A guard stopped the run: a number that is not finite, replicas that differ. Says what was found, and where."""


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x, of the host or of `device`, on `device`, by a copy that nothing waits for."""
    if x.device == device or device.type == "cpu":
        return x
    return (x.pin_memory() if torch.accelerator.is_available() else x).to(device, non_blocking=True)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the x of `names` nearest to `name`, or nothing when none is near."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Prompt:
    """One question. `id` is its position in the data set; `solution` is what a supervised warm start learns to
    write."""

    id: int
    text: str
    tokens: tuple[int, ...]
    answer: str
    solution: str = ""


@dataclass
class Rollout:
    """One sampled response. `tokens` ends with EOS exactly when EOS was sampled; otherwise the response is truncated.

    `log_probs` are natural logarithms, one per token, of the distribution the token was drawn from.
    `id` is unique in the run: it seeds the random numbers of this rollout, whatever rank samples it.
    """

    id: int
    prompt: Prompt
    tokens: list[int]
    log_probs: list[float]
    truncated: bool
    policy_version: int
    text: str = ""
    reward: float = float("nan")
    reward_terms: dict[str, float] = field(default_factory=dict)
    reward_error: str = ""


@dataclass
class RolloutGroup:
    """The G rollouts of one prompt, which are each other's baseline."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass
class Sequence:
    """A trainable prompt + response. `old_log_probs` and `ref_log_probs` hold one float32 per response token."""

    tokens: list[int]
    prompt_length: int
    advantage: float = 0.0
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class PackingRules:
    """What a parallel layout asks of micro-batches (`layout.packing_rules` tells which of it a run needs).

    Attributes:
        sequence_multiple: every sequence is padded to a multiple of so many tokens.
        token_multiple: so is a micro-batch as a whole, before context parallel divides it.
        count_multiple: every rank's number of micro-batches is a multiple of this.
        same_tokens: the k-th micro-batches of all data-parallel ranks have as many tokens.
    """

    sequence_multiple: int = 1
    token_multiple: int = 1
    count_multiple: int = 1
    same_tokens: bool = False


@dataclass
class MicroBatch:
    """Sequences packed one behind the other, as one forward pass of this rank sees them.

    Behind the tokens of a sequence, and behind the S sequences, there may be padding; the latter forms segments of its
    own in `cu_seqlens`, none longer than the longest sequence. Row t predicts the token after it: `targets_T[t]` is
    that token's id where it belongs to a response, IGNORED elsewhere. `rows_R` are the rows that predict one, and
    `sequence_R` tells which sequence (0 to S - 1) the predicted token belongs to. `index` names the sequences
    (positions in the list the micro-batches were cut from).

    Context parallel gives each of its ranks a part of every sequence (`data.packing.zigzag`): T and R are then the
    tokens of this rank's part, while `cu_seqlens`, `max_seqlen` and `response_lengths` stay those of whole sequences.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    response_lengths: list[int]
    rows_R: Tensor
    sequence_R: Tensor
    index: list[int]
    advantages_S: Tensor
    old_log_probs_R: Tensor | None = None
    ref_log_probs_R: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`, by copies that nothing waits for. `targets_T` stays on the
        host, where `log_probs` decides which rows it needs."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "targets_T"}
        moved: dict[str, Any] = {k: on_device(v, device) for k, v in tensors.items()}
        return replace(self, **moved)


@dataclass
class UpdateBatch:
    """One optimizer step: this rank's micro-batches, and the counts over *all* ranks that normalise the loss."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int


class Position(NamedTuple):
    """How far a run has come. Positions are ordered in time."""

    warm_start: int
    """Completed updates of the warm start."""
    steps: int
    """Completed RL steps."""
    updates: int
    """Completed updates of the step under way; 0 between steps."""


class Metric(NamedTuple):
    """A quantity on its way to one number: `mean` is the sum of totals over the sum of weights, over all ranks and
    micro-batches; `sum`, `min` and `max` take the totals alone. Totals may be tensors still on the device."""

    total: Any
    weight: Any = 1.0
    reduction: str = "mean"


class LossTerms(NamedTuple):
    """`loss`: this micro-batch's share of the update's loss, already divided by the update's global count (scalar)."""

    loss: Tensor
    metrics: dict[str, Metric]


Loss = Callable[[Tensor, "Tensor | None", MicroBatch, UpdateBatch], LossTerms]
"""(log_probs_R, entropy_R or None, micro_batch, its update) -> LossTerms."""

Accept = Callable[[float, bool], bool]
"""(gradient norm, whether the loss is finite on all ranks) -> whether to make the update."""


class Policy(Protocol):
    """The model under training, behind whatever parallelism it uses. All ranks call every method together."""

    version: int
    """Completed updates since `begin`."""
    score_dtype: torch.dtype
    """Format of log-probs: float32, or float64 in a float64 run."""

    def begin(self, *, with_reference: bool) -> None:
        """The first step of reinforcement learning starts here: version 0, and the reference is the policy as it is
        now."""

    def log_probs(self, micro_batches: Seq[MicroBatch], *, reference: bool = False) -> list[Tensor]:
        """Log-probs without gradient, [R] in `score_dtype` for each micro-batch, on every rank."""

    def update(self, batch: UpdateBatch, loss: Loss, *, lr: float, accept: Accept | None = None) -> dict[str, Metric]:
        """One optimizer step; `version` grows by 1. Returns this rank's loss metrics, merged over its micro-batches,
        with `loss` and, on the ranks of one replica, `grad_norm`.

        `accept` is asked ahead of the optimizer, on every rank about the same two values (a norm that is not finite
        comes as inf). Where it answers no, weights and optimizer stay as they are, to the last bit; `version` grows all
        the same. None: every update is made."""

    def differing_replicas(self) -> list[str]:
        """One text for each parameter that is not the same on all ranks that hold it, as `NAME on ranks 0, 1 | 2`: the
        ranks that agree together. The same on every rank. It reads all weights once."""


class Sampler(Protocol):
    """Draws responses. All ranks call it together, each with the rollouts of its own data-parallel share."""

    def generate(self, prompts: Seq[Prompt], ids: Seq[int], *, greedy: bool = False) -> list[Rollout]:
        """One rollout for each (prompt, rollout id), in order."""


class Ranks(Protocol):
    """What the trainer needs to know about the processes: its share of the data, and a way to bring shares together."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    """Context parallel: the ranks that share the tokens of one data-parallel rank's sequences."""
    is_main: bool
    """True on the one process that writes files and prints."""
    speaks: bool
    """True on one process for each (dp_rank, cp_rank), on the pipeline stage that has the loss."""

    def agree(self, flag: bool) -> bool:
        """True on every process when `flag` is true on one."""

    def gather(self, mine: list[Any]) -> list[Any]:
        """Concatenates what the speakers hold, in the order of their ranks; every process gets the same result."""

    def sum_over_parts(self, partial_S: Tensor) -> Tensor:
        """Sum over the context-parallel ranks, of values and, in the backward pass, of gradients."""
