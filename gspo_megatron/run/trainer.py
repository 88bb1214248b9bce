"""The RL loop. It depends on protocols, not on Megatron, so tests drive it with fakes.

One step (`Trainer.step`):
    1. sample      G rollouts for each of the step's prompts, with rewards, the same on every process
    2. advantages  of each rollout relative to its group
    3. pack        groups into mini-batches (one update each), their sequences with a gradient into micro-batches
    4. score       old log-probs with the trainer's own forward, reference log-probs when KL is on; advantages once more
                   where KL is in the reward
    5. update      once per mini-batch
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gspo_megatron.base.batches import Position, Rollout, RolloutGroup, Sequence
from gspo_megatron.base.errors import CheckpointError, DataError, EngineError, GuardError, StopRequested, plural
from gspo_megatron.base.protocols import Checkpoints, Exports, Policy, Ranks
from gspo_megatron.checkpoint.names import CHECKPOINTS, name_of
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.rollout.source import RolloutSource
from gspo_megatron.run import stages
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.best import Records
from gspo_megatron.run.clock import Clock
from gspo_megatron.run.evaluation import Evaluation
from gspo_megatron.run.guards import Guards, rows_of
from gspo_megatron.run.learning_rate import LearningRate
from gspo_megatron.run.resume import Continuation
from gspo_megatron.run.sampled_experts import SampledExperts
from gspo_megatron.run.save_request import SaveRequest
from gspo_megatron.run.stages import Packer, PolicyLoss
from gspo_megatron.run.state import Contents, RunState, SavedStep
from gspo_megatron.run.step_state import StepState, rollout_row
from gspo_megatron.run.throughput import Throughput
from gspo_megatron.run.warm_start import WarmStart

START = Position(0, 0, 0)


@dataclass(frozen=True)
class Parts:
    """What a trainer drives, as assembled by build/parts.py.

    Attributes:
        accuracy: 1 for a correct rollout, else 0.
        contents: of what the run reads; saved with it.
        save_request: looked at in safe points; where it is set on any process, the run saves and goes on.
        stop: called at safe points; True stops the run.
        note: called with where in the run this process is.
    """

    config: Config
    algorithm: Algorithm
    ranks: Ranks
    policy: Policy
    source: RolloutSource
    packer: Packer
    warm_start: WarmStart
    evaluation: Evaluation
    accuracy: Callable[[Rollout], float]
    guards: Guards
    contents: Contents
    console: Console
    writer: RunWriter | None
    checkpoints: Checkpoints | None
    exports: Exports | None
    save_request: SaveRequest
    throughput: Throughput
    stop: Callable[[], bool]
    note: Callable[[str], None]


class Trainer:
    """Warm start, steps, evaluations, checkpoints of one run. Every process of the run has one and calls `run`."""

    def __init__(self, parts: Parts, continuation: Continuation) -> None:
        self.parts, self.config, self.algorithm = parts, parts.config, parts.algorithm
        self.ranks, self.policy, self.guards, self.note = parts.ranks, parts.policy, parts.guards, parts.note
        self.loss = PolicyLoss(
            self.algorithm.objective,
            self.ranks,
            self.algorithm.needs_reference,
            self.algorithm.has_token_advantages,
        )
        self.clock, self.pause_s = Clock(), 0.0
        # The position in the run, and what belongs to it.
        self.warm_updates, self.completed_steps = 0, 0
        self.warm_start_loss: float | None = None
        self.step_state: StepState | None = None
        self.began = False
        """Whether the first step has begun: the reference is frozen and row 0 is written."""
        # Those of another run's directory are no checkpoints of this one.
        records = continuation.state.records if continuation.state and continuation.own else {}
        self.records = Records(self.config, records)
        if state := continuation.state:
            self.warm_updates, self.completed_steps, _ = state.position
            self.began, self.warm_start_loss = state.began, state.warm_start_loss
            if isinstance(state.step, SavedStep):
                saved = state.step
                self.step_state = StepState.restore(saved.about, saved.shares, self.ranks, self.policy.score_dtype)
                self.pack(self.step_state)
        self.learning_rate = LearningRate(self.config.optimizer, self.updates_at_end())
        self.saved = self.position if continuation.is_newest else None

    def updates_at_end(self) -> int:
        """Updates of the whole run: those before this step, and those of the steps from here to the last. Earlier steps
        may have had another number of updates than these."""
        before = self.policy.version - self.position.updates if self.began else 0
        return before + (self.config.train.steps - self.completed_steps) * self.algorithm.updates_per_rollout

    # ---------------------------------------------------------------------------------------------------- the run

    def run(self) -> bool:
        """Trains until train.steps are completed, from the current position. Returns False if it was asked to stop
        before; the run is then saved in its own directory, wherever it was loaded from."""
        train, parts = self.config.train, self.parts
        try:
            if self.position not in (self.saved, START):
                self.save(wait=True)
            if not self.began:
                self.begin()
            while self.completed_steps < train.steps and not self.records.stopped():
                self.safe_point()
                step = self.completed_steps + 1
                row, done = self.step(step), self.step_state
                self.guards.check_replicas(step, self.policy)
                if step == train.steps or (train.eval_every and step % train.eval_every == 0):
                    row |= self.evaluate(step)
                self.completed_steps, self.step_state = step, None
                self.record(row)
                assert done is not None
                self.guards.check_step(done, row)
                del done  # its columns would take their memory until the next step has been scored
                every = self.config.checkpoint.save_every
                is_best = "time/eval_s" in row and self.records.note(row)
                if is_best or (every and step % every == 0):
                    self.save(wait=not self.config.checkpoint.asynchronous)
                self.export(step)
        except StopRequested:
            self.save(wait=True)
            return False
        except (GuardError, DataError, EngineError):
            if parts.checkpoints:
                parts.checkpoints.finish()
            raise
        self.save(wait=True)
        if why := self.records.stopped():
            parts.console.say(f"stopped early: {why}")
        if parts.exports:
            parts.exports.at_end(self.completed_steps)
        parts.console.summary()
        return True

    def export(self, step: int) -> None:
        """Writes a Hugging Face folder where one is due. A run that cannot write it is saved before it ends."""
        if self.parts.exports:
            try:
                self.parts.exports.after(step)
            except CheckpointError:
                self.save(wait=True)
                raise

    def begin(self) -> None:
        """What precedes the first step: warm start, the frozen reference, row 0."""
        for updates, loss in self.parts.warm_start.run(self.warm_updates, self.safe_point):
            self.warm_updates, self.warm_start_loss = updates, loss
        self.policy.begin(with_reference=self.algorithm.needs_reference)
        self.guards.begin()
        learned = {} if self.warm_start_loss is None else {"warm_start/loss": self.warm_start_loss}
        row = {"step": 0, "policy_version": self.policy.version, **learned, **self.evaluate(0)}
        self.record(row)
        self.began = True
        if self.records.note(row):
            self.save(wait=not self.config.checkpoint.asynchronous)

    @property
    def position(self) -> Position:
        updates = len(self.step_state.updates) if self.step_state else 0
        return Position(self.warm_updates, self.completed_steps, updates)

    def safe_point(self) -> None:
        """Completes a save in the background, and does what any process was asked to do: save, or stop.

        Raises:
            StopRequested: one was asked to stop. Raised on all processes.
        """
        self.complete_save()
        stop, save = self.parts.stop(), self.parts.save_request.is_set()
        # Nearly always neither: one exchange tells.
        if self.ranks.any_rank(stop or save):
            if self.ranks.any_rank(stop):
                raise StopRequested
            by_file = self.ranks.any_rank(self.parts.save_request.by_file)
            self.save(wait=by_file or not self.config.checkpoint.asynchronous)
            if by_file:
                self.say_saved("")

    def complete_save(self) -> None:
        """Completes a save in the background, if its files are written."""
        if self.parts.checkpoints:
            self.parts.checkpoints.finish(wait=False)

    def say_saved(self, what_next: str) -> None:
        """Where the current position is saved, if anything is."""
        if self.parts.checkpoints:
            self.parts.console.say(
                f"saved in {Path(self.config.run.dir) / CHECKPOINTS / name_of(self.position)}{what_next}"
            )

    def save(self, *, wait: bool) -> None:
        """Saves the run at its current position, unless that is already saved."""
        checkpoints = self.parts.checkpoints
        if checkpoints is None:
            return
        start = time.perf_counter()
        if self.position != self.saved:
            self.note(f"saving after {plural(self.completed_steps, 'step')}")
            inside = self.step_state if self.step_state and self.step_state.updates else None
            state = RunState.of(
                self.config,
                self.position,
                began=self.began,
                guards=self.guards.state(),
                step=inside.snapshot(self.ranks) if inside else None,
                taken=self.parts.source.taken,
                held=self.parts.source.held(),
                contents=self.parts.contents,
                warm_start_loss=self.warm_start_loss,
                records=self.records.held,
            )
            best_step = self.records.best_step
            best = None if best_step is None else Position(self.warm_updates, best_step, 0)
            checkpoints.save(self.position, state, wait=wait, best=best)
            self.saved = self.position
        if wait:
            checkpoints.finish()
        self.parts.save_request.saved()
        self.pause_s = time.perf_counter() - start

    # ---------------------------------------------------------------------------------------------------- a step

    def step(self, number: int) -> dict[str, Any]:
        """One iteration of the algorithm, or what is left of it; returns its row of metrics."""
        # The time of the save before this step is reported with it.
        self.clock.restart(rollout=0.0, log_probs=0.0, checkpoint=self.pause_s)
        self.pause_s = 0.0
        with self.clock.timed("step"):
            step = self.step_state
            if step is None or step.number != number:
                groups = self.sample(number)
                noted = dict(self.parts.source.metrics)
                step = self.step_state = StepState(number, groups, self.advantages(groups), noted=noted)
                self.pack(step)
                self.score(step)
            metrics = self.update(step)
        return self.row(step, metrics)

    def sample(self, number: int) -> list[RolloutGroup]:
        """1. Rollout groups with their rewards, the same on every process."""
        self.note(f"step {number}, sampling")
        with self.clock.timed("rollout"), self.saved_first():
            groups = self.parts.source.groups(number)
        self.complete_save()
        return groups

    def advantages(self, groups: list[RolloutGroup]) -> list[Sequence]:
        """2. A trainable sequence for each rollout, with its advantage."""
        vocab_size, dtype = self.config.model.vocab_size, self.policy.score_dtype
        assert vocab_size is not None
        return stages.sequences_of(groups, self.algorithm, vocab_size=vocab_size, dtype=dtype)

    def pack(self, step: StepState) -> None:
        """3. Mini-batches, and this rank's micro-batches of each."""
        a, experts = self.algorithm, None
        # A step that goes on has them in its columns, where it needs any.
        if a.replay.of_sampler and not step.updates:
            shape, needed = self.config.model.shape, a.replay.in_scoring
            experts = SampledExperts.of(step.rollouts, shape, self.ranks, needed=needed)
        self.parts.packer.pack(
            step,
            drop_zero_advantage=a.drops_zero_advantage,
            drop_truncated=a.drops_truncated,
            experts=experts,
        )

    def score(self, step: StepState) -> None:
        """4. Old and reference log-probs, if the algorithm needs them, and what a reward loses by their distance."""
        self.note(f"step {step.number}, scoring")
        with self.clock.timed("log_probs"):
            stages.score(step.batches, self.policy, self.algorithm)
        self.complete_save()
        self.guards.check_columns(step)
        if self.algorithm.kl_in_reward:
            by_token = self.algorithm.has_token_advantages
            (stages.penalise_tokens if by_token else stages.penalise)(step, self.algorithm, self.ranks)

    def update(self, step: StepState) -> dict[str, float]:
        """5. The remaining updates of the step, each subject to the guards; returns the metrics of all."""
        with self.clock.timed("update"):
            while (done := len(step.updates)) < len(step.batches):
                if done:
                    self.safe_point()
                self.note(where := f"step {step.number}, update {done + 1}")
                lr = self.learning_rate(self.policy.version)
                # Before anything is learned the clip holds nothing; a correction may leave out everything.
                begins = done == 0 and not self.algorithm.variant.correction.acts
                accept = partial(self.guards.accept, has_gradient=begins and step.has_advantages(done))
                metrics = self.policy.update(step.batches[done], self.loss, lr=lr, accept=accept)
                file = f"step_{step.number:06d}_update_{done + 1:03d}"
                step.updates.append(metrics | self.guards.verdict(where, file, partial(self._rows, step, done)))
            first, *others = step.updates
            return stages.reduced([first | stages.ratio_noise(first), *others], self.ranks)

    def _rows(self, step: StepState, update: int) -> list[dict[str, Any]]:
        """The data of an update, for the guards. Collective."""
        step.collect_columns(self.ranks)
        return rows_of(step, step.mini_batches[update])

    # -------------------------------------------------------------------------------------------------- measurement

    def evaluate(self, step: int) -> dict[str, float]:
        self.note(f"the evaluation of policy version {self.policy.version}")
        with self.saved_first():
            return self.parts.evaluation(step)

    @contextmanager
    def saved_first(self) -> Iterator[None]:
        """Saves the run before a prompt, a reward or an engine ends it. All processes find such an error together, and
        the policy is as good as before."""
        try:
            yield
        except (DataError, EngineError):
            if self.position != START:
                self.save(wait=True)
                self.say_saved(
                    "; correct what the error names, and the same command with checkpoint.load=latest continues"
                )
            raise

    def row(self, step: StepState, metrics: dict[str, float]) -> dict[str, Any]:
        """The step's row of metrics.jsonl. Writes its rollouts, too."""
        of_rollouts = step.metrics(self.parts.accuracy)
        row = {"step": step.number, **metrics, "kl/ref": metrics.get("kl/ref"), **of_rollouts}
        if self.parts.writer:
            kept = self.config.logging.rollouts_per_step
            shown = step.rollouts if kept < 0 else step.rollouts[:kept]
            rows = [rollout_row(r, s) for r, s in zip(shown, step.sequences, strict=False)]
            self.parts.writer.rollouts(step.number, rows)
        row |= {"policy_version": self.policy.version, "lr": self.learning_rate(self.policy.version - 1)}
        row |= self.parts.throughput(step, self.clock.seconds["step"])
        return row | {f"time/{name}_s": seconds for name, seconds in self.clock.seconds.items()}

    def record(self, row: dict[str, Any]) -> None:
        if self.parts.writer:
            self.parts.writer.metrics(row)
        self.parts.console.step(row, self.config.train.steps, self.config.logging.console_every)
