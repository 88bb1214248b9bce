"""Rollouts that engines sample, with the weights of the policy as it is: lag 0.

One call of `groups` or `held_out`:
1. Where the policy has changed since the last call, all ranks score the probe and send the weights. The main rank gives
   them to the engines, which must then have the trainer's log-probs of the probe.
2. The main rank asks for the responses and scores groups as they are completed.
3. Every rank gets the same groups.

A rollout depends on its weights, its id and the seed alone: what engines lost when they died is sampled again, equal.
Responses that were whole are kept.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from typing import TypeVar

from torch import Tensor

from gspo_megatron.base.batches import Prompt, Rollout, Sampling
from gspo_megatron.base.errors import CannotSend, EngineError, EnginesStale, StopRequested, plural
from gspo_megatron.base.protocols import Policy
from gspo_megatron.rewards.rewards import Reward
from gspo_megatron.rollout.collective import Asked, TrainingSource
from gspo_megatron.rollout.engine import Engine, PauseMode, Request, Weights
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.group_scores import GroupScores
from gspo_megatron.rollout.probe import Probe, Proofs

MOST_IN_VAIN = 3
"""Attempts in a row in which all engines died before one of them finished a response."""
Result = TypeVar("Result")


@dataclass
class ServedSource(TrainingSource):
    """`RolloutSource` over engines.

    Attributes:
        open_pool: waits until the engines are ready; its arguments compare an engine with the trainer, and say whether
            to stop waiting, with StopRequested. None: this is not the main process.
        weights: the policy's tensors by their names in a Hugging Face folder, on the main process; all iterate.
        probe: what engines score after every change of weights.
        score: the trainer's log-probs of a sequence from a position on. All ranks call it together.
        as_in_training: how the responses of `groups` are sampled.
        stop_ids: end a response.
        stop: called while engines sample; True on any process stops the run.
        sign_of_life: called with a function that says how far sampling is.
    """

    policy: Policy
    open_pool: Callable[[Callable[[Engine], str], Callable[[], bool]], EnginePool] | None
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    probe: Probe
    score: Callable[[Seq[int], int], Seq[float]]
    as_in_training: Sampling
    stop_ids: tuple[int, ...]
    stop: Callable[[], bool] = lambda: False
    sign_of_life: Callable[[Callable[[], str]], None] = lambda say: None
    pause_mode: PauseMode = "wait"
    _pool: EnginePool | None = field(default=None, init=False)
    _sent: int | None = field(default=None, init=False)
    _expected: Seq[float] = field(default=(), init=False)
    _gap: float = field(default=0.0, init=False)
    _sync_s: float = field(default=0.0, init=False)
    _proofs: Proofs = field(init=False)

    def __post_init__(self) -> None:
        self._proofs = Proofs(self.probe)

    @property
    def metrics(self) -> Mapping[str, float]:
        """See `RolloutSource.metrics`."""
        return {**super().metrics, "engine/probe_gap": self._gap, "engine/sync_s": self._sync_s}

    def _rollouts(self, asked: Asked, together: int, reward: Reward, sampling: Sampling | None) -> list[Rollout]:
        how = sampling or self.as_in_training
        requests = [self._request(prompt, number, how) for prompt, number in asked]
        prompts = {number: prompt for prompt, number in asked}
        groups = [requests[i : i + together] for i in range(0, len(requests), together)]
        whole: dict[int, Rollout] = {}
        return self._sampled(lambda stopped: self._drawn(groups, prompts, whole, reward, stopped))

    def _sampled(self, work: Callable[[Event], Result]) -> Result:
        """The result of work(stopped) on the main process, whose engines have the policy's weights, on all. Engines
        that have all died and come back get the weights again. Collective."""
        in_vain, ended = 0, -1
        while True:
            try:
                self._give_weights()
                return self.ranks.from_main(work, self.stop)
            except EnginesStale as error:
                self._sent = None
                in_vain, ended = (0 if 0 <= ended < error.ended else in_vain + 1), error.ended
                if in_vain == MOST_IN_VAIN:
                    raise

    def _request(self, prompt: Prompt, number: int, how: Sampling) -> Request:
        return Request(
            id=number,
            prompt=tuple(prompt.tokens),
            response=(),
            seed=how.seed,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            max_new_tokens=how.max_new_tokens,
            stop_ids=self.stop_ids,
        )

    def _give_weights(self) -> None:
        """Makes the engines sample with the policy as it is. Collective.

        Raises:
            EngineError: on all ranks; engines do not take the weights, or have other log-probs with them.
        """
        version = self.policy.version
        if self._sent == version:
            return
        self.ranks.from_main(self._open, self.stop)
        started = time.perf_counter()
        self._expected, self._gap = self.score(self.probe.tokens, self.probe.prompt_length), 0.0
        # Engines may take longer for what comes before and after the tensors than ranks may wait in a collective.
        self.ranks.from_main(self._begin_update, lambda: False)
        error: Exception | None = None
        tensors = self.weights()
        if self._pool is not None:
            try:
                self._pool.give(Weights(version, tensors))
            except Exception as caught:
                error = caught
        try:
            # Every rank stays in the exchange to its end, also after a failure.
            for _ in tensors:
                pass
            self._gap = self.ranks.from_main(partial(self._end_update, error), lambda: False)
        except Exception as failed:
            if error is None or isinstance(failed, EngineError):
                raise
            raise failed from error
        self._sent, self._sync_s = version, time.perf_counter() - started

    def _begin_update(self, stopped: Event) -> None:
        assert self._pool is not None, "the main process has the engines"
        self._pool.begin_update(self.pause_mode)

    def _end_update(self, error: Exception | None, stopped: Event) -> float:
        """`error`: of giving the weights. Every rank learns of it, whatever it is: otherwise they would wait."""
        assert self._pool is not None
        try:
            if isinstance(error, EngineError):
                raise error
            if error is not None:
                at = traceback.extract_tb(error.__traceback__)[-1]
                raise CannotSend(
                    f"weights of version {self.policy.version} could not be sent to the engines: "
                    f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno}); correct what it names"
                ) from error
        finally:
            self._pool.end_update()
        return self._gap

    def _open(self, stopped: Event) -> None:
        if self._pool is None and self.open_pool is not None:
            self._pool = self.open_pool(self._wrong, stopped.is_set)

    def _wrong(self, engine: Engine) -> str:
        """What is wrong with the engine's log-probs; empty if nothing is."""
        found = engine.probe(self.probe.tokens, self.probe.prompt_length)
        complaint = self._proofs.complaint(engine.name, found, self._expected)
        if not complaint:
            self._gap = max(self._gap, self.probe.gap(found, self._expected))
        return complaint

    def _drawn(
        self,
        groups: Seq[Seq[Request]],
        prompts: Mapping[int, Prompt],
        whole: dict[int, Rollout],
        reward: Reward,
        stopped: Event,
    ) -> list[Rollout]:
        """On the main process: the responses, scored. `whole`: those that need not be sampled, to which it adds."""
        assert self._pool is not None, "the main process has the engines"
        size, version = len(groups[0]), self.policy.version
        rollouts = {r.id: Rollout(r.id, prompts[r.id], [], [], True, version) for group in groups for r in group}
        rollouts |= {number: replace(rollout) for number, rollout in whole.items()}
        missing = [[request for request in group if request.id not in whole] for group in groups]
        num_ended, num_tokens = len(whole), sum(len(rollout.tokens) for rollout in whole.values())
        with GroupScores(reward, self._decode, first_id=groups[0][0].id, size=size) as scores:
            for number in sorted(whole):
                scores.add(rollouts[number])
            for piece in self._pool.generate([group for group in missing if group], stopped.is_set):
                if wrong := [span for span in piece.versions if span.version != version]:
                    raise EngineError(f"tokens of weights of version {wrong[0].version} came, with rollout.max_lag=0")
                rollout = rollouts[piece.id]
                rollout.tokens += piece.tokens
                rollout.log_probs += piece.log_probs
                num_tokens += len(piece.tokens)
                if piece.finish:
                    rollout.truncated = piece.finish != "stop"
                    whole[rollout.id] = replace(rollout)
                    scores.add(rollout)
                    num_ended += 1
                progress = f"{num_ended:,} of {len(rollouts):,} rollouts, {plural(num_tokens, 'token')}"
                self.sign_of_life(lambda text=progress: text)  # type: ignore[misc]
            scores.finish(stopped.is_set)
            if stopped.is_set():
                raise StopRequested
        return list(rollouts.values())
