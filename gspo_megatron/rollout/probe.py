"""A fixed sequence that the engine and the trainer score after every load of weights.

An engine may take new weights without an error and still compute with others: kernels that pack weights, caches that
outlive an update, a name that one of the two spells differently. Its version says nothing about that; a log-prob does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from gspo_megatron.base.errors import EngineError, WrongWeights
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
            WrongWeights: it is above the limit, or a log-prob is not finite.
            EngineError: the engine does not answer, or with another number of log-probs.
        """
        found = engine.probe(self.tokens, self.prompt_length)
        if len(found) != len(expected):
            raise EngineError(
                f"engine {engine.name} scored {len(found)} tokens of the probe instead of {len(expected)}; start it "
                "again, with the vLLM that docs/engines.md names"
            )
        gaps = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(found, expected, strict=True)]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[worst] > self.limit:
            place = self.prompt_length + worst
            above = sum(gap > self.limit for gap in gaps)
            raise WrongWeights(
                f"{engine.name} does not compute with the trainer's weights (version {engine.version()}): the "
                f"log-prob of token {place} of the probe (id {self.tokens[place]}) is {found[worst]:.6f} there and "
                f"{expected[worst]:.6f} in the trainer, a gap of {gaps[worst]:.2g}, and the limit is {self.limit:g} "
                f"({above} of {len(gaps)} tokens are above it). Nothing it samples may be trained on. "
                f"{_advice(self, gaps)}"
            )
        return gaps[worst]


def _advice(probe: Probe, gaps: Seq[float]) -> str:
    if not math.isfinite(max(gaps)):
        return "A log-prob is not finite: look for NaN in the weights (loss, grad_norm), or an overflow in fp16"
    if max(gaps) < 100 * probe.limit:
        return (
            "So small a gap is one of number formats: give the engine the trainer's (precision.dtype), or raise "
            "engine.probe_limit to what a run with right weights shows"
        )
    return (
        "So large a gap is one of weights: start the engine from the folder of the model that is trained, with "
        "the worker of rollout/vllm_worker.py, and see docs/engines.md for models that vLLM does not reload rightly"
    )
