"""Tensors written in the slices of one layout and read in those of another. The oracle is Place, which splits and joins
whole tensors."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.place import Place
from gspo_megatron.checkpoint.shards import Shard, ShardFiles, write_shards


def slices(dim: int, stride: int, count: int) -> list[Place]:
    return [Place("w", dim, stride, index, count) for index in range(count)]


def cut(whole: Tensor, places: list[Place], borders: list[float], padding: int = 0) -> list[tuple[Shard, Tensor]]:
    """(shard, its elements) of every slice of `whole`, each cut at the same shares of its length. The slices hold
    `padding` more rows, of -1."""
    padded = torch.cat([whole, -torch.ones(padding, *whole.shape[1:])]) if padding else whole
    found = []
    for place in places:
        part = place.cut(padded)
        shard = Shard.of(place, part, len(whole) if padding else None)
        ends = [0, *sorted(int(share * part.numel()) for share in borders), part.numel()]
        for start, end in itertools.pairwise(ends):
            found.append((replace(shard, start=start, end=end), part.flatten()[start:end]))
    return found


def written(folder: Path, shards: list[tuple[Shard, Tensor]]) -> ShardFiles:
    """Every shard in a file of its own."""
    paths = []
    for number, (shard, elements) in enumerate(p for p in shards if p[1].numel()):
        paths.append(folder / f"{number}.safetensors")
        paths[-1].unlink(missing_ok=True)
        write_shards(paths[-1], [("w", shard, elements)])
    return ShardFiles(paths)


layouts = st.tuples(
    st.sampled_from([(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 2, 2), (0, 2, 3), (1, 1, 2), (1, 1, 3)]),
    st.lists(st.floats(0, 1), max_size=4),
)


@given(height=st.integers(1, 3), width=st.integers(1, 3), had=layouts, wanted=layouts)
@settings(max_examples=60, deadline=None)
def test_any_cut_is_read_from_any_other(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, had: tuple, wanted: tuple
) -> None:
    whole = torch.randn(12 * height, 6 * width, dtype=torch.float64)
    files = written(tmp_path_factory.getbasetemp(), cut(whole, slices(*had[0]), had[1]))
    for shard, elements in cut(whole, slices(*wanted[0]), wanted[1]):
        into = torch.full_like(elements, float("nan"))
        files.read("w", shard, into)
        assert torch.equal(into, elements)


def test_vectors(tmp_path: Path) -> None:
    whole = torch.randn(7, dtype=torch.float64)
    files = written(tmp_path, cut(whole, [Place("w")], [0.5]))
    for shard, elements in cut(whole, [Place("w")], [0.2, 0.9]):
        files.read("w", shard, into := torch.empty_like(elements))
        assert torch.equal(into, elements)


@pytest.mark.parametrize(("had", "wanted"), [(1, 2), (2, 1), (2, 4), (4, 1), (4, 3)])
def test_a_vocabulary_is_padded_anew(had: int, wanted: int, tmp_path: Path) -> None:
    """13 rows: padding is read as 0, whatever was written there."""
    whole = torch.randn(13, 4)
    files = written(tmp_path, cut(whole, slices(0, 1, had), [0.3], padding=-13 % had))
    rows = torch.cat([whole, torch.zeros(-13 % wanted, 4)])
    for place in slices(0, 1, wanted):
        part = place.cut(rows)
        files.read("w", Shard.of(place, part, 13), into := torch.empty(part.numel()))
        assert torch.equal(into.view_as(part), part)


def test_number_formats(tmp_path: Path) -> None:
    """Into another one, with the rounding of torch; into the same, bit for bit."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        whole = torch.randn(4, 3).to(dtype)
        files = written(tmp_path, cut(whole, [Place("w")], []))
        for into in (torch.empty(12, dtype=other) for other in (torch.float64, torch.float32, torch.bfloat16)):
            files.read("w", Shard.of(Place("w"), whole), into)
            assert torch.equal(into, whole.flatten().to(into.dtype))


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    """As its documentation says: a length, a JSON header, and numbers without a gap. No pickle, no zip."""
    a, b = torch.randn(5), torch.randn(3).to(torch.bfloat16)
    path = tmp_path / "file.safetensors"
    write_shards(path, [("a", Shard.of(Place("a"), a), a), ("b", Shard.of(Place("b"), b), b)])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and len(content) == 8 + length + 5 * 4 + 3 * 2
    assert header["a"] == {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
    assert header["b"] == {"dtype": "BF16", "shape": [3], "data_offsets": [20, 26]}
    assert all(isinstance(text, str) for text in header["__metadata__"].values())
    assert torch.equal(torch.frombuffer(bytearray(content[8 + length :][:20]), dtype=torch.float32), a)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    (first, second) = cut(whole, slices(1, 1, 2), [])
    into = torch.empty(24)
    asked = Shard.of(Place("w"), whole)
    with pytest.raises(CheckpointError, match="w is incomplete in the files"):
        written(tmp_path, [first]).read("w", asked, into)
    files = written(tmp_path, [first, second])
    files.read("w", asked, into)
    assert torch.equal(into.view_as(whole), whole)
    with pytest.raises(CheckpointError, match="other is in none of the files"):
        files.read("other", asked, into)
    with pytest.raises(CheckpointError, match=r"w is \(4, 6\) in .*, \(4, 7\) in this model"):
        files.read("w", Shard.of(Place("w"), torch.empty(4, 7)), torch.empty(28))
    path = tmp_path / "1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"1\.safetensors cannot be read .*bytes where its header says"):
        ShardFiles([tmp_path / "0.safetensors", path])
    for damaged in (b"", content[:20], b"\x80\x04cposix\nsystem\n" + content):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"1\.safetensors cannot be read"):
            ShardFiles([path])
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read \(FileNotFoundError"):
        ShardFiles([tmp_path / "none.safetensors"])


def test_elements_that_are_there_twice(tmp_path: Path) -> None:
    """As many as are missing elsewhere, so that their number alone would be right."""
    whole = torch.randn(4, 6)
    (first, second) = cut(whole, slices(1, 1, 2), [])
    again = (replace(second[0], place=first[0].place), second[1])
    with pytest.raises(CheckpointError, match=r"w is in the files twice, in part, also in .*1\.safetensors"):
        written(tmp_path, [first, again]).read("w", Shard.of(Place("w"), whole), torch.empty(24))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F64"},
        {"data_offsets": [-8, 88]},
        {"data_offsets": [8, 104]},
        {"shape": [4, 6]},
        {"start": -10},
        {"end": 10**15},
        {"width": 0},
        {"place.stride": 0},
        {"place.index": 2},
        {"place.dim": 7},
        {"place.count": "2"},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_what_it_describes(change: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is read through it: neither other weights nor, for ever, rectangles without end."""
    path = tmp_path / "0.safetensors"
    written(tmp_path, cut(torch.randn(4, 6), slices(0, 1, 1), []))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    shards = json.loads(header["__metadata__"]["pieces"])
    [(name, value)] = change.items()
    owner = header["w"] if name in header["w"] else shards["w"]["place"] if name.startswith("place.") else shards["w"]
    owner[name.removeprefix("place.")] = value
    header["__metadata__"]["pieces"] = json.dumps(shards)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read"):
        ShardFiles([path])
