"""How buckets of weights get from the trainer into the workers of engines: the sender's ends.

    broadcast       over the network, in a process group of the sender and the workers; also on one machine
    shared_memory   through /dev/shm, for engines on the sender's machine
    disk            a folder of safetensors files, for engines that share nothing else, and to start from

`weight_receivers.py` has the other ends. Headers travel in vLLM's own route for weight updates, one request a bucket,
so an engine that fails says why in its answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gspo_megatron.base.errors import CannotSend, EngineError, memory_size, shortened
from gspo_megatron.base.files import PARTIAL, sync
from gspo_megatron.checkpoint.export import Stored, header_of
from gspo_megatron.device.private_group import PrivateGroup
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.weight_receivers import MARKER, BucketMemory, file_of, map_shared
from gspo_megatron.rollout.weight_stream import Bucket, pack

CPU_BUCKET, GPU_BUCKET = 128 << 20, 1 << 30
"""Bytes. Two of them are in use at a time."""
SHARED = Path("/dev/shm")
PREFIX = "gspo_megatron"


class Engines(Protocol):
    """The engines that take part in an update, all at once."""

    addresses: tuple[str, ...]

    def post(self, route: str, *bodies: dict[str, Any]) -> list[Any]:
        """Answers in order; one body for all, or one each. Raises EngineError if one fails."""

    def begin(self, route: str, *bodies: dict[str, Any]) -> Future[list[Any]]:
        """The same, without waiting."""


class Channel(Protocol):
    """One way to send weights. Used by one thread at a time."""

    name: str

    def connect(self, engines: Engines) -> None:
        """Prepares for these engines, where that has not been done. Raises EngineError."""

    def send(self, engines: Engines, weights: Weights) -> None:
        """Returns when every engine has loaded all of it. Raises EngineError."""

    def close(self) -> None:
        """Frees what it holds; it can be used again. Called after a failure, too."""


@dataclass
class Broadcast:
    """gloo on the CPU, NCCL on GPUs.

    Attributes:
        host: an address of this machine that the engines reach; their connections come to it.
        device: where buckets are packed: that of the engines' weights.
        timeout_s: of one bucket, and of all workers to come together.
    """

    host: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bucket_bytes: int = 0
    timeout_s: float = 300.0
    name: str = field(default="broadcast", init=False)
    _group: PrivateGroup | None = field(default=None, init=False)
    _session: str = field(default="", init=False)
    _addresses: tuple[str, ...] = field(default=(), init=False)

    def connect(self, engines: Engines) -> None:
        if self._group is not None and engines.addresses == self._addresses:
            # An engine that was started again has forgotten the group.
            known = engines.post("/collective_rpc", {"method": "gspo_session"})
            if all(answer["results"] == [self._session] * len(answer["results"]) for answer in known):
                return
        self.close()
        self._session = uuid.uuid4().hex
        sizes = [answer["world_size"] for answer in engines.post("/get_world_size")]
        ranks = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        store = PrivateGroup.listen(self.host, self.timeout_s)
        place = {"session": self._session, "host": self.host, "port": store.port, "size": 1 + sum(sizes)}
        orders = [{"init_info": {**place, "first_rank": rank, "timeout_s": self.timeout_s}} for rank in ranks]
        joined = engines.begin("/init_weight_transfer_engine", *orders)
        try:
            self._group = PrivateGroup.open(
                store, 1 + sum(sizes), self.device, timeout_s=self.timeout_s, check=lambda: _raise_early(joined)
            )
        except (TimeoutError, RuntimeError) as error:
            _raise_early(joined)
            raise EngineError(
                f"the workers of {', '.join(engines.addresses)} did not come to {self.host}:{store.port} ({error}); "
                "see that the engines' machines reach this address, or choose the channel disk"
            ) from error
        joined.result()
        self._addresses = engines.addresses

    def send(self, engines: Engines, weights: Weights) -> None:
        group = self._group
        assert group is not None

        def transfer(bucket: Bucket) -> None:
            answers = engines.begin("/update_weights", {"update_info": _order(self.name, bucket, self._session)})
            try:
                group.send(bucket.payload, check=lambda: _raise_early(answers))
            except EngineError:
                raise
            except RuntimeError as error:
                raise EngineError(
                    f"the connection to the workers of {', '.join(engines.addresses)} broke within bucket "
                    f"{bucket.header.index} ({shortened(str(error))}); start the engine that has ended again"
                ) from error
            answers.result()

        bucket_bytes = self.bucket_bytes or (CPU_BUCKET if self.device.type == "cpu" else GPU_BUCKET)
        _one_ahead(pack(weights, bucket_bytes, BucketMemory(self.device).take), transfer)

    def close(self) -> None:
        group, self._group, self._addresses = self._group, None, ()
        if group is not None:
            group.close()


@dataclass
class SharedMemory:
    """Files in /dev/shm that exist while an update runs.

    Attributes:
        job: the run's name, which is a part of the files'.
        say: told the names of files that killed runs had left, and that are gone now.
    """

    job: str
    bucket_bytes: int = CPU_BUCKET
    folder: Path = SHARED
    say: Callable[[str], None] = lambda line: None
    name: str = field(default="shared_memory", init=False)

    def __post_init__(self) -> None:
        if removed := remove_leftovers(self.folder):
            self.say(f"removed from {self.folder}, where killed runs had left them: {', '.join(removed)}")

    def connect(self, engines: Engines) -> None:
        pass

    def send(self, engines: Engines, weights: Weights) -> None:
        files: dict[int, SharedFile] = {}

        def allocate(num_bytes: int) -> Tensor:
            file = SharedFile(self.folder, self.job, num_bytes)
            files[file.tensor.data_ptr()] = file
            return file.tensor

        def transfer(bucket: Bucket) -> None:
            path = files[bucket.payload.data_ptr()].path
            engines.post("/update_weights", {"update_info": _order(self.name, bucket, str(path))})

        try:
            _one_ahead(pack(weights, self.bucket_bytes, allocate), transfer)
        finally:
            for file in files.values():
                file.close()

    def close(self) -> None:
        pass


@dataclass
class Disk:
    """A folder for each version below `directory`, which the engines see under the same path. The newest stays."""

    directory: Path
    bucket_bytes: int = CPU_BUCKET
    name: str = field(default="disk", init=False)

    def connect(self, engines: Engines) -> None:
        pass

    def send(self, engines: Engines, weights: Weights) -> None:
        folder = write_folder(self.directory, weights, self.bucket_bytes)
        place = {"channel": self.name, "header": None, "place": str(folder)}
        engines.post("/update_weights", {"update_info": place})
        for other in self.directory.glob(f"{FOLDER}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        pass


FOLDER = "weights_"


def write_folder(directory: Path, weights: Weights, bucket_bytes: int = CPU_BUCKET) -> Path:
    """Writes a file for each bucket, and MARKER with their headers. The folder gets its name when it is whole and on
    the disk.

    Raises:
        CannotSend: it cannot be written.
    """
    folder = directory / f"{FOLDER}{weights.version:08d}"
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        headers = []

        def write(bucket: Bucket) -> None:
            header, payload = bucket
            stored = {entry.name: Stored(entry.shape, entry.torch_dtype) for entry in header.entries}
            with (partial / file_of(header.index)).open("xb") as file:
                file.write(header_of(stored))
                file.write(payload.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            headers.append(header.to_json())

        _one_ahead(pack(weights, bucket_bytes, BucketMemory(torch.device("cpu")).take), write)
        (partial / MARKER).write_text(json.dumps(headers))
        sync(partial / MARKER)
        sync(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotSend(
            f"{folder} cannot be written ({error}); the engines keep the weights that they had; free some space, or "
            "choose another folder"
        ) from error
    return folder


class SharedFile:
    """Memory that another process maps by its path. Its name goes with `close`, and the lock on it with this process,
    however that ends: a file that nobody has locked is left over."""

    def __init__(self, folder: Path, job: str, num_bytes: int) -> None:
        job = re.sub(r"[^\w-]", "_", job)[:100]
        self.path = folder / f"{PREFIX}.{job}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._descriptor = -1
        try:
            self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Memory that is missing would otherwise kill this process when it is written.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
            self.tensor = torch.frombuffer(map_shared(self._descriptor), dtype=torch.uint8)
        except OSError as error:
            self.close()
            raise CannotSend(
                f"{folder} does not take {memory_size(num_bytes / 2**30)} of weights ({error.strerror}); give it more "
                "room (in a container: --shm-size), or choose the channel broadcast"
            ) from error

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self._descriptor)


def remove_leftovers(folder: Path = SHARED) -> tuple[str, ...]:
    """Deletes the files of killed processes; returns their names. Those of living ones, and of other users, stay."""
    removed = []
    for path in sorted(folder.glob(f"{PREFIX}.*")):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(descriptor)
    return tuple(removed)


CHANNELS: dict[str, Callable[..., Channel]] = {
    "broadcast": Broadcast,
    "shared_memory": SharedMemory,
    "disk": Disk,
}


def _order(channel: str, bucket: Bucket, place: str) -> dict[str, Any]:
    return {"channel": channel, "header": bucket.header.to_json(), "place": place}


def _one_ahead(buckets: Iterator[Bucket], transfer: Callable[[Bucket], None]) -> None:
    """Packs the next bucket while one is on its way."""
    with ThreadPoolExecutor(1, "weights") as thread:
        under_way = thread.submit(lambda: None)
        for bucket in buckets:
            under_way.result()
            under_way = thread.submit(transfer, bucket)
        under_way.result()


def _raise_early(answers: Future[list[Any]]) -> None:
    if answers.done():
        answers.result()
