"""Files, tables and functions of rows: what they hold, what they refuse, and what is kept of them."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data import optional
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.sources import DataSpec, PromptSource, open_source
from gspo_megatron.data.tokenizers import CharacterTokenizer

ROWS = [{"prompt": f"{i}+1", "answer": i + 1, "level": i % 3, "tags": ["sum", None]} for i in range(10)]
TOKENIZER = CharacterTokenizer()


@pytest.fixture(params=[0, 1 << 30], ids=["cached", "in memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", least_bytes=request.param)


def opened(source: str | Path, cache: Cache, **options: Any) -> PromptSource:
    defaults: dict[str, Any] = {"split": "train", "max_prompt_tokens": 50}
    return open_source(DataSpec(str(source), cache=cache, **(defaults | options)), TOKENIZER, seed=0)


def plain(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_zstd(content: bytes, frames: int = 2) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    cut = len(content) // frames
    parts = [content[i * cut : (i + 1) * cut if i < frames - 1 else None] for i in range(frames)]
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in parts)


def as_parquet(path: Path, rows: list[dict[str, Any]], **how: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, **how)
    return path


def write_jsonl(folder: Path) -> str:
    (folder / "rows.jsonl").write_bytes(plain())
    return str(folder / "rows.jsonl")


def write_gzip(folder: Path) -> str:
    """Named as if it were not compressed."""
    (folder / "rows.jsonl").write_bytes(gzip.compress(plain()))
    return str(folder / "rows.jsonl")


def write_zstd(folder: Path) -> str:
    (folder / "rows.zst").write_bytes(as_zstd(plain()))
    return str(folder / "rows.zst")


def write_parquet(folder: Path) -> str:
    return str(as_parquet(folder / "rows.parquet", ROWS, row_group_size=4))


def write_folder(folder: Path) -> str:
    """Files in the order of their names, among others."""
    for name, rows in (("b.parquet", ROWS[7:]), ("a.parquet", ROWS[:7])):
        as_parquet(folder / name, rows)
    (folder / "README.md").write_text("about")
    return str(folder)


def write_pattern(folder: Path) -> str:
    for name, rows in (("2.jsonl", ROWS[3:]), ("1.jsonl", ROWS[:3])):
        (folder / name).write_bytes(plain(rows))
    return str(folder / "[12].jsonl")


def write_function(folder: Path) -> str:
    (folder / "own_rows.py").write_text(f"def rows(split):\n    assert split == 'train'\n    yield from {ROWS}\n")
    return "own_rows:rows"


def write_hub(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


WRITERS = (
    write_jsonl,
    write_gzip,
    write_zstd,
    write_parquet,
    write_folder,
    write_pattern,
    write_function,
    write_hub,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_source_gives_the_same_prompts(
    write: Callable[[Path], str], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "data")
    (tmp_path / "data").mkdir()
    name = write(tmp_path / "data")
    for _ in range(2):  # the second time, from the cache
        source = opened(name, cache, prompt_template="{prompt} of {level}")
        assert (source.size, dict(source.dropped)) == (10, {})
        for i, row in enumerate(ROWS):
            prompt = source[i]
            assert (prompt.id, prompt.text, prompt.answer) == (i, f"{i}+1 of {i % 3}", str(i + 1))
            assert prompt.tokens == tuple(TOKENIZER.encode(prompt.text))
            assert prompt.metadata == {"level": row["level"], "tags": ["sum", None]}
    with pytest.raises(IndexError):
        source[10]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "cut between frames", "changed", "followed by other bytes"])
def test_a_compressed_file_that_is_damaged(kind: str, damage: str, tmp_path: Path) -> None:
    """A .zst file cut in a frame reads as a shorter one in the library's own stream."""
    content = b"".join(plain([row | {"id": i}]) for i in range(200) for row in ROWS)
    whole = as_zstd(content, frames=1) if kind == "zstd" else gzip.compress(content)
    other = {
        "cut": whole[:-9],
        "cut between frames": whole + whole[: len(whole) // 2],
        "changed": whole[:300] + bytes(b ^ 0xFF for b in whole[300:340]) + whole[340:],
        "followed by other bytes": whole + b"other bytes",
    }[damage]
    (tmp_path / "rows").write_bytes(other)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(DataError, match=rf"rows is a {kind} file that is damaged or ends too early"):
        opened(tmp_path / "rows", cache)
    assert not [entry for entry in cache.folder.iterdir() if entry.is_dir()]
    (tmp_path / "rows").write_bytes(whole)
    assert opened(tmp_path / "rows", cache).size == 2000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "answer": "1"}, {"prompt": None, "answer": "1"}], "row 2: field 'prompt' is null; expected"),
        ([{"prompt": ["1"], "answer": "1"}], r"""row 1: field 'prompt' is \["1"\]; expected text"""),
        ([{"prompt": b"1", "answer": "1"}], r"""row 1: field 'prompt' is "b'1'"; expected text"""),
        ([{"prompt": {"a": 1}, "answer": "1"}], r"""row 1: field 'prompt' is \{"a": 1\}; expected"""),
        ([{"question": "1", "answer": "1"}], r"row 1: no field 'prompt'"),
        ([], r"contains no prompts"),
    ],
)
def test_a_table_with_a_row_that_is_no_prompt(
    rows: list[dict[str, Any]], message: str, cache: Cache, tmp_path: Path
) -> None:
    path = as_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(DataError, match=message):
        opened(path, cache)


def test_types_that_only_tables_have(cache: Cache, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import datetime
    import decimal

    import pyarrow.parquet

    columns = {
        "prompt": pa.array(["a", "b", "a"]).dictionary_encode(),
        "answer": pa.array([1, 2, 3], pa.int8()),
        "day": [datetime.date(2026, 11, 26)] * 3,
        "price": [decimal.Decimal("1.50")] * 3,
        "bytes": [b"\x00\xff"] * 3,
        "chat": [[{"role": "user", "content": "x"}]] * 3,
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=2)
    source = opened(tmp_path / "rows.parquet", cache)
    assert [source[i].text for i in range(3)] == ["a", "b", "a"]
    metadata = {"day": "2026-11-26", "price": "1.50", "bytes": "00ff", "chat": [{"role": "user", "content": "x"}]}
    assert source[2].metadata == metadata == json.loads(json.dumps(metadata))


def test_a_parquet_file_that_is_damaged(cache: Cache, tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        opened(path, cache)
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        opened(f"parquet:{write_jsonl(tmp_path)}", cache)


def test_a_file_that_changes_during_the_run(tmp_path: Path) -> None:
    """A large file is read when a prompt is drawn."""
    path = Path(write_jsonl(tmp_path))
    source = opened(path, Cache(tmp_path / "cache", least_bytes=0))
    other = tmp_path / "other.jsonl"
    other.write_bytes(plain([{"prompt": "other", "answer": "x"}]))
    path.rename(tmp_path / "moved.jsonl")
    other.rename(path)
    assert source[3].text == "3+1"  # the file that was opened is still there
    (tmp_path / "moved.jsonl").write_bytes(plain([{"prompt": "x", "answer": "y"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl was changed while the run reads it: \d+ bytes at the start, \d+"):
        source[3]
    small = opened(path, Cache(tmp_path / "cache"))
    path.write_bytes(b"")
    assert small[0].text == "other"


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    path, cache = Path(write_jsonl(tmp_path)), Cache(tmp_path / "cache", least_bytes=0)
    assert opened(path, cache)[0].text == "0+1"
    path.write_bytes(plain().replace(b"0+1", b"0+7"))
    os.utime(path, ns=(1, 1))
    assert opened(path, cache)[0].text == "0+7"


def test_processes_share_what_is_prepared(tmp_path: Path) -> None:
    """Of those that ask at once, one makes the entry and the others wait for it. A lock belongs to an open file, so
    threads stand for processes here."""
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "first").touch()
        time.sleep(0.2)
        (folder / "last").touch()

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(Cache(tmp_path).entry, "x", {"of": 1}, make) for _ in range(4)]
        assert {len(list(each.result().iterdir())) for each in asked} == {2}
    assert len(made) == 1


def test_nodes_that_share_no_lock_keep_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)

    def slower(folder: Path) -> None:
        Cache(tmp_path).entry("x", {}, lambda other: (other / "faster").touch())
        (folder / "slower").touch()

    monkeypatch.setattr("socket.gethostname", iter(["node 1", "node 2"]).__next__)
    assert [path.name for path in Cache(tmp_path).entry("x", {}, slower).iterdir()] == ["faster"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry("x", {}, fails)
    made = cache.entry("x", {}, lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert sorted(path.suffix for path in cache.folder.iterdir()) == ["", ".lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"the cache of prepared data cannot be written.*set run\.cache"):
        opened(write_jsonl(tmp_path), Cache(tmp_path / "cache", least_bytes=0))


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"a \.zst file needs the package zstandard .*`pip install zstandard`"):
        optional.needed("zstandard", "a .zst file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"a Parquet file needs the package pyarrow"):
        opened(tmp_path / "rows.parquet", Cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("raise SystemExit(0)", ConfigError, r"the source 'bad_rows:rows' cannot be used \(SystemExit"),
        ("other = 1", ConfigError, r"cannot be used \(AttributeError"),
        ("def rows(): raise OSError('no disk')", DataError, r"bad_rows:rows failed: OSError: no disk"),
        ("def rows(): return 3", DataError, r"bad_rows:rows failed: TypeError"),
        ("def rows(): return [['a']]", DataError, r"bad_rows:rows, row 1: found .* expected a dictionary"),
        ("def rows(): return []", DataError, r"bad_rows:rows contains no prompts"),
    ],
)
def test_a_function_that_gives_no_rows(
    code: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_rows", raising=False)
    (tmp_path / "bad_rows.py").write_text(code + "\n")
    with pytest.raises(error, match=message):
        opened("bad_rows:rows", Cache(tmp_path / "cache"))
    sys.modules.pop("bad_rows", None)


def test_a_data_set_of_the_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    name = write_hub(tmp_path)
    with pytest.raises(DataError, match=r"has no split 'validation'; it has train: write hf:.*::SPLIT"):
        opened(f"{name}::validation", Cache(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf:nobody/nothing cannot be loaded.*NAME\[:CONFIG\[:SPLIT\]\]"):
        opened("hf:nobody/nothing", Cache(tmp_path / "cache"))


# --- filters ---


def test_rows_are_left_out_and_counted_by_reason(cache: Cache, tmp_path: Path) -> None:
    lines = [
        *(b'{"prompt": "1", "answer": "1"}', b'{"prompt": "2", "answer": "2"}', b'{"prompt": "1", "answer": "3"}'),
        *(b'{"prompt": "", "answer": "1"}', b'{"prompt": "\\ud800", "answer": "1"}', b"{", b"[]", b'{"prompt": "3"}'),
        *(
            b'{"prompt": 3, "answer": null}',
            b'{"prompt": "\xff", "answer": "1"}',
            b'{"prompt": "\\u0000", "answer": ""}',
        ),
        *(b'{"prompt": "' + b"9" * 51 + b'", "answer": "1"}', b"", b'{"prompt": "4", "answer": "4"}'),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    kept = {"overlong": "drop", "bad_rows": "drop"}
    source = opened(tmp_path / "rows.jsonl", cache, **kept, duplicates="drop")
    assert [source[i].text for i in range(3)] == ["1", "2", "4"] and source.size == 3
    assert dict(source.dropped) == {
        **{"duplicate": 1, "empty": 1, "not text": 1, "not JSON": 2, "not an object": 1, "missing field": 1},
        **{"wrong type": 1, "tokenizer": 1, "too long": 1},
    }
    with_duplicates = opened(tmp_path / "rows.jsonl", cache, **kept)
    assert [with_duplicates[i].answer for i in range(4)] == ["1", "2", "3", "4"]
    assert with_duplicates.size == 4 and "duplicate" not in with_duplicates.dropped
    assert opened(tmp_path / "rows.jsonl", cache, **kept, size=2).size == 2
    for bad in ({"overlong": "drop"}, {"bad_rows": "drop"}):
        with pytest.raises(DataError, match=r"rows\.jsonl:(4: field 'prompt' is empty|12: the prompt has 51 tokens)"):
            opened(tmp_path / "rows.jsonl", cache, **bad)


def test_a_row_of_ten_megabytes(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(plain([{"prompt": "1" * 10_000_000, "answer": "1"}, *ROWS]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt has 10,000,000 tokens, the limit is 50") as failed:
        opened(tmp_path / "rows.jsonl", cache)
    assert len(str(failed.value)) < 1000
    assert opened(tmp_path / "rows.jsonl", cache, overlong="drop").size == 10
