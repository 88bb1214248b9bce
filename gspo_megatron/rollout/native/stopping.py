"""Where a response ends: at a stop id, or with the token that completes a stop string.

A stop string is looked for in the bytes of the response's text, by the automaton of Aho and Corasick (1975, doi
10.1145/360825.360855). Its steps by byte are composed into steps by token once, so that a token costs one lookup, on
the device and on the host, and nothing is decoded. The state depends on the tokens of the response alone: it is the
same on every layout.

S states, V vocabulary, B rollouts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.data.token_ids import Tokenizer

LONGEST = 1000
"""Bytes of all stop strings together: each takes a row of the vocabulary's length, on the device and on the host."""


class Stops(NamedTuple):
    """What ends a response. `token_bytes`, by id, is empty where there are no strings."""

    ids: tuple[int, ...]
    strings: tuple[bytes, ...] = ()
    token_bytes: Sequence[bytes] = ()


def stops_of(stop: Sequence[str | int], tokenizer: Tokenizer) -> Stops:
    """The tokenizer's stop ids, and those and the strings of rollout.stop.

    Raises:
        ConfigError: an id that the tokenizer does not have, or a string that no text can contain.
    """
    ids = [item for item in stop if isinstance(item, int)]
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            size = tokenizer.vocab_size
            raise ConfigError(
                f"rollout.stop: id {token} is not one of the tokenizer's {size}, 0 to {size - 1}; remove it"
            )
    strings = [item for item in stop if isinstance(item, str)]
    if not strings:
        return Stops((*tokenizer.stop_ids, *ids))
    if (length := sum(len(text.encode()) for text in strings)) > LONGEST:
        raise ConfigError(f"rollout.stop has texts of {length:,} bytes together, more than {LONGEST:,}; shorten them")
    token_bytes = tokenizer.token_bytes()
    for text in strings:
        tokens = tokenizer.encode(text)
        if not any(token_bytes[token] for token in tokens):
            raise ConfigError(
                f"rollout.stop: {text!r} is a special token, which a response's text leaves out, so it would never be "
                f"found there; give its id, {', '.join(map(str, tokens))}"
            )
    return Stops((*tokenizer.stop_ids, *ids), tuple(text.encode() for text in strings), token_bytes)


@dataclass(frozen=True)
class StopTable:
    """State after each token: `after[s, t]` of token t in state s. A response begins in state 0, and has ended in state
    `end`.

    Attributes:
        after: [S, V] int32.
    """

    after: NDArray[np.int32]

    @classmethod
    def of(cls, stops: Stops, vocab_size: int) -> StopTable:
        step = _automaton(stops.strings)
        end = len(step) - 1
        after = np.repeat(np.arange(end, dtype=np.int32)[:, None], vocab_size, axis=1)
        lengths = np.zeros(vocab_size, dtype=np.int64)
        lengths[: len(stops.token_bytes)] = [len(text) for text in stops.token_bytes]
        starts = np.cumsum(lengths) - lengths
        text = np.frombuffer(b"".join(stops.token_bytes), dtype=np.uint8)
        for position in range(lengths.max(initial=0)):
            longer = np.flatnonzero(lengths > position)
            after[:, longer] = step[after[:, longer], text[starts[longer] + position]]
        after[:, [token for token in stops.ids if 0 <= token < vocab_size]] = end
        return cls(after)

    @property
    def end(self) -> int:
        return len(self.after)


def _automaton(strings: Sequence[bytes]) -> NDArray[np.int32]:
    """[S + 1, 256] int32: the state after each byte. The last state is the end, which no byte leaves.

    A state is the longest end of the text that begins a string.
    """
    children: list[dict[int, int]] = [{}]
    ends = {0} if b"" in strings else set()
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    step = np.zeros((len(children), 256), dtype=np.int32)
    shorter, waiting = [0] * len(children), deque([0])
    while waiting:  # by length: the shorter state that a node falls back to is complete
        node = waiting.popleft()
        step[node] = step[shorter[node]]
        for byte, child in children[node].items():
            shorter[child] = int(step[node, byte]) if node else 0
            step[node, byte] = child
            waiting.append(child)
        if shorter[node] in ends:
            ends.add(node)
    kept = [node for node in range(len(children)) if node not in ends]
    number = np.full(len(children), len(kept), dtype=np.int32)
    number[kept] = np.arange(len(kept))
    return np.vstack([number[step[kept]], np.full((1, 256), len(kept), dtype=np.int32)])
