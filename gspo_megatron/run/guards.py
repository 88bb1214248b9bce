"""What looks at a run while it runs. An update whose numbers are wrong is left out, or the run stops, before they reach
the weights, and the rollouts that brought them are kept; what shows only after a step stops the run before it is saved.

Every rule goes by values that are the same on all ranks, so all of them skip together and stop together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gspo_megatron.base.batches import COLUMNS, Rollout, Sequence
from gspo_megatron.base.errors import GuardError
from gspo_megatron.base.metrics import Metric
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.state import GuardState
from gspo_megatron.run.step_state import StepState, rollout_row

WINDOW, FEWEST = 20, 5
"""Updates whose gradient norms a new one is held against, and how many there must be."""
MOST_SKIPPED = 20
"""Updates in a row that are left out before the run stops: it learns nothing any more."""

Rows = Iterable[Mapping[str, Any]]


class Objection(NamedTuple):
    reason: str
    action: str
    """stop or skip."""


class Guards:
    """The rules of config.guards. All ranks call every method together.

    `state`: what `Guards.state` gave, where the run continues.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        writer: RunWriter | None,
        warn: Callable[[str], None],
        state: GuardState | None = None,
    ) -> None:
        self.settings, self.ranks, self.writer, self.warn = config.guards, ranks, writer, warn
        self.folder = Path(config.run.dir) / "guards"
        state = state or GuardState()
        self.grad_norms, self.skipped_in_a_row = list(state.grad_norms), state.skipped_in_a_row
        self.objection: Objection | None = None

    def state(self) -> GuardState:
        return GuardState(tuple(self.grad_norms), self.skipped_in_a_row)

    def begin(self) -> None:
        """The loss is another one from here on: what its gradients are usually like is not known yet."""
        self.grad_norms = []

    # ---------------------------------------------------------------------------------------------------- an update

    def accept(self, grad_norm: float, loss_is_finite: bool) -> bool:
        """Whether to make the update (`types.Accept`): loss and norm are finite, and
        norm <= grad_norm_spike * median(norms of the last WINDOW updates)."""
        g = self.settings
        usual = statistics.median(self.grad_norms) if len(self.grad_norms) >= FEWEST else math.inf
        self.objection = None
        if not loss_is_finite:
            self.objection = Objection("the loss is not finite", g.on_nonfinite)
        elif not math.isfinite(grad_norm):
            self.objection = Objection("the gradient is not finite", g.on_nonfinite)
        elif g.grad_norm_spike and grad_norm > g.grad_norm_spike * usual:
            reason = (
                f"the gradient norm {grad_norm:.4g} is {grad_norm / usual:.1f} times {usual:.4g}, the median of the "
                f"last {len(self.grad_norms)} updates (guards.grad_norm_spike={g.grad_norm_spike:g})"
            )
            self.objection = Objection(reason, g.on_spike)
        elif grad_norm:
            # An update of flat groups has no gradient; it says nothing about what is usual.
            self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]
        return self.objection is None

    def verdict(self, update: str, file: str, rows: Callable[[], Rows]) -> dict[str, Metric]:
        """Follows up what `accept` said of `update`: where it objected, keeps its `rows` in guards/FILE.jsonl and warns
        or raises GuardError. Returns the count of skipped updates, to go with the update's metrics."""
        objection = self.objection
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if objection else 0
        if objection:
            path = self.keep(file, rows())
            if objection.action == "stop":
                raise GuardError(
                    f"{update}: {objection.reason}; the weights are as before it; what it was made of: {path}"
                )
            if self.skipped_in_a_row == MOST_SKIPPED:
                raise GuardError(
                    f"{update}: {objection.reason}; {MOST_SKIPPED} updates in a row were left out, so the run learns "
                    f"nothing any more; what the last one was made of: {path}"
                )
            self.warn(f"{update} is left out: {objection.reason}; what it was made of: {path}")
        first = (self.ranks.dp_rank, self.ranks.cp_rank) == (0, 0)  # it counts once
        return {"guards/skipped_updates": Metric(float(objection is not None), reduction="sum")} if first else {}

    # ------------------------------------------------------------------------------------------------------- a step

    def check_columns(self, step: StepState) -> None:
        """Raises GuardError where a value that must be finite is not: a log-prob of the sampler, or one of the step's
        columns."""
        of_sampler = (log_prob for rollout in step.rollouts for log_prob in rollout.log_probs)
        micro_batches = [m for batch in step.batches for m in batch.micro_batches]
        values = [v for m in micro_batches for name, v in m.columns.items() if COLUMNS[name].finite]
        finite = all(map(math.isfinite, of_sampler)) and all(bool(v.isfinite().all()) for v in values)
        if not self.ranks.any_rank(not finite):
            return
        step.collect_columns(self.ranks)
        pairs = zip(step.rollouts, step.sequences, strict=True)
        offenders = [i for i, (rollout, sequence) in enumerate(pairs) if not_finite(rollout, sequence)]
        first = "a log-prob is not finite on a rank that shares none"
        if offenders:
            first = not_finite(step.rollouts[offenders[0]], step.sequences[offenders[0]])
        path = self.keep(f"step_{step.number:06d}_log_probs", rows_of(step, offenders))
        raise GuardError(
            f"step {step.number}: {first}; {len(offenders)} of {len(step.rollouts)} rollouts have one that is not: "
            f"{path}. The weights, or the forward pass that scored or sampled, are broken: continue from an earlier "
            "checkpoint, with a lower optimizer.lr or another precision.dtype"
        )

    def check_ratio_noise(self, step: int, noise: float) -> None:
        """Raises GuardError when max |ratio - 1| of a step's first update exceeds guards.ratio_noise."""
        if self.settings.ratio_noise and noise > self.settings.ratio_noise:
            raise GuardError(
                f"step {step}: ahead of its first update ratios differ from 1 by up to {noise:.3g}, more than "
                f"guards.ratio_noise={self.settings.ratio_noise:g}. Old log-probs are not of the policy that is "
                "trained: with algorithm.old_log_probs=rollout the sampler computes in another precision or order "
                "(recompute does not); otherwise the same forward gives two results, as with dropout, routing that "
                "depends on the batch, or a failing device"
            )

    def check_replicas(self, step: int, policy: Policy) -> None:
        """Raises GuardError where copies of a parameter differ; looks every guards.check_replicas_every steps."""
        every = self.settings.check_replicas_every
        if every and step % every == 0 and (differing := policy.differing_replicas()):
            raise GuardError(
                f"after step {step} {len(differing)} parameters are not the same on all ranks that hold them, the "
                f"first: {differing[0]}. A rank's memory or arithmetic failed, or updates differ between ranks: "
                f"continue from a checkpoint of before step {step}, without the host of that rank"
            )

    def keep(self, file: str, rows: Rows) -> Path:
        """Writes guards/FILE.jsonl, on the process that writes; returns its path."""
        if self.writer:
            self.writer.offenders(file, rows)
        return self.folder / f"{file}.jsonl"


def rows_of(step: StepState, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The rollouts behind these sequences of the step, in order, with advantages and columns."""
    return [
        rollout_row(step.rollouts[i], sequence)
        | {name: sequence.columns[name].tolist() if name in sequence.columns else None for name in COLUMNS}
        for i, sequence in ((i, step.sequences[i]) for i in sorted(numbers))
    ]


def not_finite(rollout: Rollout, sequence: Sequence) -> str:
    """Which value of a response is the first that is not finite and must be; empty where all are."""
    of_columns = ((COLUMNS[name], values) for name, values in sequence.columns.items())
    checked = [("sampler's log-prob", torch.tensor(rollout.log_probs), False)]
    checked += [(column.title, values, column.every_token) for column, values in of_columns if column.finite]
    for title, values, every_token in checked:
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            place = at[0]
            token = sequence.tokens[place] if every_token else sequence.tokens[sequence.trained][place]
            return (
                f"the {title} of token {place} of the {'sequence' if every_token else 'response'} (id {int(token)}) of "
                f"rollout {rollout.id}, prompt {rollout.prompt.id}, is {float(values[at])}"
            )
    return ""
