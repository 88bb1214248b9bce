"""vLLM inside the processes of the run: rank r is worker r % k of engine r // k, where k is engine.tensor_parallel.

Between two calls of `groups` or `held_out`, an engine on a GPU sleeps: its weights and its cache give up their memory
to the trainer. It gets the policy's weights before it samples, in the same process and without a copy of the model in
between, and must then have the trainer's log-probs of the probe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.batches import Prompt, Rollout, Sampling
from gspo_megatron.base.errors import EngineError, StopRequested, WrongWeights
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.rewards.rewards import Reward
from gspo_megatron.rollout.collective import Asked, CollectiveSource
from gspo_megatron.rollout.engine import Request
from gspo_megatron.rollout.engine_draws import EngineDraw
from gspo_megatron.rollout.engine_server import ServerSettings
from gspo_megatron.rollout.probe import Probe, Proofs

Result = TypeVar("Result")
VARIABLES = {
    # The engine's core in this process: ranks of one engine schedule alike and need no messages.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
TOGETHER = 16
"""Forwards of an engine between two questions to all ranks: whether anyone samples on, and whether to stop."""


class WorldRanks(Ranks, Protocol):
    """`Ranks` that can also ask every process."""

    def from_all(self, mine: Result) -> list[Result]:
        """The values of all processes, in rank order."""

    def max_over_ranks(self, numbers: list[int]) -> list[int]:
        """The elementwise maximum over all processes."""


class EngineRanks:
    """`Ranks` with an engine where others have a replica of the model: each samples a share, and its first rank
    reports it."""

    def __init__(self, ranks: WorldRanks, rank: int, world_size: int, per_engine: int) -> None:
        self._ranks = ranks
        self.dp_rank, self.dp_size = rank // per_engine, world_size // per_engine
        self.cp_rank, self.cp_size = 0, 1
        self.is_main, self.is_reporter = ranks.is_main, rank % per_engine == 0

    def gather(self, mine: list[Any]) -> list[Any]:
        """See `Ranks.gather`."""
        return [item for part in self._ranks.from_all(mine if self.is_reporter else []) for item in part]

    def any_rank(self, flag: bool) -> bool:
        """See `Ranks.any_rank`."""
        return self._ranks.any_rank(flag)

    def from_main(self, work: Callable[[Event], Result], stop: Callable[[], bool]) -> Result:
        """See `Ranks.from_main`."""
        return self._ranks.from_main(work, stop)

    def sum_over_parts(self, partial_S: Tensor) -> Tensor:
        """See `Ranks.sum_over_parts`."""
        return self._ranks.sum_over_parts(partial_S)

    def exchange(self, parts: Seq[Tensor]) -> list[Tensor]:
        """See `Ranks.exchange`."""
        return self._ranks.exchange(parts)


class ColocatedEngine:
    """This rank's part of an engine, and `Sampler` of base/protocols.py over it. All ranks call every method together.

    Attributes:
        version: of the policy, as its rollouts tell it.
        as_in_training: how responses are sampled, unless `generate` is told otherwise.
    """

    def __init__(
        self,
        settings: ServerSettings,
        ranks: WorldRanks,
        *,
        draw: EngineDraw,
        as_in_training: Sampling,
        stop_ids: tuple[int, ...],
        stop: Callable[[], bool],
        sign_of_life: Callable[[Callable[[], str]], None],
    ) -> None:
        self.ranks, self.draw, self.as_in_training, self.stop_ids = ranks, draw, as_in_training, stop_ids
        self.version = -1
        self._stop, self._sign_of_life = stop, sign_of_life
        self._sleeps = bool(settings.gpus)
        self._asleep = False
        with _numbers_kept():
            self._engine = _opened(settings)

    # ------------------------------------------------------------------------------------------------- sampling

    def generate(
        self,
        prompts: Seq[Prompt],
        ids: Seq[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Seq[int] = (),
    ) -> list[Rollout]:
        """See `Sampler.generate`.

        Raises:
            StopRequested: on all ranks, once `stop` has returned True on one.
        """
        how = sampling or self.as_in_training
        temperature = 0.0 if greedy else how.temperature
        for index, (prompt, number) in enumerate(zip(prompts, ids, strict=True)):
            told = tuple(prompt.tokens)
            begin = len(told) - (begun[index] if begun else 0)
            request = Request(
                id=number,
                prompt=told[:begin],
                response=told[begin:],
                seed=how.seed,
                temperature=temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                max_new_tokens=how.max_new_tokens,
                stop_ids=self.stop_ids,
            )
            self._add(str(index), told, self.draw.parameters(request))
        rollouts: dict[int, Rollout] = {}
        engine = self._engine
        while True:
            for _ in range(TOGETHER):
                for output in engine.step() if engine.has_unfinished_requests() else ():
                    if output.finished:
                        index = int(output.request_id)
                        rollouts[index] = self._rollout(output.outputs[0], prompts[index], ids[index])
                        ended(rollouts[index])
            self._sign_of_life(lambda: f"{len(rollouts):,} of {len(prompts):,} rollouts of this process")
            goes_on, is_asked = self.ranks.max_over_ranks([int(engine.has_unfinished_requests()), int(self._stop())])
            if is_asked:
                engine.abort_request([str(index) for index in range(len(prompts)) if index not in rollouts])
                raise StopRequested
            if not goes_on:
                return [rollouts[index] for index in range(len(prompts))]

    def _add(self, name: str, tokens: Seq[int], params: Mapping[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(tokens))
        self._engine.add_request(name, prompt, SamplingParams(**params))

    def _rollout(self, output: Any, prompt: Prompt, number: int) -> Rollout:
        tokens, log_probs = _sampled(output)
        return Rollout(number, prompt, tokens, log_probs, output.finish_reason != "stop", self.version)

    # -------------------------------------------------------------------------------------------------- control

    def load(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes these weights, and wakes up.

        Raises:
            EngineError: on all ranks; one cannot take them.
        """
        error = ""
        try:
            if self._asleep:
                self._engine.wake_up(["weights"])
            self._engine.collective_rpc("gspo_take", args=(tensors,))
            if self._asleep:
                self._engine.wake_up(["kv_cache"])
            self._asleep = False
            self._engine.reset_prefix_cache()
        except Exception as caught:
            error = str(caught) if isinstance(caught, EngineError) else f"{type(caught).__name__}: {caught}"
        # Every rank stays in the exchange to its end, also after a failure.
        for _ in tensors:
            pass
        self.version = version
        self.raise_first(error, EngineError)

    def probe(self, tokens: Seq[int], prompt_length: int) -> list[float]:
        """See `Engine.probe`."""
        asked = self.draw.probes(tokens, prompt_length, self.as_in_training.temperature)
        for number, each in enumerate(asked):
            self._add(str(number), each.tokens, each.params)
        engine, found = self._engine, dict[int, list[float]]()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    number = int(output.request_id)
                    rows = zip(asked[number].ids, output.outputs[0].logprobs, strict=True)
                    found[number] = [float(row[token].logprob) for token, row in rows]
        return [log_prob for number in range(len(asked)) for log_prob in found[number]]

    def raise_first(self, complaint: str, kind: type[EngineError]) -> None:
        """Raises, on all ranks, the first rank's complaint that is not empty."""
        for rank, said in enumerate(self.ranks.from_all(complaint)):
            if said:
                raise kind(f"the engine in process {rank}: {said}")

    def holds(self, version: int) -> bool:
        """Whether it has these weights, and is awake."""
        return self.version == version and not self._asleep

    def sleep(self) -> None:
        """Gives up its weights and its cache, on a GPU."""
        if self._sleeps:
            self._engine.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        """Ends vLLM's process groups. Its own end, at the exit of the process, would end those of the trainer first."""
        from vllm.distributed import parallel_state

        parallel_state.destroy_model_parallel()
        world, parallel_state._WORLD = parallel_state._WORLD, None
        if world is not None:
            world.destroy()


@dataclass
class ColocatedSource(CollectiveSource):
    """`RolloutSource` over engines in the run's own processes. `ranks` are those of the engines.

    Attributes:
        weights: the policy's tensors by their names in a Hugging Face folder, on every rank; all iterate.
        probe: what engines score after every change of weights.
        score: the trainer's log-probs of a sequence from a position on. All ranks call it together.
    """

    engine: ColocatedEngine
    policy: Policy
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    probe: Probe
    score: Callable[[Seq[int], int], Seq[float]]
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
        self._give_weights()
        try:
            return super()._rollouts(asked, together, reward, sampling)
        finally:
            self.engine.sleep()

    def _give_weights(self) -> None:
        """Makes the engines sample with the policy as it is. Collective.

        Raises:
            EngineError: an engine does not take the weights.
            WrongWeights: one has other log-probs with them.
        """
        started, version = time.perf_counter(), self.policy.version
        if self.engine.holds(version):
            return
        expected = self.score(self.probe.tokens, self.probe.prompt_length)
        self.engine.load(version, self.weights())
        found = self.engine.probe(self.probe.tokens, self.probe.prompt_length)
        complaint = self._proofs.complaint("", found, expected)
        self.engine.raise_first(complaint, WrongWeights)
        self._gap = max(self.engine.ranks.from_all(self.probe.gap(found, expected)))
        self._sync_s = time.perf_counter() - started


def _opened(settings: ServerSettings) -> Any:
    """vLLM's `LLMEngine` on the process group that is there: all ranks of the world call it together."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    sleeps = ("--enable-sleep-mode",) if settings.gpus else ()
    arguments = [*settings.engine_arguments(), *sleeps, "--distributed-executor-backend", "external_launcher"]
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))


def _sampled(output: Any) -> tuple[list[int], list[float]]:
    tokens = list(output.token_ids)
    return tokens, [float(row[token].logprob) for token, row in zip(tokens, output.logprobs, strict=True)]


@contextmanager
def _numbers_kept() -> Iterator[None]:
    """vLLM seeds every generator of the process when it starts; the trainer's go on as if it had not."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(own)
    np.random.set_state(numpys)
