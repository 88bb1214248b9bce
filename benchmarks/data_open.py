"""What large data costs a process at its first start and at its second: seconds, private memory, a prompt at random.

    python -m benchmarks.data_open --output benchmarks/results/data_open.json --markdown docs/data.md

`short` is a million prompts of a line each; `long` are prompts and solutions of --gigabytes together, as JSONL and,
with pyarrow, as Parquet. Tokens are characters, so the time of the first start is that of reading, not of a tokenizer.
Every start is a process of its own; private memory is anonymous memory, without what the processes of a node share.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import keep, machine, table, versions
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.sources import DataSpec, open_source
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.device import open_device

WORDS = Path(__file__).parents[1] / "docs" / "architecture.md"
READ = 2000
"""Prompts read at random."""


def rows(gigabytes: float | None, number: int) -> Iterator[str]:
    """Lines of JSON: `number` short ones, or long ones until they have this size."""
    draw, written, i = random.Random(1), 0, 0
    words = [word for word in WORDS.read_text().split() if word.isascii()]
    while i < number if gigabytes is None else written < gigabytes * 1e9:
        row: dict[str, Any] = {"prompt": f"{i} plus {draw.randrange(10**6)} times {draw.randrange(100)}?", "answer": i}
        if gigabytes is not None:
            row |= {"prompt": f"{i} {' '.join(draw.choices(words, k=60))}"}
            row |= {"solution": " ".join(draw.choices(words, k=200))}
        line = json.dumps(row) + "\n"
        yield line
        written, i = written + len(line), i + 1


def as_parquet(jsonl: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, schema = jsonl.with_suffix(".parquet"), None
    batch: list[dict[str, Any]] = []
    with jsonl.open() as lines:
        first = json.loads(lines.readline())
        schema = pa.Table.from_pylist([first]).schema
    with jsonl.open() as lines, pq.ParquetWriter(path, schema) as out:
        for line in lines:
            batch.append(json.loads(line))
            if len(batch) == 20_000:
                out.write_table(pa.Table.from_pylist(batch, schema))
                batch.clear()
        out.write_table(pa.Table.from_pylist(batch, schema))
    return path


def opened(file: Path, cache: Path) -> dict[str, Any]:
    """One start, in this process."""
    before, start = _anonymous_mib(), time.perf_counter()
    source: Any = open_source(DataSpec(str(file), "train", 10**6, cache=Cache(cache)), CharacterTokenizer(), seed=0)
    seconds, private = time.perf_counter() - start, _anonymous_mib() - before
    draw, start = random.Random(1), time.perf_counter()
    for _ in range(READ):
        source[draw.randrange(source.size)]
    return {
        "prompts": source.size,
        "tokens": source.num_tokens,
        "open_s": round(seconds, 4),
        "private_mib": round(private, 1),
        "prompt_us": round((time.perf_counter() - start) / READ * 1e6, 1),
    }


def _anonymous_mib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


def measure(folder: Path, number: int, gigabytes: float) -> dict[str, Any]:
    files = {"short": folder / "short.jsonl", "long": folder / "long.jsonl"}
    for name, file in files.items():
        with file.open("w") as out:
            out.writelines(rows(gigabytes if name == "long" else None, number))
    try:
        files["long, Parquet"] = as_parquet(files["long"])
    except ImportError:
        print("without pyarrow: no Parquet", file=sys.stderr)
    found = {}
    for name, file in files.items():
        command = [sys.executable, "-m", "benchmarks.data_open", "--file", str(file), "--cache", str(folder / "cache")]
        starts = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(2)]
        found[name] = {"bytes": file.stat().st_size, "first": starts[0], "second": starts[1]}
        print(name, json.dumps(found[name]), flush=True)
    return {
        "machine": machine(open_device("cpu", "fp32"), 1),
        "versions": versions(["numpy", "pyarrow"]),
        "sources": found,
    }


def markdown(result: dict[str, Any]) -> str:
    head = ("data", "size", "prompts", "first start", "second start", "private memory", "a prompt at random")
    lines = [
        (
            name,
            f"{found['bytes'] / 1e9:.2f} GB",
            f"{found['second']['prompts']:,}",
            f"{found['first']['open_s']:.0f} s",
            f"{found['second']['open_s'] * 1e3:.0f} ms",
            f"{found['second']['private_mib']:.1f} MiB",
            f"{found['second']['prompt_us']:.0f} us",
        )
        for name, found in result["sources"].items()
    ]
    about = f"`python -m benchmarks.data_open` on {result['machine']}; tokens are characters."
    return f"{table(head, lines)}\n{about}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=1_000_000, help="of the short ones")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the long ones")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    parser.add_argument("--from", dest="known", type=Path, help="a file that --output wrote, instead of measuring")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.file:
        print(json.dumps(opened(options.file, options.cache)))
        return 0
    if options.known:
        result = json.loads(options.known.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Path(folder), options.prompts, options.gigabytes)
    keep(result, markdown(result), "data_open", output=options.output, markdown=options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
