"""The data of a step, in the order in which a step creates it.

Shape suffixes used in the whole package:
    T  packed tokens of a micro-batch (prompts, responses, padding)      S  sequences
    N  rows passed to the log-probs (one per predicted token)            R  trained (predicted) tokens of all S
    V  vocabulary      Vp  this tensor-parallel rank's vocabulary shard  H  hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gspo_megatron.base.ragged import Ragged
from gspo_megatron.base.tensors import on_device

IntArray = NDArray[np.int64]

IGNORED = -100
"""Target of a row that predicts nothing (prompt, padding): the row never reaches the vocabulary matmul."""
NO_EXPERT = -1
"""In place of an expert where none is known: the router chooses."""


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: its position in the data set.
        solution: what a supervised warm start learns to write.
        messages: the conversation that `text` was rendered from; empty where the prompt is plain text.
        metadata: what else its row of the data holds, as JSON; rewards get it untouched.
        source: the name of its source, where a run has several.
    """

    id: int
    text: str
    tokens: tuple[int, ...]
    answer: str
    solution: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass
class Rollout:
    """One sampled response, or a conversation: turns that were sampled, and between them what an environment said.

    `tokens` is everything after the prompt. It ends with what ended it, EOS or the token that completes a stop string;
    a response that nothing ended is truncated, and so is a conversation that a limit ended.
    `outside` are the tokens from the environment, as [begin, end) within `tokens`; one pair, which may be empty, lies
    between any two turns. `log_probs` are natural logarithms, one per token that was sampled, of the distribution it
    was drawn from; `support` has the ids to which that gave a probability, where top-k or top-p left some out and they
    were recorded. `id` is unique in the run: it seeds the random numbers of this rollout, whichever rank samples it.

    `routed_experts`, [L, layers, experts of a token], are those that the sampler chose for the L tokens of prompt and
    response that it has processed: all but the last. The ranks that sampled the rollout have them, where they were
    recorded; they are too many to be pickled.

    `text` is that of the last turn. `turns` tells the whole conversation, {role, content, sampled} each; it is empty
    without an environment.
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
    reward_lost: bool = False
    """The error came from the process that was to score it, not from the reward function."""
    outside: list[tuple[int, int]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: int = 0
    tool_errors: int = 0
    """Calls that a tool could not answer, such as a division by 0."""
    environment_error: str = ""
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    """(version, begin, end): `tokens[begin:end]` come from the weights of that version. Empty: all from
    `policy_version`, otherwise that is the oldest."""
    support: Ragged | None = field(default=None, compare=False, repr=False)
    routed_experts: Tensor | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"routed_experts": None}

    @property
    def sampled(self) -> list[int]:
        """The tokens without those from the environment."""
        begins, ends = [0, *(end for _, end in self.outside)], [*(begin for begin, _ in self.outside), None]
        return [t for begin, end in zip(begins, ends, strict=True) for t in self.tokens[begin:end]]

    @property
    def last_turn(self) -> list[int]:
        """The tokens of the last turn."""
        return self.tokens[self.outside[-1][1] :] if self.outside else self.tokens

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt's messages, and those of the turns. A text that the environment wrote into the assistant's own
        message is part of it."""
        found = list(self.prompt.messages)
        for i, turn in enumerate(self.turns):
            if i and turn["role"] == self.turns[i - 1]["role"] == "assistant":
                found[-1] = {**found[-1], "content": found[-1]["content"] + turn["content"]}
            else:
                found.append({"role": turn["role"], "content": turn["content"]})
        return found


@dataclass
class RolloutGroup:
    """The G rollouts of one prompt, whose rewards are compared with each other."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(frozen=True)
class Column:
    """Per-token data of a sequence, such as log-probs under another policy.

    Attributes:
        name: the key in `Sequence.columns`, in micro-batches, in a checkpoint and in guards/*.jsonl.
        title: what messages call one value.
        dtype: dtype of the values; None: that of log-probs (`Policy.score_dtype`).
        shape: shape of one token's value; () is a number.
        of_model: dtype and shape are the model's, as the values have them. Such a column is absent from a micro-batch
            without sequences, and from guards/*.jsonl.
        every_token: every token of the sequence has a value, not only the trained ones.
        fill: the value in padding, where every token has a value.
        finite: a non-finite value stops the run before it is trained on.
        ragged: a value is a list of integers of any length; values of several tokens are `Ragged`, not a tensor.
    """

    name: str
    title: str
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    of_model: bool = False
    every_token: bool = False
    fill: float = 0.0
    finite: bool = True
    ragged: bool = False


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("old_log_probs", "old log-prob"),
        Column("ref_log_probs", "reference log-prob"),
        # An engine may give no number for a token: a correction takes such a ratio as 1 and counts it.
        Column("sampler_log_probs", "log-prob of the sampler", finite=False),
        # Where what a token and those after it earn is compared, not what the response does.
        Column("return_advantages", "advantage of a token's return"),
        # [layers, experts of a token]
        Column("routed_experts", "expert", of_model=True, every_token=True, fill=NO_EXPERT, finite=False),
        # [layers, experts of a token], of the old policy's routers
        Column("expert_log_probs", "router's log-prob of an expert", of_model=True, every_token=True),
        # The ids that a token was drawn from.
        Column("support", "kept id", of_model=True, finite=False, ragged=True),
    )
}
"""Packing, the state of a step, guards and checkpoints loop over this table: new per-token data is one more row."""


@dataclass
class Sequence:
    """What is trained on: tokens, and a mask of the trained ones. They may form any number of spans; a prompt with its
    response has one.

    Attributes:
        tokens: [L] int64.
        trained: [L] bool. A token is predicted from those before it, so the first one is never trained.
        advantage: of the whole sequence.
        columns: by name (a key of COLUMNS), one value per trained token in order, [R, *shape], or one per token,
            [L, *shape]: a tensor, or Ragged.
    """

    tokens: Tensor
    trained: Tensor
    advantage: float = 0.0
    columns: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def after_prompt(
        cls, tokens: Seq[int], prompt_length: int, advantage: float = 0.0, columns: dict[str, Any] | None = None
    ) -> Sequence:
        """A prompt of `prompt_length` tokens and a response, every token of which is trained."""
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
    """What a parallel layout requires of micro-batches (`layout.packing_rules` derives it from a run's settings).

    Attributes:
        sequence_multiple: every sequence is padded to a multiple of this many tokens.
        token_multiple: so is every micro-batch, before context parallelism splits it.
        count_multiple: every rank's number of micro-batches is a multiple of this.
        same_tokens: the k-th micro-batches of all data-parallel ranks have the same number of tokens.
    """

    sequence_multiple: int = 1
    token_multiple: int = 1
    count_multiple: int = 1
    same_tokens: bool = False


@dataclass
class MicroBatch:
    """Sequences packed end to end, as one forward pass of this rank sees them.

    Padding may follow the tokens of each sequence, and all S sequences; the latter forms segments of its own in
    `cu_seqlens`, none longer than the longest sequence. Row t predicts the next token: `targets_T[t]` is its id where
    it is trained on, IGNORED elsewhere. `inside_T` is False in padding. `rows_R` are the rows that predict a trained
    token, and `sequence_R` is the sequence (0 to S - 1) of that token. `trained_lengths` holds the number of trained
    tokens per sequence, `index` the sequences' positions in the list that was packed.

    `columns` holds the sequences' columns by name: [R, *shape] in the order of `rows_R`, or [T, *shape] where every
    token has a value; a ragged one is `Ragged`. A column that the sequences do not have yet is absent.

    With context parallelism each rank holds a part of every sequence (`data.packing.zigzag`): T and R then count the
    tokens of this rank's part, while `cu_seqlens`, `max_seqlen` and `trained_lengths` describe whole sequences.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    inside_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    trained_lengths: list[int]
    rows_R: Tensor
    sequence_R: Tensor
    index: list[int]
    advantages_S: Tensor
    columns: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`, through non-blocking copies. `targets_T` and ragged
        columns stay on the host, where `log_probs` decides which rows it needs."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "targets_T"}
        moved: dict[str, Any] = {k: on_device(v, device) for k, v in tensors.items()}
        columns = {k: on_device(v, device) if isinstance(v, Tensor) else v for k, v in self.columns.items()}
        return replace(self, **moved, columns=columns)


@dataclass
class UpdateBatch:
    """One optimizer step: this rank's micro-batches, and the counts over *all* ranks that normalise the loss."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int


class Sampling(NamedTuple):
    """How held-out responses are sampled: at temperature 0 each token is the most likely one. `seed`: of their random
    numbers, which no training rollout shares."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int


class Taken(NamedTuple):
    """What a run has used up, each in its own unit: settings that say how much a step takes may change in between."""

    prompts: int
    """Prompts taken from the order of prompts: the position of the next one."""
    rollouts: int
    """The id of the next rollout."""
    curriculum: Mapping[str, Any] = {}
    """What data.curriculum remembers (`Curriculum.state`)."""


NOTHING = Taken(0, 0)


class Held(NamedTuple):
    """What a source of rollouts has sampled for steps to come: JSON, the same on all processes, and this one's share of
    what is too large for that."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Position(NamedTuple):
    """How far a run has come. Positions are ordered in time."""

    warm_start: int
    """Completed updates of the warm start."""
    steps: int
    """Completed RL steps."""
    updates: int
    """Completed updates of the current step; 0 between steps."""
