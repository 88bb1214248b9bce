"""What one engine of a pool samples for a group, and whose fault an error is."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

from gspo_megatron.base.errors import CannotSend, EngineError, Refused
from gspo_megatron.rollout.answers import Answer
from gspo_megatron.rollout.engine import Piece, Request

OF_THE_RUN = (Refused, CannotSend)
"""Errors that are not the engine's: another one would not help, and starting it again would not either."""


def reason_of(error: BaseException) -> str:
    """What a message says about an error: its own message, with its type where that is not ours."""
    return str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"


@dataclass(eq=False)
class Flight:
    """The rollouts of a prompt, which one engine samples as long as it lives.

    Attributes:
        heard: gets every piece with this flight; then None at its end, or the exception that ends it.
    """

    requests: Seq[Request]
    heard: SimpleQueue[Heard]
    cancelled: bool = False
    answers: dict[int, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = {request.id: Answer(request) for request in self.requests}

    @property
    def going_on(self) -> list[Request]:
        return [answer.rest for answer in self.answers.values() if not answer.finish]


Heard = tuple[Flight, Piece | BaseException | None]


@contextmanager
def closed_at_end(pieces: Iterator[Piece]) -> Iterator[Iterator[Piece]]:
    """A generator that is left early ends its requests when it is closed, not when it is collected."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
