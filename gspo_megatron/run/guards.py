"""Rules that skip an update or stop the run when its numbers are wrong.

An update is checked before it reaches the weights, and the data of one that fails is written to guards/. What shows
only after a step stops the run before the next save. Every rule uses values that are equal on all ranks, so all ranks
skip together and stop together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gspo_megatron.base.batches import COLUMNS, Rollout, Sequence
from gspo_megatron.base.errors import GuardError, plural
from gspo_megatron.base.metrics import Metric
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.concerns import Concerns
from gspo_megatron.run.state import GuardState
from gspo_megatron.run.step_state import StepState, rollout_row

WINDOW, FEWEST = 20, 5
"""A gradient norm is compared with those of the last WINDOW updates, once there are FEWEST."""
MOST_SKIPPED = 20
"""Updates skipped in a row before the run stops, since it no longer learns."""

NONFINITE = (
    ". Lower optimizer.lr or use precision.dtype=fp32; guards.grad_norm_spike skips updates far above the usual norm, "
    "and guards.on_nonfinite=skip those without a number"
)

Rows = Iterable[Mapping[str, Any]]


class Objection(NamedTuple):
    reason: str
    action: str
    """stop or skip."""
    advice: str = ""


class Guards:
    """The rules of config.guards. All ranks call every method together.

    `state`: what `Guards.state` returned, if the run continues.
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
        # A correction takes the ratio of a token without a number as 1, and counts it.
        self.sampler_must_be_finite = (config.algorithm.correction or "none") == "none"
        self.folder = Path(config.run.dir) / "guards"
        state = state or GuardState()
        self.grad_norms, self.skipped_in_a_row = list(state.grad_norms), state.skipped_in_a_row
        self.objection: Objection | None = None
        self.concerns = Concerns(Algorithm.of(config), config.guards, state.past, state.streaks)

    def state(self) -> GuardState:
        of_steps = self.concerns
        return GuardState(tuple(self.grad_norms), self.skipped_in_a_row, dict(of_steps.past), dict(of_steps.streaks))

    def begin(self) -> None:
        """Forgets gradient norms: the loss changes here, and its usual norm is not known yet."""
        self.grad_norms = []

    # ---------------------------------------------------------------------------------------------------- an update

    def accept(self, grad_norm: float, loss_is_finite: bool, *, has_gradient: bool = False) -> bool:
        """Whether to apply the update (`Accept` of base/protocols.py): loss and norm are finite, and
        norm <= grad_norm_spike * median(norms of the last WINDOW updates). `has_gradient`: a norm of 0 is wrong."""
        g = self.settings
        usual = statistics.median(self.grad_norms) if len(self.grad_norms) >= FEWEST else math.inf
        self.objection = None
        if not loss_is_finite:
            self.objection = Objection("the loss is not finite", g.on_nonfinite, NONFINITE)
        elif not math.isfinite(grad_norm):
            self.objection = Objection("the gradient is not finite", g.on_nonfinite, NONFINITE)
        elif has_gradient and grad_norm == 0:
            reason = (
                "the gradient is 0 although advantages are not: something in this process has switched gradients off "
                "(torch.set_grad_enabled, a hook on the model), or the policy is certain of every token"
            )
            self.objection = Objection(reason, "stop")
        elif g.grad_norm_spike and grad_norm > g.grad_norm_spike * usual:
            reason = (
                f"the gradient norm {grad_norm:.4g} is {grad_norm / usual:.1f} times {usual:.4g}, the median of the "
                f"last {plural(len(self.grad_norms), 'update')} (guards.grad_norm_spike={g.grad_norm_spike:g})"
            )
            self.objection = Objection(reason, g.on_spike)
        elif grad_norm:
            # An update whose groups all have equal rewards has no gradient and says nothing about the usual norm.
            self.grad_norms = [*self.grad_norms, grad_norm][-WINDOW:]
        return self.objection is None

    def verdict(self, update: str, file: str, rows: Callable[[], Rows]) -> dict[str, Metric]:
        """Acts on what `accept` decided about `update`: if it objected, writes `rows` to guards/FILE.jsonl and warns.
        Returns the count of skipped updates, for the update's metrics.

        Raises:
            GuardError: the rule stops the run, or MOST_SKIPPED updates in a row were skipped.
        """
        objection = self.objection
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if objection else 0
        if objection:
            path = self.keep(file, rows())
            if objection.action == "stop":
                raise GuardError(
                    f"{update}: {objection.reason}; the update was not applied; its data is in {path}{objection.advice}"
                )
            if self.skipped_in_a_row == MOST_SKIPPED:
                raise GuardError(
                    f"{update}: {objection.reason}; {MOST_SKIPPED} updates in a row were skipped, so the run no "
                    f"longer learns; the data of the last one is in {path}"
                )
            self.warn(f"{update} is skipped: {objection.reason}; its data is in {path}")
        first = (self.ranks.dp_rank, self.ranks.cp_rank) == (0, 0)  # counted once
        return {"guards/skipped_updates": Metric(float(objection is not None), reduction="sum")} if first else {}

    # ------------------------------------------------------------------------------------------------------- a step

    def check_columns(self, step: StepState) -> None:
        """Checks the sampler's log-probs and the step's columns.

        Raises:
            GuardError: a value that must be finite is not.
        """
        drawn = step.rollouts if self.sampler_must_be_finite else []
        of_sampler = (log_prob for rollout in drawn for log_prob in rollout.log_probs)
        micro_batches = [m for batch in step.batches for m in batch.micro_batches]
        values = [v for m in micro_batches for name, v in m.columns.items() if COLUMNS[name].finite]
        finite = all(map(math.isfinite, of_sampler)) and all(bool(v.isfinite().all()) for v in values)
        if not self.ranks.any_rank(not finite):
            return
        step.collect_columns(self.ranks)
        pairs = zip(step.rollouts, step.sequences, strict=True)
        offenders = [i for i, (rollout, sequence) in enumerate(pairs) if self._not_finite(rollout, sequence)]
        first = "a value is not finite on a rank that does not report its columns"
        if offenders:
            first = self._not_finite(step.rollouts[offenders[0]], step.sequences[offenders[0]])
        path = self.keep(f"step_{step.number:06d}_log_probs", rows_of(step, offenders))
        raise GuardError(
            f"step {step.number}: {first}; rollouts with a value that is not finite: {len(offenders)} of "
            f"{len(step.rollouts)}, in {path}. The weights, or the forward pass that scored or sampled, "
            "are broken: continue from an earlier checkpoint, with a lower optimizer.lr or another precision.dtype"
        )

    def _not_finite(self, rollout: Rollout, sequence: Sequence) -> str:
        return not_finite(rollout, sequence, of_sampler=self.sampler_must_be_finite)

    def check_step(self, step: StepState, row: Mapping[str, Any]) -> None:
        """Warns of what is wrong with a step, by its row of metrics.

        Raises:
            GuardError: a rule of guards.stop_on found a fault; the step's rollouts are in guards/.
        """
        for concern in self.concerns.of(row, step.groups):
            if concern.stops:
                step.collect_columns(self.ranks)
                path = self.keep(f"step_{step.number:06d}_{concern.rule}", rows_of(step, range(len(step.sequences))))
                raise GuardError(f"{concern.text}. The step's rollouts are in {path}")
            self.warn(concern.text)

    def check_replicas(self, step: int, policy: Policy) -> None:
        """Compares the copies of every parameter, every guards.check_replicas_every steps.

        Raises:
            GuardError: copies of a parameter differ.
        """
        every = self.settings.check_replicas_every
        if every and step % every == 0 and (differing := policy.differing_replicas()):
            raise GuardError(
                f"after step {step}, copies of {plural(len(differing), 'parameter')} differ between ranks, the first: "
                f"{differing[0]}. A rank's memory or arithmetic failed, or updates differed between ranks: continue "
                f"from a checkpoint saved before step {step}, without that rank's host"
            )

    def keep(self, file: str, rows: Rows) -> Path:
        """Writes guards/FILE.jsonl, on the process with the writer; returns its path."""
        if self.writer:
            self.writer.offenders(file, rows)
        return self.folder / f"{file}.jsonl"


def rows_of(step: StepState, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The rollouts behind these sequences of the step, in order, with advantages and columns."""
    kept = [name for name, column in COLUMNS.items() if not column.of_model]
    return [
        rollout_row(step.rollouts[i], sequence)
        | {name: sequence.columns[name].tolist() if name in sequence.columns else None for name in kept}
        for i, sequence in ((i, step.sequences[i]) for i in sorted(numbers))
    ]


def not_finite(rollout: Rollout, sequence: Sequence, *, of_sampler: bool = True) -> str:
    """The first value of a rollout that must be finite and is not, in words; empty if there is none."""
    of_columns = ((COLUMNS[name], values) for name, values in sequence.columns.items())
    checked = [("sampler's log-prob", torch.tensor(rollout.log_probs), False)] if of_sampler else []
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
