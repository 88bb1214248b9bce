"""Weights as buckets: what is packed is what is taken apart, and whatever changes on the way is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout import weight_stream
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.weight_receivers import BucketMemory
from gspo_megatron.rollout.weight_stream import COLUMNS, Bucket, Header, Unpacker, checksum, pack


def model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embedding": torch.randn(300, 61, generator=generator).bfloat16(),
        "odd": torch.randn(7, generator=generator).bfloat16(),
        "bias": torch.randn(5, generator=generator),  # begins where a float32 cannot
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(30, 20, generator=generator).T,
    }


def packed(tensors: dict[str, Tensor], bucket_bytes: int, version: int = 3) -> list[Bucket]:
    """Buckets with memory of their own, their headers through JSON."""
    weights = Weights(version, iter(tensors.items()))
    return [
        Bucket(Header.from_json(header.to_json()), payload.clone())
        for header, payload in pack(weights, bucket_bytes, lambda n: torch.empty(n, dtype=torch.uint8))
    ]


def unpacked(buckets: list[Bucket]) -> dict[str, Tensor]:
    unpacker = Unpacker()
    found = {name: tensor for bucket in buckets for name, tensor in unpacker.tensors(bucket)}
    assert unpacker.complete
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 40_000, 1 << 20])
def test_what_is_packed_is_what_is_taken_apart(bucket_bytes: int) -> None:
    tensors, buckets = model(), packed(model(), bucket_bytes)
    found = unpacked(buckets)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert all(bucket.header.num_bytes <= max(bucket_bytes, largest) for bucket in buckets)
    assert [bucket.header.last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]


def test_two_pieces_of_memory_are_enough() -> None:
    asked: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    tensors = ((f"{i}", torch.full((100,), float(i))) for i in range(20))
    assert sum(len(bucket.header.entries) for bucket in pack(Weights(0, tensors), 800, allocate)) == 20
    assert asked == [800, 800]


def test_a_small_model_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger one goes on in a whole bucket, with what it has."""
    monkeypatch.setattr(weight_stream, "SMALL", 800)
    for num_tensors, expected in ((2, [800]), (3, [800, 4000]), (11, [800, 4000, 4000])):
        asked: list[int] = []

        def allocate(num_bytes: int, asked: list[int] = asked) -> Tensor:
            asked.append(num_bytes)
            return torch.empty(num_bytes, dtype=torch.uint8)

        tensors = {f"{i}": torch.full((100,), float(i)) for i in range(num_tensors)}
        buckets = [
            Bucket(header, payload.clone())
            for header, payload in pack(Weights(0, iter(tensors.items())), 4000, allocate)
        ]
        assert asked == expected
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in unpacked(buckets).items())


def swapped(buckets: list[Bucket]) -> list[Bucket]:
    return [buckets[1], buckets[0], *buckets[2:]]


def with_payload(bucket: Bucket, change: Callable[[Tensor], None]) -> Bucket:
    change(bucket.payload)
    return bucket


def flip(at: int) -> Callable[[Tensor], None]:
    def change(payload: Tensor) -> None:
        payload[at] ^= 1

    return change


def renamed(bucket: Bucket) -> Bucket:
    first, *others = bucket.header.entries
    header = Header(**{**vars(bucket.header), "entries": (first._replace(name="other"), *others)})
    return Bucket(header, bucket.payload)


def called_last(bucket: Bucket) -> Bucket:
    return Bucket(Header(**{**vars(bucket.header), "last": True}), bucket.payload)


CHANGES: dict[str, Callable[[list[Bucket]], list[Bucket]]] = {
    "a bit of the first byte": lambda b: [with_payload(b[0], flip(0)), *b[1:]],
    "a bit of the last byte": lambda b: [*b[:-1], with_payload(b[-1], flip(-1))],
    "two buckets in the other order": swapped,
    "a bucket twice": lambda b: [b[0], b[0], *b[1:]],
    "a bucket left out": lambda b: [b[0], *b[2:]],
    "the payload of another bucket": lambda b: [b[0], b[1]._replace(payload=b[2].payload), *b[2:]],
    "a bucket of an earlier version": lambda b: [b[0], packed(model(), 1, version=2)[1], *b[2:]],
    "a payload that is cut": lambda b: [b[0]._replace(payload=b[0].payload[:-8]), *b[1:]],
    "another name": lambda b: [renamed(b[0]), *b[1:]],
    "an end that comes early": lambda b: [called_last(b[0]), *b[1:]],
    "a bucket after the last": lambda b: [*b, b[-1]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_on_the_way_is_noticed(change: str) -> None:
    with pytest.raises(EngineError, match=r"bucket \d of weights version \d .*nothing of it was loaded"):
        unpacked(CHANGES[change](packed(model(), 1)))


def matrix() -> Tensor:
    return torch.randn(8 * COLUMNS + 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def exchanged(i: int, j: int) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x[[i, j]] = x[[j, i]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        exchanged(3, 4),
        exchanged(3, 3 + COLUMNS),
        exchanged(3, 5 + 2 * COLUMNS),
        exchanged(0, 8 * COLUMNS + 1),
        lambda x: x[:COLUMNS].copy_(x[COLUMNS : 2 * COLUMNS].clone()),
        lambda x: x.copy_(x.roll(1)),
        lambda x: x[7].neg_(),
        lambda x: x[:2].neg_(),  # -0: the same number in another format
        lambda x: x[8 * COLUMNS :].zero_(),
    ],
)
def test_the_checksum_sees_words_that_change_or_move(change: Callable[[Tensor], object]) -> None:
    before, after = matrix(), matrix()
    change(after)
    sums = [checksum(x.view(torch.uint8)) for x in (before, after, matrix())]
    assert not all(map(torch.equal, sums[0], sums[1])) and all(map(torch.equal, sums[0], sums[2]))


def test_memory_is_used_again_once_no_tensor_is_in_it() -> None:
    memory = BucketMemory(torch.device("cpu"))
    first = memory.take(1000)
    place, part = first.data_ptr(), first[8:24].view(torch.float32)
    del first
    second = memory.take(1000)
    assert second.data_ptr() != place
    part.fill_(2.5)
    second.fill_(7)
    assert part.tolist() == [2.5] * 4
    del part
    assert memory.take(2000).data_ptr() != place
    third = memory.take(10)
    assert (len(third), third.data_ptr()) == (10, place)
    assert len(memory.take(0)) == 0


def test_no_weights_are_refused() -> None:
    nothing: Iterator[tuple[str, Tensor]] = iter(())
    with pytest.raises(ValueError, match="no weights"):
        list(pack(Weights(0, nothing), 100, torch.empty))
