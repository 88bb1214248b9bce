"""Random permutations from counters: any position of any epoch can be read at any time, without memory.

Random numbers are splitmix64's of (seed, purpose, counter), in NumPy integers: the same on every machine and version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def key_of(purpose: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")


def random_words(key: int | np.uint64, counters: Words) -> Words:
    """Random number `counter` of the stream `key` (splitmix64; Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permuted(places: Seq[int] | NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """pi(place) for places in [0, size), where pi is a random permutation of [0, size) that `key` names.

    Swap-or-not shuffle (Hoang, Morris, Rogaway 2012, arXiv:1208.1176): round r pairs x with K_r - x mod size, and a
    random bit of the pair decides whether they swap. It needs no memory, however many prompts there are.
    """
    x = np.asarray(places, np.int64)
    rounds = 6 * max(1, size - 1).bit_length() + 12
    offsets, keys = random_words(key, np.arange(2 * rounds, dtype=np.uint64)).reshape(2, rounds)
    for offset, key_r in zip((offsets % np.uint64(size)).astype(np.int64), keys, strict=True):
        partner = (offset - x) % size
        pair = np.maximum(x, partner).astype(np.uint64)
        swaps = random_words(key_r, pair) >> np.uint64(63)
        x = np.where(swaps.astype(bool), partner, x)
    return x


class PromptOrder:
    """Position k of a run -> index of a prompt: k itself in an endless source, else pi_e[k - e * size], e = k // size.

    pi_e is a permutation that depends on (seed, e) only.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self._size, self._seed = size, seed

    def __getitem__(self, position: int) -> int:
        return self.slice(position, 1)[0]

    def slice(self, position: int, count: int) -> list[int]:
        """The indices at `count` positions, starting at `position`."""
        places = range(position, position + count)
        if self._size is None:
            return list(places)
        found: list[int] = []
        for epoch in range(position // self._size, (position + count - 1) // self._size + 1):
            start = epoch * self._size
            of_epoch = [k - start for k in range(max(position, start), min(position + count, start + self._size))]
            found += permuted(of_epoch, self._size, key_of(f"prompts of epoch {epoch}, seed {self._seed}")).tolist()
        return found
