"""A policy, a sampler and ranks that the trainer can drive without Megatron and without processes.

The policy is a table of next-token logits by previous token: a real distribution with a real gradient, small enough to
learn in a second. Its task can be learned: answer a capital letter with the same letter in lower case.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.batches import IGNORED, MicroBatch, Position, Prompt, Rollout, Sampling, UpdateBatch
from gspo_megatron.base.errors import EngineError, StopRequested
from gspo_megatron.base.metrics import Metric, merge
from gspo_megatron.base.protocols import Accept, Loss, Ranks, Sampler, SavedState
from gspo_megatron.build.environments import environment_of
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.parts import assemble
from gspo_megatron.build.rewards import rewards_of
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.environments.environment import Environment
from gspo_megatron.layout.layout import Layout
from gspo_megatron.monitor.console import Console
from gspo_megatron.rollout.native.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.evaluation import EvalSet
from gspo_megatron.run.resume import Continuation
from gspo_megatron.run.state import RunState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.time_limits import time_factor

Result = TypeVar("Result")

TOKENIZER = CharacterTokenizer("ABab")
SETTINGS = (
    f"model.vocab_size={TOKENIZER.vocab_size}",
    "precision.device=cpu",
    "model.max_sequence_length=8",
    "rollout.max_new_tokens=3",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "algorithm.updates_per_rollout=2",
    "algorithm.clip_low=0.03",
    "algorithm.clip_high=0.04",
    "optimizer.lr=5",
    "train.steps=3",
    "train.tokens_per_micro_batch=12",
    "data.eval_size=7",
)


def config_of(*overrides: str) -> Config:
    judged = any(override.startswith("reward.functions") for override in overrides)
    return load_config(None, [*SETTINGS, *([] if judged else ["reward.functions.exact_match=1"]), *overrides])


class Prompts:
    """`size` prompts of one to three capital letters; the answer is the last one in lower case."""

    dropped: Mapping[str, int] = MappingProxyType({})
    digest = ""

    def __init__(self, size: int = 1000, seed: int = 0) -> None:
        self.size: int | None = size
        self._seed = seed

    def __getitem__(self, index: int) -> Prompt:
        random = Random(f"{self._seed} {index}")
        text = "".join(random.choices("AB", k=random.randint(1, 3)))
        answer = text[-1].lower()
        return Prompt(index, text, tuple(TOKENIZER.encode(text)), answer, answer)


class OneRank:
    """The `Ranks` of a single process."""

    dp_rank, dp_size, cp_rank, cp_size, is_main, is_reporter = 0, 1, 0, 1, True, True

    def gather(self, mine: list[Any]) -> list[Any]:
        return list(mine)

    def sum_over_parts(self, partial_S: Tensor) -> Tensor:
        return partial_S

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)

    def any_rank(self, flag: bool) -> bool:
        return flag

    def from_main(self, work: Callable[[threading.Event], Result], stop: Callable[[], bool]) -> Result:
        stopped = threading.Event()
        if stop():
            raise StopRequested
        return work(stopped)


class Replicas:
    """`Ranks` of `size` data-parallel replicas in as many threads, which wait for each other in `gather`."""

    def __init__(self, size: int) -> None:
        self._parts: list[list[Any]] = [[] for _ in range(size)]
        self._meeting = threading.Barrier(size, timeout=30 * time_factor())
        self.ranks = [_Replica(self, rank, size) for rank in range(size)]

    def gather(self, rank: int, mine: list[Any]) -> list[Any]:
        self._parts[rank] = mine
        self._meeting.wait()
        joined = [item for part in self._parts for item in part]
        self._meeting.wait()
        return joined

    def run(self, work: Callable[[Ranks], Result]) -> list[Result]:
        """work(ranks) for every replica at once; the results in order. The first error of any is raised."""
        results: list[Any] = [None] * len(self.ranks)

        def guarded(rank: int) -> None:
            try:
                results[rank] = work(self.ranks[rank])
            except BaseException as error:
                results[rank] = error
                self._meeting.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(len(self.ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results


class _Replica:
    cp_rank, cp_size, is_reporter = 0, 1, True

    def __init__(self, replicas: Replicas, rank: int, size: int) -> None:
        self._replicas, self.dp_rank, self.dp_size, self.is_main = replicas, rank, size, rank == 0

    def gather(self, mine: list[Any]) -> list[Any]:
        return self._replicas.gather(self.dp_rank, mine)

    def sum_over_parts(self, partial_S: Tensor) -> Tensor:
        return partial_S

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [sent[self.dp_rank] for sent in self.gather([list(parts)])]

    def any_rank(self, flag: bool) -> bool:
        return any(self.gather([flag]))

    def from_main(self, work: Callable[[threading.Event], Result], stop: Callable[[], bool]) -> Result:
        if self.any_rank(stop()):
            raise StopRequested
        outcome: list[Any] = []
        if self.is_main:
            try:
                outcome = [work(threading.Event())]
            except EngineError as error:
                outcome = [error]
        [result] = self.gather(outcome)
        if isinstance(result, EngineError):
            raise result
        return result


class TablePolicy:
    """`Policy` of base/protocols.py: log pi(token | token before) = log_softmax(logits[before]), in float64, plain SGD.

    `calls` lists its calls in order; the sampler adds its own to the same list. `losses` are this rank's shares, one
    per update.
    """

    score_dtype = torch.float64

    def __init__(self, ranks: Ranks, vocab_size: int = TOKENIZER.vocab_size) -> None:
        self.ranks, self.version = ranks, 0
        self.calls: list[str] = []
        # This seed starts with the right answer for 16 % of the A's and 8 % of the B's: something to learn from.
        generator = torch.Generator().manual_seed(21)
        self.logits_VV = torch.randn(vocab_size, vocab_size, generator=generator).double()
        self.reference_VV: Tensor | None = None
        self.batches: list[UpdateBatch] = []
        self.losses: list[float] = []

    def begin(self, *, with_reference: bool) -> None:
        self.calls.append(f"begin, reference {with_reference}")
        self.version = 0
        self.reference_VV = self.logits_VV.clone() if with_reference else None

    def log_probs(
        self, micro_batches: Sequence[MicroBatch], *, reference: bool = False, as_old: bool = False
    ) -> list[Tensor]:
        self.calls.append("reference log-probs" if reference else "log-probs")
        table_VV = self.reference_VV if reference else self.logits_VV
        assert table_VV is not None
        return [_responses(table_VV, m)[0] for m in micro_batches]

    def update(self, batch: UpdateBatch, loss: Loss, *, lr: float, accept: Accept | None = None) -> dict[str, Metric]:
        self.calls.append(f"update, lr {lr:g}")
        self.batches.append(batch)
        table_VV = self.logits_VV.clone().requires_grad_()
        metrics = []
        for micro_batch in batch.micro_batches:
            terms = loss(*_responses(table_VV, micro_batch), micro_batch, batch)
            terms.loss.backward()
            metrics.append(terms.metrics | {"loss": Metric(terms.loss.detach(), reduction="sum")})
        gradient_VV = sum(self.ranks.gather([table_VV.grad]))
        norm = float(gradient_VV.norm())
        finite = all(self.ranks.gather([all(math.isfinite(m["loss"].total) for m in metrics)]))
        if accept is None or accept(norm if math.isfinite(norm) else math.inf, finite):
            self.logits_VV = self.logits_VV - lr * gradient_VV
        self.version += 1
        self.losses.append(sum(float(m["loss"].total) for m in metrics))
        return merge(metrics) | ({"grad_norm": Metric(norm)} if self.ranks.dp_rank == 0 else {})

    def differing_replicas(self) -> list[str]:
        tables = self.ranks.gather([self.logits_VV])
        return [f"logits on ranks 0 | {i}" for i, table_VV in enumerate(tables) if not torch.equal(table_VV, tables[0])]


def _responses(logits_VV: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(log-probs [R], entropies [R]) of the micro-batch's response tokens."""
    is_scored_T = micro_batch.targets_T != IGNORED
    log_p_RV = logits_VV[micro_batch.tokens_T[is_scored_T]].log_softmax(dim=-1)
    entropy_R = -(log_p_RV.exp() * log_p_RV).sum(dim=-1)
    return log_p_RV.gather(1, micro_batch.targets_T[is_scored_T][:, None]).squeeze(1), entropy_R


class TableSampler:
    """`Sampler` of base/protocols.py, drawing from a TablePolicy. `ids` and `prompts` hold the arguments of every
    call."""

    def __init__(self, policy: TablePolicy, config: Config) -> None:
        self.policy, self.config = policy, config
        self.ids: list[list[int]] = []
        self.prompts: list[list[int]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Sequence[int] = (),
    ) -> list[Rollout]:
        self.policy.calls.append("sample greedily" if greedy else "sample")
        self.ids.append(list(ids))
        self.prompts.append([p.id for p in prompts])
        r = self.config.rollout
        own = sampling or Sampling(r.temperature, 1.0, 0, r.max_new_tokens, self.config.run.seed)
        how = Decoding(own.temperature or r.temperature, own.top_k, own.top_p, greedy)
        rollouts = [Rollout(i, p, [], [], True, self.policy.version) for p, i in zip(prompts, ids, strict=True)]
        first = dict(zip(ids, begun or [0] * len(ids), strict=True))
        while going_on := [r for r in rollouts if r.truncated and first[r.id] + len(r.tokens) < own.max_new_tokens]:
            rollout_ids = np.array([r.id for r in going_on], dtype=np.int64)
            positions = np.array([first[r.id] + len(r.tokens) for r in going_on], dtype=np.int64)
            u_B = torch.from_numpy(uniforms(own.seed, rollout_ids, positions))
            before = [(r.prompt.tokens + tuple(r.tokens))[-1] for r in going_on]
            tokens_B, log_probs_B = next_tokens(self.policy.logits_VV[before], u_B, how)
            for rollout, token, log_prob in zip(going_on, tokens_B.tolist(), log_probs_B.tolist(), strict=True):
                rollout.tokens.append(token)
                rollout.log_probs.append(log_prob)
                rollout.truncated = token != TOKENIZER.eos_id
        for rollout in rollouts:
            ended(rollout)
        return rollouts


class Notebook(Console):
    """A silent console that keeps what a run says and warns of."""

    def __init__(self) -> None:
        super().__init__(on=False)
        self.warnings: list[str] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class PlainState:
    """`SavedState` of base/protocols.py that has no tensors."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about

    def to_json(self) -> dict[str, Any]:
        return self.about

    def tensors(self) -> dict[str, Tensor]:
        return {}


def plain(about: dict[str, Any], shares: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Reads a PlainState: the dict it was made from."""
    return about


class Shelf:
    """`Checkpoints` of base/protocols.py that keeps what was saved in memory, as it would be loaded: through JSON, with
    the tensors of all ranks."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or OneRank()
        self.saved: list[tuple[Position, RunState]] = []
        self.best: list[Position | None] = []
        """With each of them, the checkpoint to keep."""

    def save(self, position: Position, state: SavedState, *, wait: bool, best: Position | None = None) -> None:
        self.best.append(best)
        shares = self.ranks.gather([state.tensors()])
        self.saved.append((position, RunState.from_saved(json.loads(json.dumps(state.to_json())), shares)))

    def finish(self, *, wait: bool = True) -> None:
        pass


def trainer_of(
    config: Config,
    ranks: Ranks | None = None,
    policy: TablePolicy | None = None,
    *,
    sampler: Sampler | None = None,
    train_prompts: PromptSource | None = None,
    eval_prompts: PromptSource | None = None,
    console: Console | None = None,
    environment: Environment | None = None,
    state: RunState | None = None,
    more_sets: Sequence[EvalSet] = (),
    **parts: Any,
) -> Trainer:
    """A trainer with fake parts, assembled like a real one. `state`: what it continues from; `parts` go to
    `build.parts.assemble`."""
    ranks = ranks or OneRank()
    policy = policy or TablePolicy(ranks)
    inputs = Inputs(
        config,
        Layout(1),
        Algorithm.of(config),
        TOKENIZER,
        rewards_of(config),
        train_prompts or Prompts(),
        eval_prompts or Prompts(seed=1),
        more_sets=tuple(more_sets),
        environment=environment or environment_of(config, TOKENIZER),
    )
    assembled = assemble(
        inputs,
        policy,
        sampler or TableSampler(policy, config),
        ranks,
        console=console or Notebook(),
        guards=state.guards if state else None,
        taken=state.taken if state else None,
        held=state.held if state else None,
        **parts,
    )
    newest = config.checkpoint.load == "latest"
    return Trainer(assembled, Continuation(state, own=newest, is_newest=newest))
