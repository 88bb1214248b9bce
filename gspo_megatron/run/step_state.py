"""The step under way: what it holds between its updates, and how a checkpoint keeps it.

Old log-probs are those of the policy as the step found it, which is gone after the first update. So a run that is
stopped between two updates keeps the step's rollouts with their rewards, advantages and log-probs, and its metrics.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sequence, UpdateBatch
from gspo_megatron.base.metrics import Metric, merge, on_host
from gspo_megatron.base.protocols import Ranks


@dataclass
class StepState:
    """Rollout groups, a trainable sequence for each rollout, and the updates: the sequences of each, what of it this
    rank computes, and the metrics of those that are done, as this rank has them."""

    number: int
    groups: list[RolloutGroup]
    sequences: list[Sequence]
    mini_batches: list[list[Sequence]] = field(default_factory=list)
    batches: list[UpdateBatch] = field(default_factory=list)
    updates: list[dict[str, Metric]] = field(default_factory=list)

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    def row(self, reduced: dict[str, float], accuracy: Callable[[Rollout], float]) -> dict[str, Any]:
        """Metrics of the step: the updates' `reduced` ones, and those of its rollouts."""
        rollouts, size = self.rollouts, len(self.groups[0].rollouts)
        groups = [self.sequences[i : i + size] for i in range(0, len(self.sequences), size)]
        rewards = [r.reward for r in rollouts]
        return {
            "step": self.number,
            **reduced,
            "kl/ref": reduced.get("kl/ref"),
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "reward/errors": sum(bool(r.reward_error) for r in rollouts),
            "accuracy": statistics.fmean(accuracy(r) for r in rollouts),
            "response_length/mean": statistics.fmean(len(r.tokens) for r in rollouts),
            "truncated_fraction": statistics.fmean(r.truncated for r in rollouts),
            "groups/zero_variance_fraction": statistics.fmean(not any(s.advantage for s in g) for g in groups),
            "tokens": sum(len(s.tokens) for s in self.sequences),
            **{f"reward/{k}": statistics.fmean(r.reward_terms[k] for r in rollouts) for k in rollouts[0].reward_terms},
        }

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """Plain numbers and text, the same on every process. Collective. A float64 survives JSON to the last bit."""
        self.collect_columns(ranks)
        mine = [{name: tuple(metric) for name, metric in on_host(update).items()} for update in self.updates]
        return {
            "number": self.number,
            "prompts": [asdict(group.prompt) for group in self.groups],
            "rollouts": [[_without_prompt(rollout) for rollout in group.rollouts] for group in self.groups],
            "advantages": [s.advantage for s in self.sequences],
            "old_log_probs": [listed(s.old_log_probs) for s in self.sequences],
            "ref_log_probs": [listed(s.ref_log_probs) for s in self.sequences],
            "updates": ranks.gather([mine]),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], ranks: Ranks, dtype: torch.dtype) -> StepState:
        """What `state` wrote, on this rank of a layout that may be another one. Its batches are still to be packed.

        Metrics return to the rank they came from; where the number of reporters is another one, all to the first.
        """
        groups = []
        for prompt, rollouts in zip(state["prompts"], state["rollouts"], strict=True):
            asked = Prompt(**{**prompt, "tokens": tuple(prompt["tokens"])})
            groups.append(RolloutGroup(asked, [Rollout(prompt=asked, **rollout) for rollout in rollouts]))
        step = cls(state["number"], groups, [])
        columns = (state["advantages"], state["old_log_probs"], state["ref_log_probs"])
        for rollout, advantage, old, ref in zip(step.rollouts, *columns, strict=True):
            tokens, prompt_length = [*rollout.prompt.tokens, *rollout.tokens], len(rollout.prompt.tokens)
            step.sequences.append(Sequence(tokens, prompt_length, advantage, _tensor(old, dtype), _tensor(ref, dtype)))
        reporters = [[{k: Metric(*m) for k, m in update.items()} for update in mine] for mine in state["updates"]]
        own = ranks.dp_rank * ranks.cp_size + ranks.cp_rank
        if len(reporters) == ranks.dp_size * ranks.cp_size:
            step.updates = reporters[own]
        else:
            together = [merge(updates) for updates in zip(*reporters, strict=True)]
            step.updates = together if own == 0 else [{} for _ in together]
        return step

    def collect_columns(self, ranks: Ranks) -> None:
        """Gives every sequence its old and reference log-probs, which are spread over the ranks' micro-batches.
        Collective."""
        mine = []
        for number, batch in enumerate(self.batches):
            for m in batch.micro_batches:
                # The row of a predicted token stands one before it.
                at = (m.positions_T[m.rows_R] + 1).tolist()
                old, ref = listed(m.old_log_probs_R), listed(m.ref_log_probs_R)
                mine.append((number, m.index, m.sequence_R.tolist(), at, old, ref))
        for number, index, sequence_R, at, *columns in ranks.gather(mine):
            sequences = [self.mini_batches[number][i] for i in index]
            for name, values in zip(("old_log_probs", "ref_log_probs"), columns, strict=True):
                for row, (s, position) in enumerate(zip(sequence_R, at, strict=True)):
                    if values is None:
                        break
                    sequence = sequences[s]
                    if getattr(sequence, name) is None:
                        setattr(sequence, name, torch.zeros(sequence.response_length, dtype=torch.float64))
                    getattr(sequence, name)[position - sequence.prompt_length] = values[row]


def _without_prompt(rollout: Rollout) -> dict[str, Any]:
    row = asdict(rollout)
    del row["prompt"]
    return row


def rollout_row(rollout: Rollout, sequence: Sequence) -> dict[str, Any]:
    """One line of rollouts/step_*.jsonl."""
    row = asdict(rollout)
    prompt = row.pop("prompt")
    return {
        "prompt_id": prompt["id"],
        "prompt": prompt["text"],
        "answer": prompt["answer"],
        **row,
        "advantage": sequence.advantage,
    }


def listed(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _tensor(values: Seq[float] | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=dtype)
