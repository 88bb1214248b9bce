"""How an engine draws tokens (engine.draw), as the arguments that vLLM is started with and the requests that it gets.

`counter` draws with the product's own random numbers, of (seed, rollout id, position), inside vLLM: vllm_draw.py. A
rollout is a function of the weights, its id and the seed, also where it is cut and continued elsewhere.

`vllm` leaves it to vLLM's own sampler, which is seeded with (seed, rollout id, position where the request begins). A
request samples the same tokens in any batch, but not those of the training model's sampler, and a response that is cut
goes on with other random numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gspo_megatron.base.errors import shortened
from gspo_megatron.rollout.engine import Request

REFUSAL = "extra_args.gspo_megatron must hold"
"""What vllm_draw.py says to a request that does not say how to draw."""
KEY = "gspo_megatron"
"""In `SamplingParams.extra_args`, what vllm_draw.py reads."""
NEVER = -1e9
"""The bias of an id that must not be drawn: its probability is 0 in float32."""


class Scored(NamedTuple):
    """A request that scores `ids`, the tokens after `tokens`; `params` are vLLM's `SamplingParams`."""

    tokens: tuple[int, ...]
    params: dict[str, Any]
    ids: tuple[int, ...]


class EngineDraw(ABC):
    """One way to draw.

    Attributes:
        num_ids: the tokenizer's ids; those beyond them are never sampled.
        arguments: of vLLM's command line.
        trial: `SamplingParams` of a request that shows whether an engine was started with them.
    """

    arguments: ClassVar[tuple[str, ...]]
    trial: ClassVar[Mapping[str, Any]]

    def __init__(self, num_ids: int, vocab_size: int) -> None:
        """`vocab_size`: rows of the embedding."""
        self.num_ids = num_ids

    @staticmethod
    @abstractmethod
    def misfit(answer: str | float) -> str:
        """What is wrong with an engine that answers `trial` with this refusal or log-prob; empty: nothing."""

    @abstractmethod
    def parameters(self, request: Request) -> dict[str, Any]:
        """vLLM's `SamplingParams` of a request."""

    @abstractmethod
    def probes(self, tokens: Seq[int], prompt_length: int, temperature: float) -> list[Scored]:
        """What scores the tokens from `prompt_length` on, in order."""


class DrawByCounter(EngineDraw):
    """See `EngineDraw`, and the head of this file."""

    arguments = (
        *("--logits-processors", "gspo_megatron.rollout.vllm_draw:CounterDraw"),
        # The log-prob that the draw leaves in place of a logit goes back as it is.
        *("--logprobs-mode", "processed_logits"),
    )
    # It does not say how to draw, which vllm_draw.py refuses, and nothing else.
    trial = MappingProxyType({"max_tokens": 1, "temperature": 0})

    @staticmethod
    def misfit(answer: str | float) -> str:
        """See `EngineDraw.misfit`."""
        if isinstance(answer, str) and REFUSAL in answer:
            return ""
        return "draws tokens by itself, so that a seed would not give the run's rollouts (engine.draw=counter)"

    def parameters(self, request: Request) -> dict[str, Any]:
        """See `EngineDraw.parameters`. vLLM takes the only logit that the draw leaves."""
        return self._asked(request, ())

    def probes(self, tokens: Seq[int], prompt_length: int, temperature: float) -> list[Scored]:
        """See `EngineDraw.probes`. One request, which takes these tokens as if it had drawn them."""
        prompt, forced = tuple(tokens[:prompt_length]), tuple(tokens[prompt_length:])
        request = Request(0, prompt, (), 0, temperature, 1.0, 0, len(forced), ())
        return [Scored(prompt, self._asked(request, forced), forced)]

    def _asked(self, request: Request, forced: tuple[int, ...]) -> dict[str, Any]:
        drawn = {
            "seed": request.seed,
            "id": request.id,
            "begin": len(request.response),
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "num_ids": self.num_ids,
            "forced": list(forced),
        }
        return {**_in_all(request), "temperature": 0, "extra_args": {KEY: drawn}}


class DrawByVllm(EngineDraw):
    """See `EngineDraw`, and the head of this file."""

    # Of the distribution it draws from, after temperature, top-k and top-p.
    arguments = ("--logprobs-mode", "processed_logprobs")
    # The only id that may be drawn has the log-prob 0, and another one before the others are left out.
    trial = MappingProxyType(
        {"max_tokens": 1, "temperature": 1, "allowed_token_ids": (0,), "logprobs": 0, "detokenize": False}
    )

    def __init__(self, num_ids: int, vocab_size: int) -> None:
        super().__init__(num_ids, vocab_size)
        self._bias = dict.fromkeys(range(num_ids, vocab_size), NEVER)

    @staticmethod
    def misfit(answer: str | float) -> str:
        """See `EngineDraw.misfit`."""
        if answer == 0.0:
            return ""
        if isinstance(answer, str) and REFUSAL in answer:
            return "draws the product's random numbers, and this run asks for vLLM's (engine.draw=vllm)"
        return f"sends log-probs of another distribution than it draws from, or none ({shortened(str(answer))})"

    def parameters(self, request: Request) -> dict[str, Any]:
        """See `EngineDraw.parameters`."""
        numbers = [request.seed, request.id % 2**64, len(request.response)]
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) % 2**63
        return {
            **_in_all(request),
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "seed": seed,
            "logit_bias": self._bias,
        }

    def probes(self, tokens: Seq[int], prompt_length: int, temperature: float) -> list[Scored]:
        """See `EngineDraw.probes`. A request for each token: it samples one, and tells the log-prob of this one too."""
        found = []
        for end in range(prompt_length, len(tokens)):
            request = Request(0, tuple(tokens[:end]), (), 0, temperature, 1.0, 0, 1, ())
            # Twice: the server sends as many log-probs as are asked for, the first of which is the sampled token's.
            wanted = {"logprobs": 2, "logprob_token_ids": 2 * [tokens[end]]}
            found.append(Scored(request.prompt, self.parameters(request) | wanted, (tokens[end],)))
        return found


DRAWS: Mapping[str, type[EngineDraw]] = {"counter": DrawByCounter, "vllm": DrawByVllm}
"""By engine.draw."""


def _in_all(request: Request) -> dict[str, Any]:
    return {
        "max_tokens": request.max_new_tokens - len(request.response),
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
