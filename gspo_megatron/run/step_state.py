"""The state of a step: what it holds between its updates, and how a checkpoint stores it.

Old log-probs are those of the policy at the start of the step, which is gone after the first update. So a run that is
stopped between two updates saves the step's rollouts with their rewards, advantages and columns, and its metrics.

Tokens and columns are saved as tensors, of which every process writes a share: an equal part of the tokens, which all
processes hold, and the columns of its own micro-batches. A value is stored with the place of its token, counted over
all sequences of the step.

S  sequences of the step      L  tokens of all of them      R  trained tokens
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.batches import (
    COLUMNS,
    Column,
    MicroBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    Sequence,
    UpdateBatch,
)
from gspo_megatron.base.errors import CheckpointError, plural
from gspo_megatron.base.metrics import Metric, merge, on_host
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.base.ragged import Ragged, joined

Values = dict[str, tuple[Tensor, Any]]
"""Column name -> (places of tokens, a value for each, as the column has them)."""


@dataclass
class StepState:
    """Rollout groups, a trainable sequence for each rollout, and the updates.

    Attributes:
        mini_batches: of each update, which sequences take part in it.
        batches: of each update, what this rank computes.
        updates: metrics of the updates that are done, as this rank has them.
        noted: metrics of the step that neither its rollouts nor its updates tell.
    """

    number: int
    groups: list[RolloutGroup]
    sequences: list[Sequence]
    mini_batches: list[list[int]] = field(default_factory=list)
    batches: list[UpdateBatch] = field(default_factory=list)
    updates: list[dict[str, Metric]] = field(default_factory=list)
    noted: dict[str, float] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    def has_advantages(self, update: int) -> bool:
        """Whether a sequence of this update has an advantage, and tokens to give it to."""
        return any(s.advantage and s.num_trained for s in (self.sequences[i] for i in self.mini_batches[update]))

    def metrics(self, accuracy: Callable[[Rollout], float]) -> dict[str, Any]:
        """Statistics of the step's rollouts, for its row of metrics."""
        rollouts, size = self.rollouts, len(self.groups[0].rollouts)
        groups = [self.sequences[i : i + size] for i in range(0, len(self.sequences), size)]
        rewards, lengths = [r.reward for r in rollouts], [len(r.log_probs) for r in rollouts]
        right = [accuracy(r) for r in rollouts]
        right_by_group = [right[i : i + size] for i in range(0, len(right), size)]
        half, most = np.percentile(lengths, [50, 90]).tolist()
        return {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "reward/errors": sum(bool(r.reward_error) for r in rollouts),
            "reward/lost": sum(r.reward_lost for r in rollouts),
            "accuracy": statistics.fmean(right),
            "response_length/mean": statistics.fmean(lengths),
            "response_length/p50": half,
            "response_length/p90": most,
            "response_length/max": max(lengths),
            "truncated_fraction": statistics.fmean(r.truncated for r in rollouts),
            "groups/zero_variance_fraction": statistics.fmean(not any(s.advantage for s in g) for g in groups),
            "groups/all_right_fraction": statistics.fmean(min(g) >= 1 for g in right_by_group),
            "groups/all_wrong_fraction": statistics.fmean(max(g) < 1 for g in right_by_group),
            "tokens": sum(len(s) for s in self.sequences),
            **self.noted,
            **_means_of_terms(rollouts),
            **_of_conversations(rollouts),
            **self._metrics_by_source(right_by_group),
        }

    def _metrics_by_source(self, right_by_group: Seq[Seq[float]]) -> dict[str, float]:
        """Where sources of prompts have names."""
        found: dict[str, float] = {}
        for name in sorted({group.prompt.source for group in self.groups} - {""}):
            own = [i for i, group in enumerate(self.groups) if group.prompt.source == name]
            rewards = [rollout.reward for i in own for rollout in self.groups[i].rollouts]
            found |= {
                f"reward/mean/{name}": statistics.fmean(rewards),
                f"accuracy/{name}": statistics.fmean(right for i in own for right in right_by_group[i]),
                f"prompts/{name}": len(own),
            }
        return found

    # ---------------------------------------------------------------------------------------------------- its columns

    def micro_batches(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Those of this rank, each with the places where its sequences begin."""
        lengths_S = torch.tensor([len(s) for s in self.sequences], dtype=torch.int64)
        starts_S = lengths_S.cumsum(0) - lengths_S
        for mini_batch, batch in zip(self.mini_batches, self.batches, strict=True):
            numbers = torch.tensor(mini_batch, dtype=torch.int64)
            for m in batch.micro_batches:
                yield m, starts_S[numbers[m.index]]

    def column_values(self) -> Values:
        """The columns of this rank's micro-batches."""
        found: dict[str, list[tuple[Tensor, Any]]] = {}
        for m, first_S in self.micro_batches():
            for name in m.columns:
                found.setdefault(name, []).append(_places_and_values(m, first_S, name))
        return {
            name: (torch.cat([at for at, _ in parts]), joined([values for _, values in parts]))
            for name, parts in found.items()
        }

    def collect_columns(self, ranks: Ranks) -> None:
        """Collects every sequence's columns from the micro-batches of all ranks. Collective."""
        self.set_columns(ranks.gather([self.column_values()]))

    def set_columns(self, shares: Seq[Values]) -> None:
        """Sets the sequences' columns from the shares of all ranks.

        Raises:
            CheckpointError: a sequence has values for only some of its tokens.
        """
        lengths = [len(s) for s in self.sequences]
        trained_L = torch.cat([torch.empty(0, dtype=torch.bool), *(s.trained for s in self.sequences)])
        for name, column in COLUMNS.items():
            parts = [share[name] for share in shares if name in share and len(share[name][0])]
            if not parts:
                continue
            values = joined([values for _, values in parts])
            # Which of the values is that of a token; -1: none.
            source_L = torch.full((sum(lengths),), -1)
            source_L[torch.cat([at for at, _ in parts])] = torch.arange(len(values))
            wanted_L = torch.ones_like(trained_L) if column.every_token else trained_L
            of_each = zip(source_L.split(lengths), wanted_L.split(lengths), strict=True)
            for number, (sequence, (source, wanted)) in enumerate(zip(self.sequences, of_each, strict=True)):
                known = (source >= 0) & wanted
                if wanted.any() and not known.any():
                    continue
                if not torch.equal(known, wanted):
                    raise CheckpointError(
                        f"{name} of sequence {number} of step {self.number} is known for {int(known.sum())} of "
                        f"{plural(int(wanted.sum()), 'token')}; continue from an earlier checkpoint"
                    )
                sequence.columns[name] = values[source[wanted]]

    # ----------------------------------------------------------------------------------------------- in a checkpoint

    def snapshot(self, ranks: Ranks) -> StepSnapshot:
        """What a checkpoint stores. Collective: `about` is equal on all processes, `tensors` are this one's share."""
        mine = [{name: tuple(metric) for name, metric in on_host(update).items()} for update in self.updates]
        about = {
            "number": self.number,
            "prompts": [asdict(group.prompt) for group in self.groups],
            "rollouts": [[_without_tokens(rollout) for rollout in group.rollouts] for group in self.groups],
            "updates": ranks.gather([mine]),
            "noted": self.noted,
        }
        tensors: dict[str, Tensor] = {}
        if ranks.is_reporter:
            own, size = _place_among_reporters(ranks)
            first, last = (len(self.sequences) * i // size for i in (own, own + 1))
            sequences, rollouts = self.sequences[first:last], self.rollouts[first:last]
            tensors = {
                "first_sequence": torch.tensor([first]),
                "lengths_S": torch.tensor([len(s) for s in sequences], dtype=torch.int64),
                "advantages_S": torch.tensor([s.advantage for s in sequences], dtype=torch.float64),
                "tokens_L": torch.cat([torch.empty(0, dtype=torch.int32), *(s.tokens.int() for s in sequences)]),
                "trained_L": torch.cat([torch.empty(0, dtype=torch.bool), *(s.trained for s in sequences)]),
                "sampler_log_probs_R": torch.from_numpy(
                    np.fromiter((p for r in rollouts for p in r.log_probs), dtype=np.float64)
                ),
            }
            for name, (at, values) in self.column_values().items():
                tensors |= {f"{name}.places": at, **_as_tensors(name, values)}
        return StepSnapshot(about, tensors)

    @classmethod
    def restore(
        cls, about: Mapping[str, Any], shares: Seq[Mapping[str, Tensor]], ranks: Ranks, dtype: torch.dtype
    ) -> StepState:
        """The step on this rank, from the snapshots of all processes, which may have run another layout. Its batches
        still have to be packed. `dtype` is that of log-probs here.

        Metrics return to the rank they came from; if the number of reporters has changed, all go to the first.

        Raises:
            CheckpointError: something is missing, or does not fit the rest.
        """
        try:
            return cls._restored(about, shares, ranks, dtype)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"the unfinished step of the checkpoint does not fit together ({type(error).__name__}: {error}): its "
                "files were edited, or are not this program's; continue from an earlier checkpoint"
            ) from error

    @classmethod
    def _restored(
        cls, about: Mapping[str, Any], shares: Seq[Mapping[str, Tensor]], ranks: Ranks, dtype: torch.dtype
    ) -> StepState:
        shares = sorted((s for s in shares if s), key=lambda share: int(share["first_sequence"]))

        def joined(name: str) -> Tensor:
            return torch.cat([share[name] for share in shares])

        lengths = joined("lengths_S").tolist()
        tokens, trained = joined("tokens_L").long().split(lengths), joined("trained_L").split(lengths)
        advantages = joined("advantages_S").tolist()
        sequences = [Sequence(*of_one) for of_one in zip(tokens, trained, advantages, strict=True)]
        sampled = iter(joined("sampler_log_probs_R").split([s.num_trained for s in sequences]))
        numbers = iter(sequences)
        groups = []
        for prompt, rollouts in zip(about["prompts"], about["rollouts"], strict=True):
            lists: dict[str, Any] = {name: tuple(v) for name, v in prompt.items() if isinstance(v, list)}
            asked = Prompt(**(prompt | lists))
            groups.append(RolloutGroup(asked, []))
            for rollout in rollouts:
                sequence = next(numbers)
                drawn = {"tokens": sequence.tokens[len(asked.tokens) :].tolist(), "log_probs": next(sampled).tolist()}
                spans = {name: [tuple(span) for span in rollout.get(name, [])] for name in ("outside", "versions")}
                groups[-1].rollouts.append(Rollout(prompt=asked, **(rollout | drawn | spans)))
        step = cls(about["number"], groups, sequences)
        step.set_columns([_values_of(share, dtype) for share in shares])
        step.updates = _metrics_of(about["updates"], ranks)
        # Checkpoints of earlier versions have none.
        step.noted = dict(about.get("noted") or {})
        return step


@dataclass(frozen=True)
class StepSnapshot:
    """A step as a checkpoint stores it: `about` in JSON, and one process's share of its tensors."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


def places_of_trained(m: MicroBatch, first_S: Tensor) -> Tensor:
    """Of the R trained tokens of a micro-batch, whose sequences begin at `first_S`."""
    # The row of a predicted token stands one before it.
    return first_S[m.sequence_R.cpu()] + m.positions_T.cpu()[m.rows_R.cpu()] + 1


def _places_and_values(m: MicroBatch, first_S: Tensor, name: str) -> tuple[Tensor, Any]:
    """(places of the tokens, their values) of a column of one micro-batch, whose sequences begin at `first_S`. Padding
    has no place."""
    values, positions_T = m.columns[name].cpu(), m.positions_T.cpu()
    if not COLUMNS[name].every_token:
        return places_of_trained(m, first_S), values
    borders = m.cu_seqlens.cpu().long()
    # Under context parallel this rank has an equal part of every segment.
    num_parts = int(borders[-1]) // len(positions_T)
    segment_T = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff() // num_parts)
    inside_T = m.inside_T.cpu()
    return first_S[segment_T[inside_T]] + positions_T[inside_T], values[inside_T]


def _means_of_terms(rollouts: Seq[Rollout]) -> dict[str, float]:
    """The mean of each term, and of each part of a term over the rollouts that have it."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.reward_terms)
    return {
        f"reward/{name}": statistics.fmean(r.reward_terms[name] for r in rollouts if name in r.reward_terms)
        for name in names
    }


def _of_conversations(rollouts: Seq[Rollout]) -> dict[str, float]:
    """Where an environment answers."""
    if not any(r.turns for r in rollouts):
        return {}
    return {
        "turns/mean": statistics.fmean(len(r.outside) + 1 for r in rollouts),
        "turns/max": max(len(r.outside) + 1 for r in rollouts),
        "turns/outside_tokens": statistics.fmean(len(r.tokens) - len(r.log_probs) for r in rollouts),
        "tools/calls": statistics.fmean(r.tool_calls for r in rollouts),
        "tools/errors": sum(r.tool_errors for r in rollouts),
        "environment/errors": sum(bool(r.environment_error) for r in rollouts),
    }


COLUMNS_OF_ROLLOUTS = ("support", "routed_experts")
KEPT_ELSEWHERE = ("prompt", "tokens", "log_probs", *COLUMNS_OF_ROLLOUTS)
"""Fields of a rollout that a snapshot keeps for its group, as tensors, or as a column."""


def _without_tokens(rollout: Rollout) -> dict[str, Any]:
    return {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name not in KEPT_ELSEWHERE}


def _place_among_reporters(ranks: Ranks) -> tuple[int, int]:
    """(which of the reporters this process is or would be, how many there are)."""
    return ranks.dp_rank * ranks.cp_size + ranks.cp_rank, ranks.dp_size * ranks.cp_size


def _values_of(share: Mapping[str, Tensor], dtype: torch.dtype) -> Values:
    return {
        name: (share[f"{name}.places"], _as_here(share, column, dtype))
        for name, column in COLUMNS.items()
        if f"{name}.places" in share
    }


def _as_tensors(name: str, values: Any) -> dict[str, Tensor]:
    if isinstance(values, Ragged):
        return {f"{name}.values": values.ids_E, f"{name}.counts": values.counts_R}
    return {f"{name}.values": values.cpu()}


def _as_here(share: Mapping[str, Tensor], column: Column, dtype: torch.dtype) -> Any:
    values = share[f"{column.name}.values"]
    if column.ragged:
        return Ragged(values, share[f"{column.name}.counts"])
    return values if column.of_model else values.to(column.dtype or dtype)


def _metrics_of(of_reporters: Seq[Seq[Mapping[str, Any]]], ranks: Ranks) -> list[dict[str, Metric]]:
    reporters = [[{k: Metric(*m) for k, m in update.items()} for update in mine] for mine in of_reporters]
    own, size = _place_among_reporters(ranks)
    if len(reporters) == size:
        return reporters[own]
    together = [merge(updates) for updates in zip(*reporters, strict=True)]
    return together if own == 0 else [{} for _ in together]


OF_CONVERSATIONS = ("outside", "turns", "tool_calls", "tool_errors", "environment_error")
"""Fields of a rollout that only a conversation has."""


def rollout_row(rollout: Rollout, sequence: Sequence) -> dict[str, Any]:
    """One line of rollouts/step_*.jsonl."""
    row = asdict(replace(rollout, support=None, routed_experts=None))
    row = {name: value for name, value in row.items() if name not in COLUMNS_OF_ROLLOUTS}
    prompt = row.pop("prompt")
    if not rollout.turns:
        row = {name: value for name, value in row.items() if name not in OF_CONVERSATIONS}
    if not rollout.versions:
        del row["versions"]
    return {
        "prompt_id": prompt["id"],
        "prompt": prompt["text"],
        "answer": prompt["answer"],
        **row,
        "advantage": sequence.advantage,
    }
