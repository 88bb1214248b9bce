"""How an engine draws tokens (engine.draw), as the arguments that vLLM is started with and the requests that it gets.

`counter` draws with the product's own random numbers, of (seed, rollout id, position), inside vLLM: vllm_draw.py. A
rollout is a function of the weights, its id and the seed, also where it is cut and continued elsewhere.

`vllm` leaves it to vLLM's own sampler, which is seeded with (seed, rollout id, position where the request begins). A
request samples the same tokens in any batch, but not those of the training model's sampler, and a response that is cut
goes on with other random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import numpy as np

from gspo_megatron.rollout.engine import Request

KEY = "gspo_megatron"
"""In `SamplingParams.extra_args`, what vllm_draw.py reads."""
NEVER = -100.0
"""The bias of an id that must not be drawn: the least that vLLM takes, a factor of e^-100."""


class Scored(NamedTuple):
    """A request that scores `ids`, the tokens after `tokens`: vLLM has `params`, and answers with a log-prob of each."""

    tokens: tuple[int, ...]
    params: dict[str, Any]
    ids: tuple[int, ...]


class EngineDraw(Protocol):
    """One way to draw.

    Attributes:
        num_ids: the tokenizer's ids; those beyond them are never sampled.
    """

    num_ids: int

    def parameters(self, request: Request) -> dict[str, Any]:
        """vLLM's `SamplingParams` of a request."""

    def probes(self, tokens: Seq[int], prompt_length: int, temperature: float) -> list[Scored]:
        """What scores the tokens from `prompt_length` on, in order."""


class CounterDraw:
    """See `EngineDraw`, and the head of this file."""

    arguments = (
        *("--logits-processors", "gspo_megatron.rollout.vllm_draw:CounterDraw"),
        # The log-prob that the draw leaves in place of a logit goes back as it is.
        *("--logprobs-mode", "processed_logits"),
    )

    def __init__(self, num_ids: int, vocab_size: int) -> None:
        self.num_ids = num_ids

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


class VllmDraw:
    """See `EngineDraw`, and the head of this file."""

    # Of the distribution it draws from, after temperature, top-k and top-p.
    arguments = ("--logprobs-mode", "processed_logprobs")

    def __init__(self, num_ids: int, vocab_size: int) -> None:
        self.num_ids = num_ids
        self._bias = {str(token): NEVER for token in range(num_ids, vocab_size)}

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
            wanted = {"logprobs": 2, "logprob_token_ids": [tokens[end]]}
            found.append(Scored(request.prompt, self.parameters(request) | wanted, (tokens[end],)))
        return found


DRAWS: Mapping[str, Callable[[int, int], EngineDraw]] = {"counter": CounterDraw, "vllm": VllmDraw}
"""By engine.draw, of (ids of the tokenizer, rows of the embedding)."""


def _in_all(request: Request) -> dict[str, Any]:
    return {
        "max_tokens": request.max_new_tokens - len(request.response),
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
