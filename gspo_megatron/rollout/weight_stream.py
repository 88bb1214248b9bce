"""The weights of a policy as a stream of buckets: large pieces of memory, so that tensors do not travel one by one.

A bucket is the bytes of whole tensors, end to end, and a header: which tensors, of which version, and a digest of
everything sent so far. The receiver checks the digest before it uses a byte of the bucket, so a bucket that is damaged,
missing, repeated or of another version is noticed where it arrives.

This file is imported by the engine's workers: it needs torch and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_megatron.base.errors import EngineError, plural
from gspo_megatron.rollout.engine import Weights

COLUMNS, ROWS = 2048, 64
"""64-bit words in a row of the matrix whose sums are the checksum; rows that are read at once."""
SMALL = 16 << 20
"""Bytes of the first bucket's memory, as long as they are enough: a small model waits for no more."""
Allocate = Callable[[int], Tensor]
"""bytes -> uint8 memory of at least that size."""


class Entry(NamedTuple):
    """A tensor in a bucket. `dtype` is torch's name of it, such as `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise EngineError(f"{self.name} has the number format {self.dtype!r}, which torch does not know")
        return found


@dataclass(frozen=True)
class Header:
    """What a receiver needs to know about a bucket.

    Attributes:
        version: of the weights.
        index: buckets of this version before it.
        entries: its tensors in order, without gaps.
        digest: of version, entries and bytes up to the end of this bucket.
        last: whether the model is complete with it.
    """

    version: int
    index: int
    entries: tuple[Entry, ...]
    digest: str
    last: bool

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "entries": [list(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Header:
        entries = tuple(Entry(name, dtype, tuple(shape)) for name, dtype, shape in content["entries"])
        return cls(**{**content, "entries": entries})


class Bucket(NamedTuple):
    header: Header
    payload: Tensor
    """uint8 [header.num_bytes]"""


class Digest:
    """SHA-256 of headers and checksums of payloads, one bucket after the other."""

    def __init__(self, version: int) -> None:
        self._so_far = hashlib.sha256(f"version {version}".encode())

    def add(self, entries: tuple[Entry, ...], payload: Tensor, *, last: bool) -> str:
        """Returns the digest up to and with this bucket."""
        self._so_far.update(json.dumps([entries, last]).encode())
        for part in checksum(payload):
            self._so_far.update(part.cpu().numpy().data)
        return self._so_far.hexdigest()


def checksum(payload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of rows and of columns, and the rest, of bytes as a matrix of 64-bit words.

    SHA-256 of all bytes takes twice as long as sending them, and needs them in host memory. Sums run on any device at
    the speed of its memory, in integers modulo 2^64 and therefore to the last bit. One changed word changes a sum of a
    row and one of a column; so does a pair that changed places. What stays unnoticed is four words at the corners of a
    rectangle that change by d, -d, -d and d.
    """
    whole = len(payload) - len(payload) % (8 * COLUMNS)
    words = payload[:whole].view(torch.int64).view(-1, COLUMNS)
    # The second sum finds a block in the processor's cache.
    blocks = words.split(ROWS) if payload.device.type == "cpu" else [words]
    columns = torch.zeros(COLUMNS, dtype=torch.int64, device=payload.device)
    rows = []
    for block in blocks:
        rows.append(block.sum(1))
        columns += block.sum(0)
    return torch.cat(rows), columns, payload[whole:]


def pack(weights: Weights, bucket_bytes: int, allocate: Allocate) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes`, or of one larger tensor. Two pieces of memory are used in turns: a bucket is
    valid until the one after the next is asked for.

    Raises:
        ValueError: there are no weights.
    """
    digest = Digest(weights.version)
    memory: list[Tensor | None] = [None, None]
    entries: list[Entry] = []
    index = used = 0

    def sealed(last: bool) -> Bucket:
        room = memory[index % 2]
        assert room is not None
        payload, of_it = room[:used], tuple(entries)
        return Bucket(Header(weights.version, index, of_it, digest.add(of_it, payload, last=last), last), payload)

    for name, tensor in weights.tensors:
        if entries and used + tensor.nbytes > bucket_bytes:
            yield sealed(last=False)
            index, used, entries = index + 1, 0, []
        end, room = used + tensor.nbytes, memory[index % 2]
        if room is None or end > len(room):
            begun = room if used else None
            memory[index % 2] = room = None  # an empty one goes before a larger one comes
            room = allocate(SMALL if index == 0 and end <= SMALL <= bucket_bytes else max(bucket_bytes, end))
            if begun is not None:
                room[:used].copy_(begun[:used])
            memory[index % 2] = room
        room[used:end].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        used = end
    if not entries:
        raise ValueError("there are no weights to send")
    yield sealed(last=True)


class Unpacker:
    """The receiver's side: checks that buckets follow each other, and takes them apart."""

    def __init__(self) -> None:
        self._digest: Digest | None = None
        self._next = 0
        self.version = -1
        self.complete = False

    def tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of a bucket, which share its memory.

        Raises:
            EngineError: the bucket is not the next one, or is damaged.
        """
        header, payload = bucket
        if self._digest is None:
            self._digest, self.version = Digest(header.version), header.version
        if self.complete or (header.version, header.index) != (self.version, self._next):
            raise EngineError(
                f"bucket {header.index} of weights version {header.version} came instead of bucket {self._next} of "
                f"version {self.version}; nothing of it was loaded; start the engine again"
            )
        found = self._digest.add(header.entries, payload, last=header.last)
        if found != header.digest:
            raise EngineError(
                f"bucket {header.index} of weights version {header.version} ({plural(len(payload), 'byte')}) is not "
                f"what was sent: its digest is {found[:16]}, not {header.digest[:16]}; nothing of it was loaded; start "
                "the engine again"
            )
        self._next, self.complete = self._next + 1, header.last
        return self._parts(header, payload)

    @staticmethod
    def _parts(header: Header, payload: Tensor) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for entry in header.entries:
            part = payload[at : at + entry.num_bytes]
            # Behind a tensor of smaller numbers it may begin where its own cannot.
            aligned = part if at % entry.torch_dtype.itemsize == 0 else part.clone()
            yield entry.name, aligned.view(entry.torch_dtype).view(entry.shape)
            at += entry.num_bytes
