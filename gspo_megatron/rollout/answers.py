"""What an engine has answered to a request so far, checked piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Finish, Piece, Request, Span


@dataclass
class Answer:
    """The tokens sampled for a request, with their log-probs and the versions of the weights they come from.

    Attributes:
        request: what was asked for. Its `response` is part of the response, but not of `tokens`.
        versions: spans of `tokens`, in order and without a gap; begin and end count within the whole response.
        finish: why the response ended; empty while it goes on.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[Span] = field(default_factory=list)
    finish: Finish = ""

    @property
    def length(self) -> int:
        """Tokens of the whole response."""
        return len(self.request.response) + len(self.tokens)

    @property
    def rest(self) -> Request:
        """The request for what is still to be sampled. A position has the same random number in it."""
        return replace(self.request, response=(*self.request.response, *self.tokens))

    def dated(self, piece: Piece, version: int) -> Piece:
        """The piece, of whose tokens the engine has told no version yet, with that of its weights at this moment."""
        if piece.versions or not piece.tokens:
            return piece
        return replace(piece, versions=(Span(version, self.length, self.length + len(piece.tokens)),))

    def add(self, piece: Piece, known: range) -> None:
        """Appends a piece. `known`: the versions that its tokens may come from. Its spans may reach back over earlier
        tokens, and then replace what was known of them. A piece that ends a response with `abort` leaves it open: it
        is to be continued.

        Raises:
            EngineError: the piece does not follow what was sampled before, or cannot have been sampled for this.
        """
        if why := self._fault(piece) or self._fault_in_versions(piece, known):
            raise EngineError(f"answered request {piece.id} with {why}")
        self.tokens += piece.tokens
        self.log_probs += piece.log_probs
        if spans := piece.versions:
            self.versions = _merged([*_until(self.versions, spans[0].begin), *spans])
        self.finish = "" if piece.finish == "abort" else piece.finish

    def close_if_whole(self) -> None:
        """Sets `finish` if the tokens say it: the engine may have died before it could."""
        last = [*self.request.response, *self.tokens][-1:]
        if last and last[0] in self.request.stop_ids:
            self.finish = "stop"
        elif self.length >= self.request.max_new_tokens:
            self.finish = "length"

    def _fault(self, piece: Piece) -> str:
        """What is wrong with the piece; empty if nothing is."""
        count, room = len(piece.tokens), self.request.max_new_tokens - self.length
        if self.finish:
            return f"{count} more tokens after the response had ended ({self.finish})"
        if count != len(piece.log_probs):
            return f"{count} tokens and {len(piece.log_probs)} log-probs"
        if count > room:
            return f"{count} more tokens where {room} are left of max_new_tokens={self.request.max_new_tokens}"
        if any(token < 0 for token in piece.tokens):
            return f"the token {min(piece.tokens)}; ids begin at 0"
        if wrong := [p for p in piece.log_probs if not -math.inf < p <= LARGEST]:
            return f"the log-prob {wrong[0]}; that of a token that was drawn is finite and at most 0"
        stops = self.request.stop_ids
        if early := [token for token in piece.tokens[:-1] if token in stops]:
            return f"tokens after {early[0]}, which ends a response (stop_ids)"
        if piece.finish == "length" and count < room:
            return f"an end by length at {self.length + count} of max_new_tokens={self.request.max_new_tokens}"
        if piece.finish == "stop" and (*self.request.response, *self.tokens, *piece.tokens)[-1:] not in [
            (i,) for i in stops
        ]:
            return "an end by stop without a token of stop_ids"
        return ""

    def _fault_in_versions(self, piece: Piece, known: range) -> str:
        spans, begin, end = piece.versions, len(self.request.response), self.length + len(piece.tokens)
        if not spans:
            return "tokens without a version" if piece.tokens else ""
        borders = [span.begin for span in spans] + [end]
        whole = all((s.begin, s.end) == pair for s, pair in zip(spans, pairwise(borders), strict=True))
        if not whole or sorted(borders) != borders or not begin <= borders[0] <= self.length:
            return f"the versions {list(map(tuple, spans))}; its tokens are {self.length} to {end} of the response"
        if strange := [span.version for span in spans if span.version not in known]:
            return f"tokens of weights of version {strange[0]}; it was given versions {known.start} to {known[-1]}"
        return ""


def _until(spans: list[Span], end: int) -> list[Span]:
    return [span._replace(end=min(span.end, end)) for span in spans if span.begin < end]


def _merged(spans: list[Span]) -> list[Span]:
    """Neighbours of the same version as one; without empty ones."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].version == span.version:
            found[-1] = found[-1]._replace(end=span.end)
        elif span.begin < span.end:
            found.append(span)
    return found


LARGEST = 1e-4
"""Log-probs in 32 bits may round to slightly more than 0."""
