"""The protocol of an engine: a program of its own that samples with a copy of the policy's weights."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

PauseMode = Literal["keep", "abort", "wait"]
Finish = Literal["", "stop", "length", "abort"]


class Span(NamedTuple):
    """The sampled tokens [begin, end) of a response come from these weights."""

    version: int
    begin: int
    end: int


@dataclass(frozen=True)
class Request:
    """A response to sample, or to continue.

    Attributes:
        id: the rollout's; with `seed` and the position it gives the random number of a token.
        prompt: token ids.
        response: what has been sampled already, token ids; it counts against `max_new_tokens`.
        temperature: 0 takes the most likely token.
    """

    id: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Further tokens of a response.

    Attributes:
        id: the request's.
        tokens: token ids, in order; they follow those of the piece before.
        log_probs: natural logarithms, one a token, of the distribution it was drawn from.
        versions: of these tokens, `begin` and `end` within the whole response.
        finish: why the response ended; empty while it goes on.
    """

    id: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    versions: tuple[Span, ...]
    finish: Finish


class Weights(NamedTuple):
    """The weights of one policy version.

    Attributes:
        version: completed updates.
        tensors: (name in the Hugging Face folder, whole tensor), each name once; read once.
    """

    version: int
    tensors: Iterator[tuple[str, Tensor]]


class Engine(Protocol):
    """One engine. Every method but `generate` returns when the engine has done it.

    Raises, all methods but `alive` and `give_up`:
        Refused: the engine is well, and refuses what it was asked.
        EngineError: the engine does not answer, or not as the protocol says; it is dead until it is started again.
    """

    name: str

    def generate(self, requests: Seq[Request]) -> Iterator[Piece]:
        """Pieces as they are sampled, of all requests in any order; each request ends with one whose `finish` is set.
        May be called from several threads."""

    def pause(self, mode: PauseMode) -> None:
        """Sampling stands still: `keep` goes on at `resume`, `abort` ends every request, `wait` lets them end first.
        Clears the KV cache and the prefix cache in every mode: what goes on is computed with the weights of then."""

    def resume(self) -> None:
        """Sampling goes on."""

    def load(self, weights: Weights) -> None:
        """Takes these weights; the engine must be paused."""

    def version(self) -> int:
        """The version of the weights that it samples with; -1: those it was started with."""

    def probe(self, tokens: Seq[int], prompt_length: int) -> list[float]:
        """Log-probs of the tokens from `prompt_length` on, each given those before it, at the run's temperature."""

    def give_up(self) -> None:
        """It is taken for dead: every `generate` under way ends with an EngineError."""

    def alive(self) -> bool:
        """Whether it answers. Never raises."""
