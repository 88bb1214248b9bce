"""A fixed sequence that the engine and the trainer score after every load of weights.

An engine may take new weights without an error and still compute with others: kernels that pack weights, caches that
outlive an update, a name that one of the two spells differently. Its version says nothing about that; a log-prob does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Engine

FP32_LIMIT = 1e-4
"""Between two float32 implementations of the same model; 1e-5 is usual."""
LENGTH = 64


@dataclass(frozen=True)
class Probe:
    """
    Attributes:
        tokens: token ids; those from `prompt_length` on are scored, each given all before it.
        limit: the largest |log-prob of the engine - log-prob of the trainer| of a token that is let pass.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    limit: float = FP32_LIMIT

    @classmethod
    def of_vocabulary(cls, num_ids: int, longest: int, *, limit: float = FP32_LIMIT) -> Probe:
        """At most LENGTH token ids, or `longest`, spread over the vocabulary, so that many rows of the embedding and,
        in a mixture of experts, most experts take part."""
        length = min(LENGTH, longest)
        # Multiples of the golden ratio cover [0, 1) evenly, however many are taken.
        return cls(tuple(int(num_ids * (i * 0.6180339887498949 % 1)) for i in range(1, length + 1)), 1, limit)

    def check(self, engine: Engine, expected: Seq[float]) -> float:
        """The largest gap between the engine's log-probs and the trainer's, which are `expected`.

        Raises:
            EngineError: see `complaint`.
        """
        found = engine.probe(self.tokens, self.prompt_length)
        if complaint := self.complaint(found, expected):
            raise EngineError(f"engine {engine.name}, weights version {engine.version()}: {complaint}")
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
