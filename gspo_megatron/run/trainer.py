"""The RL loop, readable as the algorithm. It knows protocols, not Megatron: tests drive it with fakes.

One step (`Trainer.step`):
    1. sample     G rollouts for each of the step's prompts, every data-parallel rank a share, and reward them
    2. advantage  of each rollout against its group
    3. pack       groups into mini-batches (one update each), their sequences that have a gradient into micro-batches
    4. score      old log-probs with the trainer's own forward, reference log-probs when KL is on
    5. update     once per mini-batch
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Position, Prompt, Rollout, RolloutGroup, Sequence, UpdateBatch
from gspo_megatron.base.errors import DataError, GuardError, StopRequested
from gspo_megatron.base.metrics import LossTerms, Metric, merge, on_host, values
from gspo_megatron.base.protocols import Checkpoints, Policy, Ranks, Sampler
from gspo_megatron.config.loading import to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.data.order import PromptOrder
from gspo_megatron.data.packing import pack
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.models.counts import sequence_cost
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.objective import (
    LikelihoodObjective,
    PolicyObjective,
    Segments,
    group_advantages,
)
from gspo_megatron.run.algorithm import rewards_of, variant_of
from gspo_megatron.run.guards import Guards, checked_tokens, rows_of
from gspo_megatron.run.step_state import StepState, rollout_row


class Trainer:
    """Warm start, steps, evaluations, checkpoints of one run. Every process of the run has one and calls `fit`."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        sampler: Sampler,
        ranks: Ranks,
        tokenizer: Tokenizer,
        train_prompts: PromptSource,
        eval_prompts: PromptSource,
        checkpoints: Checkpoints | None = None,
        writer: RunWriter | None = None,
        console: Console | None = None,
        *,
        state: dict[str, Any] | None = None,
        stop: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda where: None,
    ) -> None:
        """`state`: what `Checkpoints.save` was given, where the run continues. `stop` is asked at safe points. `note`
        is told where in the run this process is."""
        self.config, self.policy, self.sampler, self.ranks = config, policy, sampler, ranks
        self.tokenizer, self.train_prompts, self.eval_prompts = tokenizer, train_prompts, eval_prompts
        self.checkpoints, self.writer, self.console = checkpoints, writer, console or Console(on=False)
        self.rewards, self.variant = rewards_of(config), variant_of(config)
        a = config.algorithm
        self.objective = PolicyObjective(self.variant, kl_estimator=a.kl_estimator, entropy_coef=a.entropy_coef)
        self.likelihood = LikelihoodObjective()
        uses_all = self.variant.kl_coef or a.entropy_coef or config.model.aux_loss_coef
        self.skips_zero_gradient = config.train.skip_zero_gradient and not uses_all
        self.scores_old = a.old_log_probs == "recompute" or (a.old_log_probs == "auto" and a.updates_per_rollout > 1)
        self.order = PromptOrder(train_prompts.size, config.run.seed)
        self.stop, self.note = stop, note
        self.guards = Guards(config, ranks, writer, self.console.warn, state and state["guards"])
        self.seconds: dict[str, float] = {}
        self.pause_s = 0.0
        # The position in the run, and what belongs to it.
        self.warm_updates, self.completed_steps, self.step_state = 0, 0, None
        self.began = False
        """Whether the first step has begun: the reference is frozen and row 0 is written."""
        if state is not None:
            self.warm_updates, self.completed_steps, _ = state["position"]
            self.began = state["began"]
            if state["step"] is not None:
                self.step_state = StepState.of_state(state["step"], ranks, policy.score_dtype)
                self.pack(self.step_state)
        # What was loaded from elsewhere is not this run's until it is saved here.
        self.saved = self.position if state is not None and config.checkpoint.load == "latest" else None

    # ---------------------------------------------------------------------------------------------------- the run

    def fit(self) -> None:
        """Trains until train.steps are completed, from wherever the run stands. Raises StopRequested when `stop` said
        so; the run is saved then, in this run's directory, wherever it was loaded from."""
        for warning in self.variant.warnings():
            self.console.warn(warning)
        try:
            if self.position != self.saved and self.position != Position(0, 0, 0):
                self.save(wait=True)
            self.run()
        except StopRequested:
            self.save(wait=True)
            raise
        except (GuardError, DataError):
            if self.checkpoints:
                self.checkpoints.finish()
            raise
        self.save(wait=True)
        self.console.summary()

    def run(self) -> None:
        config = self.config
        if not self.began:
            self.warm_start()
            self.policy.begin(with_reference=self.variant.kl_coef > 0)
            self.guards.begin()
            self.record({"step": 0, "policy_version": self.policy.version, **self.evaluate()})
            self.began = True
        while self.completed_steps < config.train.steps:
            self.safe_point()
            step = self.completed_steps + 1
            row = self.step(step)
            self.guards.check_replicas(step, self.policy)
            if step == config.train.steps or (config.train.eval_every and step % config.train.eval_every == 0):
                row |= self.evaluate()
            self.completed_steps, self.step_state = step, None
            self.record(row)
            if config.checkpoint.save_every and step % config.checkpoint.save_every == 0:
                self.save(wait=not config.checkpoint.asynchronous)

    @property
    def position(self) -> Position:
        return Position(self.warm_updates, self.completed_steps, len(self.step_state.updates) if self.step_state else 0)

    def safe_point(self) -> None:
        """Completes a save in the background; raises StopRequested on all processes when one has been asked to stop."""
        self.complete_save()
        if self.ranks.any_rank(self.stop()):
            raise StopRequested

    def complete_save(self) -> None:
        """Lets a save in the background come to its end, if its files are written."""
        if self.checkpoints:
            self.checkpoints.finish(wait=False)

    def save(self, *, wait: bool) -> None:
        """Keeps the run as it stands, unless that is kept already."""
        if self.checkpoints is None:
            return
        start = time.perf_counter()
        if self.position != self.saved:
            self.note(f"saving after {self.completed_steps} steps")
            state = {
                "position": list(self.position),
                "policy_version": self.policy.version,
                "began": self.began,
                "config": asdict(self.config),
                "config_sha256": hashlib.sha256(to_yaml(self.config).encode()).hexdigest(),
                "guards": self.guards.state(),
                "step": self.step_state.state(self.ranks) if self.step_state and self.step_state.updates else None,
            }
            self.checkpoints.save(self.position, state, wait=wait)
            self.saved = self.position
        if wait:
            self.checkpoints.finish()
        self.pause_s = time.perf_counter() - start

    def step(self, number: int) -> dict[str, Any]:
        """One iteration of the algorithm, from wherever it stands; returns its row of metrics."""
        # The save ahead of this step is told with it.
        self.seconds, self.pause_s = {"rollout": 0.0, "log_probs": 0.0, "checkpoint": self.pause_s}, 0.0
        with self.timed("step"):
            if self.step_state is None or self.step_state.number != number:
                self.step_state = self.begin_step(number)
            step = self.step_state
            with self.timed("update"):
                for batch in step.batches[len(step.updates) :]:
                    if step.updates:
                        self.safe_point()
                    step.updates.append(self.update(step, batch))
                reduced = self.reduce([step.updates[0] | ratio_noise(step.updates[0]), *step.updates[1:]])
        self.guards.check_ratio_noise(number, reduced["ratio/first_update_noise"])
        return self.row(step, reduced)

    def update(self, step: StepState, batch: UpdateBatch) -> dict[str, Metric]:
        """The next update of the step, unless a guard objects; returns this rank's metrics."""
        number = len(step.updates) + 1
        self.note(where := f"step {step.number}, update {number}")
        lr = self.learning_rate(self.policy.version)
        metrics = self.policy.update(batch, self.policy_loss, lr=lr, accept=self.guards.accept)

        def rows() -> list[dict[str, Any]]:
            step.collect_columns(self.ranks)
            return rows_of(step, step.mini_batches[number - 1])

        return metrics | self.guards.verdict(where, f"step_{step.number:06d}_update_{number:03d}", rows)

    def begin_step(self, number: int) -> StepState:
        """What comes ahead of a step's first update."""
        self.note(f"step {number}, sampling")
        with self.timed("rollout"):
            groups = self.sample(number)
        self.complete_save()
        step = StepState(number, groups, self.sequences(groups))
        self.pack(step)
        self.note(f"step {number}, scoring")
        with self.timed("log_probs"):
            self.score(step.batches)
        self.complete_save()
        self.guards.check_log_probs(step)
        return step

    # ----------------------------------------------------------------------------------------------------- stages

    def sample(self, step: int) -> list[RolloutGroup]:
        """group_size rollouts for each prompt of the step, with rewards, the same on every process."""
        r = self.config.rollout
        first = (
            self.config.train.warm_start_steps * self.config.train.warm_start_batch + (step - 1) * r.prompts_per_step
        )
        prompts = [self.train_prompts[self.order[first + i]] for i in range(r.prompts_per_step)]
        for prompt in prompts:
            self.tokens(prompt)
        base = step * r.prompts_per_step * r.group_size
        wanted = [(p, base + i * r.group_size + j) for i, p in enumerate(prompts) for j in range(r.group_size)]
        mine = [wanted[i + j] for i in self.my_share(0, len(wanted), r.group_size) for j in range(r.group_size)]
        rollouts = self.gather_rollouts(self.sampler.generate([p for p, _ in mine], [i for _, i in mine]))
        return [
            RolloutGroup(prompt, rollouts[i * r.group_size : (i + 1) * r.group_size])
            for i, prompt in enumerate(prompts)
        ]

    def gather_rollouts(self, mine: list[Rollout]) -> list[Rollout]:
        """Judges this rank's rollouts, on the processes that speak, and brings all of them together by rollout
        id."""
        if self.ranks.is_reporter:
            for rollout in mine:
                # model.vocab_size may exceed the tokenizer's, rounded up for speed: ids beyond it are no text.
                rollout.text = self.tokenizer.decode(t for t in rollout.tokens if t < self.tokenizer.vocab_size)
            self.rewards.score(mine)
        rollouts = sorted(self.ranks.gather(mine), key=lambda r: r.id)
        self.rewards.raise_errors(rollouts)
        return rollouts

    def sequences(self, groups: Seq[RolloutGroup]) -> list[Sequence]:
        """One trainable sequence a rollout, group by group, with its advantage."""
        rollouts = [r for g in groups for r in g.rollouts]
        group_ids = [i for i, g in enumerate(groups) for _ in g.rollouts]
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        advantages = group_advantages(rewards, group_ids, baseline=self.variant.baseline).tolist()
        from_sampler = self.config.algorithm.old_log_probs == "rollout"
        return [
            Sequence(
                self.tokens(r.prompt, r.tokens),
                len(r.prompt.tokens),
                advantage,
                old_log_probs=torch.tensor(r.log_probs, dtype=self.policy.score_dtype) if from_sampler else None,
            )
            for r, advantage in zip(rollouts, advantages, strict=True)
        ]

    def pack(self, step: StepState) -> None:
        """Mini-batches of whole groups, shuffled by (seed, step), each packed for this rank. Sequences of advantage 0
        may stay out of it: they count, and their term of the loss is 0 with gradient 0."""
        a, size = self.config.algorithm, self.config.rollout.group_size
        draws = random.Random(f"{self.config.run.seed}:{step.number}")
        # Sorted by draws: of Python's generator only random() is promised to stay the same over versions.
        order = [g for _, g in sorted((draws.random(), g) for g in range(len(step.groups)))]
        share = len(order) // a.updates_per_rollout
        for i in range(a.updates_per_rollout):
            groups = order[i * share : (i + 1) * share]
            counted = [step.sequences[g * size + j] for g in groups for j in range(size)]
            alive = [s for s in counted if s.advantage or not self.skips_zero_gradient]
            step.mini_batches.append(alive)
            step.batches.append(self.update_batch(alive, counted))

    def update_batch(self, sequences: Seq[Sequence], counted: Seq[Sequence] | None = None) -> UpdateBatch:
        """This rank's micro-batches of an update on `sequences`, and the counts over all ranks that normalise its loss:
        those of `counted`, by default the same."""
        micro_batches = pack(
            sequences,
            pad_id=self.tokenizer.pad_id,
            max_tokens=self.config.train.tokens_per_micro_batch,
            rules=packing_rules(self.config),
            cost=sequence_cost(self.config.model.shape),
            dp_rank=self.ranks.dp_rank,
            dp_size=self.ranks.dp_size,
            cp_rank=self.ranks.cp_rank,
            cp_size=self.ranks.cp_size,
        )
        responses = [s.response_length for s in (sequences if counted is None else counted) if s.response_length]
        return UpdateBatch(micro_batches, num_sequences=len(responses), num_tokens=sum(responses))

    def score(self, batches: Seq[UpdateBatch]) -> None:
        """Old log-probs (unless the sampler's or the update's own are used) and reference log-probs, in the
        micro-batches of the updates."""
        micro_batches = [m for b in batches for m in b.micro_batches]
        if self.scores_old:
            for micro_batch, scored in zip(micro_batches, self.policy.log_probs(micro_batches), strict=True):
                micro_batch.old_log_probs_R = scored
        if self.variant.kl_coef > 0:
            for micro_batch, scored in zip(
                micro_batches, self.policy.log_probs(micro_batches, reference=True), strict=True
            ):
                micro_batch.ref_log_probs_R = scored

    def policy_loss(
        self, log_probs_R: Tensor, entropy_R: Tensor | None, micro_batch: MicroBatch, batch: UpdateBatch
    ) -> LossTerms:
        old_log_probs_R = micro_batch.old_log_probs_R
        return self.objective(
            log_probs_R,
            # The only update of a rollout batch starts from the policy that is old: the ratio is 1, with a gradient.
            log_probs_R.detach() if old_log_probs_R is None else old_log_probs_R,
            micro_batch.advantages_S,
            self.segments(micro_batch),
            ref_log_probs_T=micro_batch.ref_log_probs_R if self.variant.kl_coef > 0 else None,
            entropy_T=entropy_R,
            num_sequences=batch.num_sequences,
            num_tokens=batch.num_tokens,
        )

    def segments(self, micro_batch: MicroBatch) -> Segments:
        return Segments.from_lengths(
            micro_batch.response_lengths,
            index_R=micro_batch.sequence_R,
            over_ranks=self.ranks.sum_over_parts if self.ranks.cp_size > 1 else None,
            device=micro_batch.sequence_R.device,
        )

    def learning_rate(self, update: int) -> float:
        """Linear warm-up, then constant, or a cosine or linear decay that would reach min_lr with the update after the
        run's last: a rate of 0 would waste an update."""
        o = self.config.optimizer
        if update < o.lr_warmup_updates:
            return o.lr * (update + 1) / o.lr_warmup_updates
        total = self.config.train.steps * self.config.algorithm.updates_per_rollout
        progress = min(1.0, (update - o.lr_warmup_updates) / max(1, total - o.lr_warmup_updates))
        left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[o.lr_decay]
        return o.min_lr + (o.lr - o.min_lr) * left if o.lr_decay != "constant" else o.lr

    # ------------------------------------------------------------------------------------- warm start and evaluation

    def warm_start(self) -> None:
        """Supervised updates on solutions, for a policy that begins from nothing: -sum log p(solution) / tokens."""
        t = self.config.train

        def loss(
            log_probs_R: Tensor, entropy_R: Tensor | None, micro_batch: MicroBatch, batch: UpdateBatch
        ) -> LossTerms:
            return self.likelihood(log_probs_R, self.segments(micro_batch), num_tokens=batch.num_tokens)

        cut = 0
        while (i := self.warm_updates) < t.warm_start_steps:
            self.safe_point()
            first = i * t.warm_start_batch
            prompts = [self.train_prompts[self.order[first + j]] for j in range(t.warm_start_batch)]
            sequences = [self.with_solution(p) for p in prompts]
            cut += sum(s.tokens[-1] != self.tokenizer.eos_id for s in sequences)
            batch = self.update_batch(sequences)
            self.note(where := f"warm start, update {i + 1}")
            metrics = self.policy.update(batch, loss, lr=t.warm_start_lr, accept=self.guards.accept)
            self.guards.verdict(where, f"warm_start_{i + 1:06d}", partial(map, asdict, prompts))
            reduced = self.reduce([metrics])
            self.warm_updates += 1
            self.console.warm_start(i + 1, t.warm_start_steps, reduced["loss"])
        if cut:
            self.console.warn(
                f"warm start: {cut} of {t.warm_start_steps * t.warm_start_batch} solutions were cut at "
                f"model.max_sequence_length={self.config.model.max_sequence_length}, so they taught no end"
            )

    def with_solution(self, prompt: Prompt) -> Sequence:
        """The prompt with its solution and EOS, cut where the context ends."""
        try:
            solution = [*self.tokenizer.encode(prompt.solution), self.tokenizer.eos_id]
        except DataError as error:
            raise DataError(f"the solution of prompt {prompt.id} ({prompt.text[:60]!r}): {error}") from error
        limit = self.config.model.max_sequence_length - len(prompt.tokens)
        return Sequence(self.tokens(prompt, solution[:limit]), len(prompt.tokens))

    def tokens(self, prompt: Prompt, response: Seq[int] = ()) -> list[int]:
        """Prompt and response, about to reach the embedding. Raises DataError for an id that it does not have."""
        assert self.config.model.vocab_size is not None
        return checked_tokens(prompt, response, self.config.model.vocab_size)

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy and mean reward on the held-out prompts."""
        self.note(f"the evaluation of policy version {self.policy.version}")
        with self.timed("eval"):
            assert self.eval_prompts.size is not None
            prompts = [self.eval_prompts[i] for i in range(min(self.config.data.eval_size, self.eval_prompts.size))]
            for prompt in prompts:
                self.tokens(prompt)
            share = self.my_share(0, len(prompts), 1)
            rollouts = self.gather_rollouts(
                self.sampler.generate([prompts[i] for i in share], list(share), greedy=True)
            )
        return {
            "eval/accuracy": statistics.fmean(self.rewards.accuracy(r) for r in rollouts),
            "eval/reward": statistics.fmean(r.reward for r in rollouts),
            "time/eval_s": self.seconds["eval"],
        }

    # -------------------------------------------------------------------------------------------------- measurement

    def my_share(self, start: int, stop: int, stride: int) -> range:
        """What this rank samples: every n-th item of range(start, stop, stride), where n counts data-parallel and
        context-parallel ranks, since all of them hold the whole of a response then."""
        ranks = self.ranks
        rank, count = ranks.dp_rank * ranks.cp_size + ranks.cp_rank, ranks.dp_size * ranks.cp_size
        return range(start + rank * stride, stop, count * stride)

    def reduce(self, updates: Seq[dict[str, Metric]]) -> dict[str, float]:
        """Metrics of several updates over all ranks; `loss` is the mean over the updates."""
        reduced = values(merge(self.ranks.gather([on_host(merge(updates))])))
        return reduced | {"loss": reduced["loss"] / len(updates)}

    def row(self, step: StepState, reduced: dict[str, float]) -> dict[str, Any]:
        """The step's line of metrics.jsonl; its rollouts are written on the way."""
        row = step.row(reduced, self.rewards.accuracy)
        if row["groups/zero_variance_fraction"] == 1:
            self.console.warn(
                f"step {step.number}: all {len(step.groups)} groups have equal rewards (such as "
                f"{step.rollouts[0].reward:g}), so no advantage and no policy gradient; easier or harder prompts, a "
                "larger rollout.group_size or a finer reward would give one"
            )
        if self.writer:
            kept = self.config.logging.rollouts_per_step
            shown = step.rollouts if kept < 0 else step.rollouts[:kept]
            rows = [rollout_row(r, s) for r, s in zip(shown, step.sequences, strict=False)]
            self.writer.rollouts(step.number, rows)
        row |= {"policy_version": self.policy.version, "lr": self.learning_rate(self.policy.version - 1)}
        row |= {"tokens_per_second": row["tokens"] / self.seconds["step"]}
        return row | {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}

    def record(self, row: dict[str, Any]) -> None:
        if self.writer:
            self.writer.metrics(row)
        self.console.step(row, self.config.train.steps)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def ratio_noise(first_update: dict[str, Metric]) -> dict[str, Metric]:
    """max |ratio - 1| before anything was learned from the rollouts: what numerical noise alone moves, to be held
    against the clip band. Empty off the last pipeline stage, which has no ratios."""
    if "ratio/min" not in first_update:
        return {}
    low, high = float(first_update["ratio/min"].total), float(first_update["ratio/max"].total)
    return {"ratio/first_update_noise": Metric(max(1 - low, high - 1, 0.0), reduction="max")}  # 0 where all are dead
