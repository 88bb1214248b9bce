"""The nouns of a step, in the order in which a step makes them.

Shape suffixes used in the whole package:
    T  packed tokens of a micro-batch (prompts, responses, padding)      S  sequences
    N  rows handed to the log-prob (one per predicted token)             R  trained tokens, the predicted ones of all S
    V  vocabulary      Vp  this tensor-parallel rank's vocabulary shard  H  hidden size
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cached_property
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


@dataclass(frozen=True)
class Column:
    """What is known of every trained token of a sequence, such as its log-prob under another policy.

    Attributes:
        name: its key in `Sequence.columns`, in micro-batches, in a checkpoint and in guards/*.jsonl.
        title: what a message calls one value.
        dtype: of its values; None: that of log-probs (`Policy.score_dtype`).
        shape: of the value of one token; () is a number.
        every_token: there is a value for every token of the sequence, not only for those that are trained on.
        fill: what padding holds, where every token has a value.
        finite: a value that is not finite stops the run before it is trained on.
    """

    name: str
    title: str
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    every_token: bool = False
    fill: float = 0.0
    finite: bool = True


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("old_log_probs", "old log-prob"),
        Column("ref_log_probs", "reference log-prob"),
    )
}
"""Per-token data. Packing, the state of a step, guards and checkpoints loop over it: a new kind of data is a line."""


@dataclass
class Sequence:
    """What is trained on: tokens, and which of them. Any number of spans may be trained; a prompt and its response have
    one.

    Attributes:
        tokens: [L] int64.
        trained: [L] bool. A token is predicted from those before it, so the first one is never trained.
        advantage: of the whole sequence.
        columns: by the names of COLUMNS, a value for each trained token in order, [R, *shape], or for every token,
            [L, *shape].
    """

    tokens: Tensor
    trained: Tensor
    advantage: float = 0.0
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def after_prompt(
        cls, tokens: Seq[int], prompt_length: int, advantage: float = 0.0, columns: dict[str, Tensor] | None = None
    ) -> Sequence:
        """A prompt of `prompt_length` tokens and a response, all of which is trained on."""
        trained = torch.arange(len(tokens)) >= prompt_length
        return cls(torch.tensor(tokens, dtype=torch.int64), trained, advantage, columns or {})

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def num_trained(self) -> int:
        """|y|: the tokens that a sequence-level ratio averages over."""
        return int(self.trained.sum())


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
    that token's id where it is trained on, IGNORED elsewhere. `rows_R` are the rows that predict a trained token, and
    `sequence_R` tells which sequence (0 to S - 1) that token belongs to. `trained_lengths` are the numbers of trained
    tokens of the sequences. `index` names the sequences (positions in the list the micro-batches were cut from).

    `columns` holds the sequences' columns by name: [R, *shape] in the order of `rows_R`, or [T, *shape] where every
    token has a value. One that a sequence does not have yet is not there.

    Context parallel gives each of its ranks a part of every sequence (`data.packing.zigzag`): T and R are then the
    tokens of this rank's part, while `cu_seqlens`, `max_seqlen` and `trained_lengths` stay those of whole sequences.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    trained_lengths: list[int]
    rows_R: Tensor
    sequence_R: Tensor
    index: list[int]
    advantages_S: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`, by copies that nothing waits for. `targets_T` stays on the
        host, where `log_probs` decides which rows it needs."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "targets_T"}
        moved: dict[str, Any] = {k: on_device(v, device) for k, v in tensors.items()}
        return replace(self, **moved, columns={name: on_device(v, device) for name, v in self.columns.items()})


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
