"""What looks at a run while it runs. An update whose numbers are wrong is left out, or the run stops, before they reach
the weights, and the rollouts that brought them are kept; what shows only after a step stops the run before it is saved.

Every rule goes by values that are the same on all ranks, so all of them skip together and stop together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple

from gspo_megatron.base.batches import Prompt, Rollout, Sequence
from gspo_megatron.base.errors import DataError, GuardError
from gspo_megatron.base.metrics import Metric
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.step_state import StepState, listed, rollout_row

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
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.ranks, self.writer, self.warn = config.guards, ranks, writer, warn
        self.folder = Path(config.run.dir) / "guards"
        self.grad_norms: list[float] = list(state["grad_norms"]) if state else []
        self.skipped_in_a_row: int = state["skipped_in_a_row"] if state else 0
        self.objection: Objection | None = None

    def state(self) -> dict[str, Any]:
        return {"grad_norms": self.grad_norms, "skipped_in_a_row": self.skipped_in_a_row}

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

    def check_log_probs(self, step: StepState) -> None:
        """Raises GuardError where a log-prob of the step is not finite: the sampler's, an old or a reference one."""
        of_sampler = (log_prob for rollout in step.rollouts for log_prob in rollout.log_probs)
        micro_batches = [m for batch in step.batches for m in batch.micro_batches]
        scored = [v for m in micro_batches for v in (m.old_log_probs_R, m.ref_log_probs_R) if v is not None]
        finite = all(map(math.isfinite, of_sampler)) and all(bool(values.isfinite().all()) for values in scored)
        if not self.ranks.any_rank(not finite):
            return
        step.collect_columns(self.ranks)
        pairs = zip(step.rollouts, step.sequences, strict=True)
        offenders = [(rollout, s) for rollout, s in pairs if broken_log_prob(rollout, s)]
        first = broken_log_prob(*offenders[0]) if offenders else "a log-prob is not finite on a rank that shares none"
        path = self.keep(f"step_{step.number:06d}_log_probs", rows_of(step, [s for _, s in offenders]))
        raise GuardError(
            f"step {step.number}: {first}; {len(offenders)} of {len(step.rollouts)} rollouts have such a one: {path}. "
            "The weights, or the forward pass that scored or sampled, are broken: continue from an earlier checkpoint, "
            "with a lower optimizer.lr or another precision.dtype"
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


def rows_of(step: StepState, sequences: Seq[Sequence]) -> list[dict[str, Any]]:
    """The rollouts behind `sequences` of the step, with advantages, old and reference log-probs."""
    wanted = set(map(id, sequences))
    return [
        rollout_row(rollout, s) | {"old_log_probs": listed(s.old_log_probs), "ref_log_probs": listed(s.ref_log_probs)}
        for rollout, s in zip(step.rollouts, step.sequences, strict=True)
        if id(s) in wanted
    ]


def broken_log_prob(rollout: Rollout, sequence: Sequence) -> str:
    """Which of the log-probs of a response is the first that is not finite; empty where all are."""
    for name, log_probs in (
        ("sampler's", rollout.log_probs),
        ("old", listed(sequence.old_log_probs)),
        ("reference", listed(sequence.ref_log_probs)),
    ):
        for position, log_prob in enumerate(log_probs or ()):
            if not math.isfinite(log_prob):
                return (
                    f"the {name} log-prob of token {position} of the response (id {rollout.tokens[position]}) of "
                    f"rollout {rollout.id}, prompt {rollout.prompt.id}, is {log_prob}"
                )
    return ""


def checked_tokens(prompt: Prompt, response: Seq[int], vocab_size: int) -> list[int]:
    """Prompt and response, one behind the other. Raises DataError for an id that the embedding has no row for."""
    tokens = [*prompt.tokens, *response]
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        position, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab_size)
        raise DataError(
            f"prompt {prompt.id} ({prompt.text[:60]!r}): token {position} of {len(tokens)} has id {token}, but "
            f"model.vocab_size={vocab_size} has ids 0 to {vocab_size - 1}; is data.tokenizer that of the model?"
        )
    return tokens
