"""A fixed sequence that the engine and the trainer score after every load of weights.

An engine may take new weights without an error and still compute with others: kernels that pack weights, caches that
outlive an update, a name that one of the two spells differently. Its version says nothing about that; a log-prob does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Engine

FP32_LIMIT = 1e-4
"""Between two float32 implementations of the same model; 1e-5 is usual."""
FP32_RESOLUTION = 10 * 2.0**-23
"""Ten units in the last place of float32."""
LENGTH = 64


@dataclass(frozen=True)
class Probe:
    """
    Attributes:
        tokens: token ids; those from `prompt_length` on are scored, each given all before it.
        limit: the largest |log-prob of the engine - log-prob of the trainer| of a token that is let pass.
        resolution: the relative change of a log-prob that no engine can fail to show.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    limit: float = FP32_LIMIT
    resolution: float = FP32_RESOLUTION

    @classmethod
    def of_vocabulary(
        cls, num_ids: int, longest: int, *, limit: float = FP32_LIMIT, resolution: float = FP32_RESOLUTION
    ) -> Probe:
        """At most LENGTH token ids, or `longest`, spread over the vocabulary, so that many rows of the embedding and,
        in a mixture of experts, most experts take part."""
        length = min(LENGTH, longest)
        # Multiples of the golden ratio cover [0, 1) evenly, however many are taken.
        tokens = tuple(int(num_ids * (i * 0.6180339887498949 % 1)) for i in range(1, length + 1))
        return cls(tokens, 1, limit, resolution)

    def check(self, engine: Engine, expected: Seq[float]) -> float:
        """The largest gap between the engine's log-probs and the trainer's, which are `expected`.

        Raises:
            EngineError: see `complaint`.
        """
        found = engine.probe(self.tokens, self.prompt_length)
        if complaint := self.complaint(found, expected):
            raise EngineError(f"{engine.name}, weights version {engine.version()}: {complaint}")
        return self.gap(found, expected)

    def gap(self, found: Seq[float], expected: Seq[float]) -> float:
        """The largest one, of as many log-probs."""
        return max(_gaps(found, expected))

    def complaint(self, found: Seq[float], expected: Seq[float]) -> str:
        """What is wrong with an engine that has log-probs `found`, and what to do; empty: nothing. Wrong is a gap above
        the limit, a log-prob that is not finite, and another number of them."""
        if len(found) != len(expected):
            return f"{len(found)} tokens of the probe were scored instead of {len(expected)}; {VERSION}"
        gaps = _gaps(found, expected)
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[worst] <= self.limit:
            return ""
        place = self.prompt_length + worst
        above = sum(gap > self.limit for gap in gaps)
        return (
            f"it does not compute with the trainer's weights. The log-prob of token {place} of the probe (id "
            f"{self.tokens[place]}) is {found[worst]:.6f} in the engine and {expected[worst]:.6f} in the trainer, a "
            f"gap of {gaps[worst]:.2g}, and the limit is {self.limit:g}; {above} of {len(gaps)} tokens are above it. "
            f"Nothing that it samples may be trained on. {_advice(gaps[worst], self.limit)}"
        )

    def standstill(self, then: Seq[float], now: Seq[float]) -> str:
        """What is wrong with an engine whose log-probs are bit for bit the same, all of them, as they were when the
        trainer's were `then`; the trainer's are `now`. Empty: nothing is, for the trainer has not moved by more than an
        engine with its weights would show:

            max_i |now_i - then_i| / max(1, |then_i|) <= resolution

        After an update that changed nothing (learning rate 0, or skipped) the trainer has not moved. Changes add up:
        `then` stays until the engine's log-probs change. The limit alone would let an engine keep its first weights for
        as many updates as they take to differ by more."""
        moves = [abs(b - a) / max(1.0, abs(a)) for a, b in zip(then, now, strict=True)]
        worst = max(range(len(moves)), key=moves.__getitem__)
        if moves[worst] <= self.resolution:
            return ""
        return (
            "it has not loaded what it was sent. Its log-probs of the probe are the same to the last bit as before, "
            f"and that of token {self.prompt_length + worst} (id {self.tokens[self.prompt_length + worst]}) was "
            f"{then[worst]:.8f} in the trainer and is {now[worst]:.8f} now. Nothing that it samples may be trained on. "
            f"See docs/engines.md for models that vLLM does not reload rightly; {VERSION}."
        )


@dataclass
class Proofs:
    """What engines have answered to a probe, after one change of weights after the other."""

    probe: Probe
    _shown: dict[str, tuple[Seq[float], Seq[float]]] = field(default_factory=dict)
    """By engine: its log-probs of the last probe, and the trainer's when the engine first had these."""

    def complaint(self, name: str, found: Seq[float], expected: Seq[float]) -> str:
        """What is wrong with an engine's log-probs `found`, where the trainer has `expected`, and what to do; empty:
        nothing."""
        before, then = self._shown.get(name, ((), ()))
        if list(found) != list(before):
            then = expected
        self._shown[name] = found, then
        return self.probe.complaint(found, expected) or self.probe.standstill(then, expected)


VERSION = "run the version of vLLM that docs/engines.md names"


def _gaps(found: Seq[float], expected: Seq[float]) -> list[float]:
    return [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(found, expected, strict=True)]


def _advice(gap: float, limit: float) -> str:
    if math.isinf(gap):
        return (
            "A log-prob is not finite: look for NaN in the weights, or for an overflow of the engine's number format."
        )
    if gap < 100 * limit:
        return (
            "So small a gap is one of number formats: give the engine that of the trainer (precision.dtype), or set "
            "the limit to what a run with right weights shows."
        )
    return (
        "So large a gap is one of weights: see docs/engines.md for models that vLLM does not reload rightly, and start "
        f"the engine from the folder of the model that is trained; {VERSION}."
    )
