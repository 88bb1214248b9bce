"""An engine in this process, for what is built on engines: the pool, the buffer, the source of rollouts.

Its model is that of `fakes.TablePolicy`, a table of next-token logits by previous token, and it draws with the
product's random numbers: a run over fake engines has the rollouts of a run over `TableSampler`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Finish, PauseMode, Piece, Request, Span, Weights
from gspo_megatron.rollout.native.sampling import Decoding, next_tokens, uniforms

Garbage = Literal["", "half", "other id", "no log-prob", "nan", "version", "gap"]
TABLE = "logits"
"""The name of the one tensor of its weights."""


def weights_of(version: int, logits_VV: Tensor) -> Weights:
    """The weights of a table of logits. A real model has many tensors, so this has its rows."""
    return Weights(version, ((f"{TABLE}.{i}", row_V.clone()) for i, row_V in enumerate(logits_VV)))


@dataclass
class FakeEngine:
    """`Engine` over a table of logits.

    Attributes:
        vocab_size: of the weights it is started with.
        delay_s: seconds that each round of sampling takes, one token of every request.
        piece: tokens of a piece.
        dies_after: rounds until it dies, in the middle of all its requests; -1: never.
        garbage: how its answers are wrong.
        keeps_old: it says that it has taken new weights, and samples with the old ones.
        refuses: methods that kill it, once.
        calls: control calls, in order.
        asked: the requests of every `generate`.
    """

    name: str
    vocab_size: int = 16
    delay_s: float = 0.0
    piece: int = 2
    dies_after: int = -1
    garbage: Garbage = ""
    keeps_old: bool = False
    refuses: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    asked: list[list[Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self.rounds, self._life = 0, 0
        self.start()

    def start(self) -> None:
        """As a process that has just been started: with weights of its own, which are not the policy's."""
        with self._changed:
            self.dead, self.paused, self._mode = False, False, "keep"
            self._version, self._under_way, self._aborts = -1, set[object](), 0
            self._logits_VV = torch.zeros(self.vocab_size, self.vocab_size, dtype=torch.float64)
            self._life += 1
            self._changed.notify_all()

    def kill(self) -> None:
        """As kill -9."""
        with self._changed:
            self.dead = True
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------ data plane

    def generate(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """See `Engine.generate`."""
        with self._changed:
            life = self._life
            self._changed.wait_for(lambda: self.dead or self._life != life or not self.paused)
            self._alive("generate", life)
            self.asked.append(list(requests))
            self._under_way.add(own := object())
        try:
            yield from self._pieces([_UnderWay(request) for request in requests])
        finally:
            with self._changed:
                # Not of a later life.
                self._under_way.discard(own)
                self._changed.notify_all()

    def _pieces(self, open_: list[_UnderWay]) -> Iterator[Piece]:
        aborts, life = self._aborts, self._life
        while open_:
            with self._changed:
                # `wait` holds back what comes later, not what has begun.
                self._changed.wait_for(
                    lambda: self.dead or self._life != life or not self.paused or self._mode != "keep"
                )
                self._alive("generate", life)
                aborted = self._aborts != aborts
                if not aborted:
                    self._round(open_)
            if aborted:
                yield from (self._spoilt(one.cut("abort")) for one in open_)
                return
            if self.delay_s:
                time.sleep(self.delay_s)
            for one in [one for one in open_ if one.finish or len(one.tokens) >= self.piece]:
                if self.garbage == "half" and one.finish:
                    continue
                yield self._spoilt(one.cut(one.finish))
            open_ = [one for one in open_ if not one.finish]

    def _round(self, open_: Sequence[_UnderWay]) -> None:
        """Draws a token for each."""
        if self.rounds == self.dies_after:
            self.dead, self.dies_after = True, -1
            self._changed.notify_all()
        self._alive("generate")
        self.rounds += 1
        for one in open_:
            asked = one.request
            u_B = torch.from_numpy(uniforms(asked.seed, np.array([asked.id]), np.array([one.length])))
            how = Decoding(asked.temperature or 1.0, asked.top_k, asked.top_p, greedy=asked.temperature == 0)
            token_B, log_prob_B = next_tokens(self._logits_VV[one.last][None], u_B, how)
            one.draw(int(token_B), float(log_prob_B), self._version)

    def _spoilt(self, piece: Piece) -> Piece:
        first = piece.versions[0] if piece.versions else Span(0, 0, 0)
        match self.garbage:
            case "other id":
                return replace(piece, id=piece.id + 10_000)
            case "no log-prob":
                return replace(piece, log_probs=piece.log_probs[1:])
            case "nan":
                return replace(piece, log_probs=(float("nan"),) * len(piece.tokens))
            case "version":
                return replace(piece, versions=(first._replace(version=first.version + 1), *piece.versions[1:]))
            case "gap":
                return replace(piece, versions=(first._replace(begin=first.begin + 1), *piece.versions[1:]))
            case _:
                return piece

    # --------------------------------------------------------------------------------------------- control plane

    def pause(self, mode: PauseMode) -> None:
        """See `Engine.pause`."""
        self._called(f"pause {mode}")
        with self._changed:
            self.paused, self._mode, self._aborts = True, mode, self._aborts + (mode == "abort")
            self._changed.notify_all()
            if mode == "wait":
                self._changed.wait_for(lambda: self.dead or not self._under_way)
                self._alive("pause")

    def resume(self) -> None:
        """See `Engine.resume`."""
        self._called("resume")
        with self._changed:
            self.paused = False
            self._changed.notify_all()

    def load(self, weights: Weights) -> None:
        """See `Engine.load`."""
        self._called(f"load {weights.version}")
        if not self.paused:
            raise AssertionError("load of an engine that is not paused")
        rows = dict(weights.tensors)
        with self._changed:
            if not (self.keeps_old and self._version >= 0):
                self._logits_VV = torch.stack([rows[f"{TABLE}.{i}"] for i in range(len(rows))])
            self._version = weights.version

    def version(self) -> int:
        """See `Engine.version`."""
        self._called("version")
        return self._version

    def probe(self, tokens: Sequence[int], prompt_length: int) -> list[float]:
        """See `Engine.probe`. Like vLLM, it does not answer while it is paused."""
        self._called("probe")
        if self.paused:
            raise EngineError(f"{self.name} does not answer a probe: it is paused")
        log_probs_VV = self._logits_VV.double().log_softmax(dim=-1)
        return [float(log_probs_VV[tokens[i - 1], tokens[i]]) for i in range(prompt_length, len(tokens))]

    def give_up(self) -> None:
        """See `Engine.give_up`."""
        with self._changed:
            self._life += 1
            self._changed.notify_all()

    def alive(self) -> bool:
        """See `Engine.alive`."""
        return not self.dead

    def _called(self, what: str) -> None:
        self._alive(what)
        self.calls.append(what)
        if (method := what.split()[0]) in self.refuses:
            self.refuses.discard(method)
            self.kill()
            self._alive(what)

    def _alive(self, what: str, life: int = 0) -> None:
        """`life`: of which a call is; another one has not heard of it."""
        if self.dead or life not in (0, self._life):
            raise EngineError(f"{self.name} does not answer {what}: connection refused")


@dataclass
class _UnderWay:
    """A request, and what was drawn for it: all of it is counted in `length`, and `tokens` are not yet sent."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[Span] = field(default_factory=list)
    finish: Finish = ""

    def __post_init__(self) -> None:
        self.length = len(self.request.response)
        self.last = (*self.request.prompt, *self.request.response)[-1]

    def draw(self, token: int, log_prob: float, version: int) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if self.versions and self.versions[-1].version == version:
            self.versions[-1] = self.versions[-1]._replace(end=self.length + 1)
        else:
            self.versions.append(Span(version, self.length, self.length + 1))
        self.length, self.last = self.length + 1, token
        if token in self.request.stop_ids:
            self.finish = "stop"
        elif self.length >= self.request.max_new_tokens:
            self.finish = "length"

    def cut(self, finish: Finish) -> Piece:
        """What was drawn since the last one."""
        piece = Piece(self.request.id, tuple(self.tokens), tuple(self.log_probs), tuple(self.versions), finish)
        self.tokens, self.log_probs, self.versions = [], [], []
        return piece
