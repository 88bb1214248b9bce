"""How buckets of weights get from the trainer into the workers of engines: the receivers' ends.

`weight_channels.py` has the other ends. A receiver returns memory of its own, which it uses again once no tensor is in
it.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.base.errors import EngineError
from gspo_megatron.device.private_group import PrivateGroup
from gspo_megatron.rollout.weight_stream import Bucket, Header

MARKER = "complete.json"
"""The file that a folder of weights has once it is whole: its buckets' headers."""


class BucketMemory:
    """Memory of buckets. Fresh pages of 4 KiB cost a CPU as much as copying the bucket some five times, so pages are
    huge, and what no tensor is in any more is used again; on GPUs torch does so itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[mmap.mmap] = []
        self._shared: dict[str, mmap.mmap] = {}

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes]"""
        if self._device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self.take_on_host(num_bytes)

    def take_on_host(self, num_bytes: int) -> Tensor:
        """The same in the host's memory."""
        fitting = [memory for memory in self._free if len(memory) >= num_bytes]
        memory = min(fitting, key=len) if fitting else _huge_pages(max(num_bytes, 1))
        if fitting:
            self._free.remove(memory)
        # The tensor holds the view, so the view ends with the last tensor that shares its memory.
        view = memoryview(memory)
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)[:num_bytes]

    def shared(self, place: str) -> mmap.mmap:
        """A file of shared memory, which a sender fills again and again."""
        if place not in self._shared:
            with Path(place).open("r+b") as file:
                self._shared[place] = map_shared(file.fileno())
        return self._shared[place]


@dataclass
class Receiver:
    """What a worker needs to receive with.

    Attributes:
        device: of the worker's weights.
        group: with the sender, for the channel broadcast.
        session: the group's.
    """

    device: torch.device
    group: PrivateGroup | None = None
    session: str = ""
    memory: BucketMemory = field(init=False)

    def __post_init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Gives up the memory of buckets, but for tensors in it."""
        self.memory = BucketMemory(self.device)

    def join(self, *, session: str, host: str, port: int, rank: int, size: int, timeout_s: float) -> None:
        self.leave()
        self.group = PrivateGroup.join(host, port, rank, size, self.device, timeout_s=timeout_s)
        self.session = session

    def leave(self) -> None:
        group, self.group, self.session = self.group, None, ""
        if group is not None:
            group.close()

    def buckets(self, channel: str, header: dict[str, Any] | None, place: str) -> Iterator[Bucket]:
        """What one order of the sender stands for.

        Raises:
            EngineError: it cannot be received.
        """
        if channel not in RECEIVERS:
            raise EngineError(f"the channel {channel!r} is unknown here; trainer and engine must have the same version")
        return RECEIVERS[channel](self, None if header is None else Header.from_json(header), place)


def map_shared(descriptor: int) -> mmap.mmap:
    """All of a file of shared memory. One call maps its pages, which would cost as much as copying the bucket if each
    were mapped when it is first touched."""
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _huge_pages(num_bytes: int) -> mmap.mmap:
    """Fresh memory, which the kernel fills in pages of 2 MiB if it can."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _broadcast(receiver: Receiver, header: Header | None, place: str) -> Iterator[Bucket]:
    if receiver.group is None or receiver.session != place:
        raise EngineError(f"this worker is in no group {place}; the engine was started again meanwhile")
    assert header is not None
    payload = receiver.memory.take(header.num_bytes)
    receiver.group.receive(payload)
    yield Bucket(header, payload)


def _shared_memory(receiver: Receiver, header: Header | None, place: str) -> Iterator[Bucket]:
    assert header is not None
    payload = receiver.memory.take(header.num_bytes)
    if header.num_bytes:
        payload.copy_(torch.frombuffer(receiver.memory.shared(place), dtype=torch.uint8, count=header.num_bytes))
    yield Bucket(header, payload)


def _disk(receiver: Receiver, header: Header | None, place: str) -> Iterator[Bucket]:
    folder = Path(place)
    try:
        headers = [Header.from_json(each) for each in json.loads((folder / MARKER).read_text())]
        for each in headers:
            payload = receiver.memory.take_on_host(each.num_bytes)
            _read(folder / file_of(each.index), payload)
            yield Bucket(each, payload.to(receiver.device))
            del payload
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{folder} cannot be read ({error}); it must be a folder that the trainer has completed, under the same "
            "path on the engine's machine"
        ) from error


def file_of(index: int) -> str:
    """The name of a bucket's file."""
    return f"bucket_{index:05d}.safetensors"


def _read(path: Path, payload: Tensor) -> None:
    """Fills it with the last bytes of a file: in a safetensors file, a header comes first."""
    num_bytes = len(payload)
    with path.open("rb", buffering=0) as file:
        file.seek(-num_bytes, os.SEEK_END)
        space, at = payload.numpy().data, 0
        while at < num_bytes:
            read = file.readinto(space[at:])
            if not read:
                raise OSError(f"{path.name} ends early")
            at += read


RECEIVERS: dict[str, Callable[[Receiver, Header | None, str], Iterator[Bucket]]] = {
    "broadcast": _broadcast,
    "shared_memory": _shared_memory,
    "disk": _disk,
}
