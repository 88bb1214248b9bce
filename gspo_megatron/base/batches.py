"""The nouns of a step, in the order in which a step makes them, and the two protocols that the trainer drives.

Shape suffixes used in the whole package:
    T  packed tokens of a micro-batch (prompts, responses, padding)      S  sequences
    N  rows handed to the log-prob (one per predicted token)             R  response tokens, the predicted ones of all S
    V  vocabulary      Vp  this tensor-parallel rank's vocabulary shard  H  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.base.tensors import on_device

IntArray = NDArray[np.int64]

IGNORED = -100
"""Target of a row that predicts nothing (prompt, padding): it never reaches the vocabulary matmul."""


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
